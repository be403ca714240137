"""Conversions on several ranks: what lands is a slice of the whole conversion, and no more is read than it needs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, zeros

import loader
from loader.convert.named import olmo_core
from loader.errors import CoverageError
from loader.ground.memory import PeakMemory
from loader.place.transformers_builder import config_of
from tests.checkpoints import same_bits
from tests.proxy import CountingProxy
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard, write_file

WORLD = 4
MIB = 1 << 20
EARLY = 64 * 1024
EXPERTS = 8
FILE = "model.safetensors"


def whole() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"q": (256, 128), "norm": (128,), "fused": (512, 128), "a": (128, 256), "b": (128, 256)}
    shapes |= {f"experts.{e}.w": (64, 128) for e in range(EXPERTS)}
    return {key: torch.randn(shape).to(torch.bfloat16) for key, shape in shapes.items()}


def rotary(keys: Mapping[str, Tensor], _: Any) -> Iterator[tuple[str, Tensor]]:
    yield "wq", keys["q"].view(8, 2, 16, 128).transpose(1, 2).reshape(256, 128)


def stacked(keys: Mapping[str, Tensor], _: Any) -> Iterator[tuple[str, Tensor]]:
    yield "w", torch.stack([keys[f"experts.{e}.w"] for e in range(EXPERTS)]).transpose(1, 2)


def split(keys: Mapping[str, Tensor], _: Any) -> Iterator[tuple[str, Tensor]]:
    gate, up = keys["fused"].chunk(2, 0)
    yield "gate", gate
    yield "up", up.t().contiguous()


def shifted(keys: Mapping[str, Tensor], _: Any) -> Iterator[tuple[str, Tensor]]:
    yield "norm", keys["norm"] + 1.0
    yield "padded", torch.cat([keys["a"], keys["a"].new_zeros(4, 256)])


def merged(keys: Mapping[str, Tensor], _: Any) -> Iterator[tuple[str, Tensor]]:
    yield "sum", (keys["a"].float() + keys["b"].float() * 0.5).to(torch.bfloat16)


CONVERSIONS = {
    "rotary": (rotary, ["q"]),
    "stacked": (stacked, [f"experts.{e}.w" for e in range(EXPERTS)]),
    "split": (split, ["fused"]),
    "shifted": (shifted, ["norm", "a"]),
    "merged": (merged, ["a", "b"]),
}
LAYOUTS = {
    "fsdp": ((4,), [Shard(0)]),
    "last dim": ((4,), [Shard(-1)]),
    "hsdp": ((2, 2), [Replicate(), Shard(0)]),
    "both dims": ((2, 2), [Shard(0), Shard(1)]),
    "replicated": ((4,), [Replicate()]),
}


@pytest.fixture(scope="module")
def bucket(s3, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_file(directory / FILE, whole())
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 128}))
    with CountingProxy(s3.endpoint) as proxy:
        yield s3.put(directory), proxy, s3.at(proxy.url).storage_options, directory


def every(keys: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    for convert, _ in CONVERSIONS.values():
        yield from convert(keys, config)


def load_all(uri: str, options: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for layout, (sizes, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", sizes)
        expected = {
            fqn: shard(tensor, mesh, [Shard(p.dim % tensor.ndim) if isinstance(p, Shard) else p for p in placements])
            for fqn, tensor in every(whole(), None)
        }
        state = {fqn: blank(tensor) for fqn, tensor in expected.items()}
        report = loader.load(state, uri, convert=every, storage_options=options, range_size="64KiB")
        found[layout] = differences(state, expected), report.needed_bytes, report.fetched_bytes
    return found


def test_every_conversion_lands_bit_for_bit_and_reads_each_byte_once(bucket) -> None:
    uri, _, options, _ = bucket
    used = sum(tensor.nbytes for tensor in whole().values())
    for found in run_ranks(WORLD, load_all, uri, options):
        for layout, (wrong, needed, fetched) in found.items():
            assert not wrong, (layout, wrong)
            assert needed == used, layout
            assert needed <= fetched <= needed + EARLY + 8 * 1024, layout


def load_alone(uri: str, options: Mapping[str, Any]) -> list[int]:
    """Each rank reads for itself: bytes by rank."""
    mesh = init_device_mesh("cpu", (WORLD,))
    state = {fqn: blank(shard(tensor, mesh, [Shard(0)])) for fqn, tensor in merged(whole(), None)}
    ignore = [key for key in whole() if key not in ("a", "b")]
    report = loader.load(state, uri, convert=merged, storage_options=options, ignore=ignore, share="none")
    return [rank.fetched_bytes for rank in report.ranks]


def test_of_keys_that_are_combined_a_slice_is_read(bucket) -> None:
    uri, proxy, options, _ = bucket
    proxy.reset()
    needed = whole()["a"].nbytes + whole()["b"].nbytes
    fetched = run_ranks(WORLD, load_alone, uri, options)[0]
    assert fetched[1:] == [needed // WORLD] * (WORLD - 1)
    assert proxy.bytes_served(FILE) == sum(fetched)


def load_sum(directory: str) -> tuple[int | None, bool]:
    """Two keys at the ends of a file, added: neither can land before the other is there."""
    mesh = init_device_mesh("cpu", (2,))
    rows = torch.arange(4096, dtype=torch.float32)[:, None].expand(4096, 2048)
    state = {"sum": blank(shard(torch.zeros(4096, 2048), mesh, [Shard(0)]))}
    report = loader.load(
        state,
        directory,
        convert=lambda keys, _: {"sum": keys["first"] + keys["last"]},
        ignore=["between"],
        memory_budget="16MiB",
    )
    return report.memory.peak_over_shards_bytes, torch.equal(state["sum"].full_tensor(), 3 * rows)


def test_what_an_op_waits_for_stays_within_the_budget(tmp_path: Path) -> None:
    rows = torch.arange(4096, dtype=torch.float32)[:, None].expand(4096, 2048)
    tensors = {"first": rows, "between": torch.zeros(64, MIB, dtype=torch.int8), "last": 2 * rows}
    write_file(tmp_path / FILE, tensors)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for peak, right in run_ranks(2, load_sum, str(tmp_path)):
        assert right
        assert peak is not None
        assert peak <= 16 * MIB


SPARSE, WIDTH, STACK = 16, 1024, 64 * MIB
"""Experts, each [WIDTH, WIDTH] in float32, and what they come to stacked: four times the budget."""


def sparse_keys() -> dict[str, Tensor]:
    """A qwen3_moe of one layer. Expert e's element [i, j] is (e * WIDTH + i) * WIDTH + j, which float32 has exactly."""
    layer = "model.layers.0."
    keys = {f"{layer}self_attn.{x}_proj.weight": torch.zeros(WIDTH if x == "q" else WIDTH // 2, WIDTH) for x in "qkv"}
    keys |= {f"{layer}self_attn.{x}_norm.weight": torch.ones(512) for x in "qk"}
    keys |= {f"{layer}{x}_layernorm.weight": torch.ones(WIDTH) for x in ("input", "post_attention")}
    keys |= {
        f"{layer}self_attn.o_proj.weight": torch.zeros(WIDTH, WIDTH),
        f"{layer}mlp.gate.weight": torch.zeros(16, WIDTH),
    }
    experts = torch.arange(SPARSE * WIDTH**2, dtype=torch.float32).view(SPARSE, WIDTH, WIDTH)
    for x in ("gate", "up", "down"):
        keys |= {f"{layer}mlp.experts.{e}.{x}_proj.weight": experts[e] for e in range(SPARSE)}
    return (
        keys
        | {f"{x}.weight": torch.ones(8, WIDTH) for x in ("model.embed_tokens", "lm_head")}
        | {"model.norm.weight": torch.ones(WIDTH)}
    )


SPARSE_CONFIG = {
    "model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": SPARSE, "hidden_size": WIDTH, "head_dim": 512,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip


def load_experts(directory: str, shapes: Mapping[str, Sequence[int]]) -> tuple[int | None, list[str]]:
    """OLMo-core's experts: turned, one below the other, here cut in both dims."""
    mesh = init_device_mesh("cpu", (2, 2))
    state = {fqn: zeros(*shape, device_mesh=mesh, placements=[Shard(0)] * 2) for fqn, shape in shapes.items()}
    stacked = [fqn for fqn in shapes if ".experts." in fqn]
    for fqn in stacked:
        state[fqn] = zeros(*shapes[fqn], device_mesh=mesh, placements=[Shard(0), Shard(1)])
    report = loader.load(state, directory, convert="olmo_core", memory_budget="16MiB", range_size="1MiB")
    row, column = (torch.arange(n // 2) + n // 2 * mesh.get_local_rank(d) for d, n in enumerate(shapes[stacked[0]]))
    expected = (row[:, None] // WIDTH * WIDTH + column) * WIDTH + row[:, None] % WIDTH
    wrong = [fqn for fqn in stacked if not torch.equal(state[fqn].to_local(), expected.float())]
    return report.memory.peak_over_shards_bytes, wrong


def test_stacked_experts_of_many_budgets_stay_within_it(tmp_path: Path) -> None:
    keys = sparse_keys()
    write_file(tmp_path / FILE, keys)
    (tmp_path / "config.json").write_text(json.dumps(SPARSE_CONFIG))
    made = olmo_core.convert({key: t.to("meta") for key, t in keys.items()}, config_of(SPARSE_CONFIG))
    shapes = {fqn: tuple(tensor.shape) for fqn, tensor in made}
    assert [math.prod(shape) * 4 for fqn, shape in shapes.items() if ".experts." in fqn] == [STACK] * 3
    for peak, wrong in run_ranks(WORLD, load_experts, str(tmp_path), shapes):
        assert wrong == []
        assert peak is not None
        assert peak <= 16 * MIB < STACK / 3


def test_nothing_is_written_where_a_key_is_left_over(bucket) -> None:
    uri, proxy, options, _ = bucket
    proxy.reset()
    with pytest.raises(CoverageError, match="norm"):
        loader.load({"wq": torch.zeros(256, 128)}, uri, convert=rotary, storage_options=options, ignore=["experts*"])
    assert proxy.bytes_served(FILE) <= EARLY


def test_iter_convert_is_the_whole_conversion_in_its_order(bucket) -> None:
    uri, _, options, _ = bucket
    for convert, keys in CONVERSIONS.values():
        ignore = [key for key in whole() if key not in keys]
        expected = dict(convert(whole(), None))
        found = list(loader.iter_convert(uri, convert=convert, storage_options=options, ignore=ignore))
        assert [fqn for fqn, _ in found] == list(expected)
        assert all(same_bits(tensor, expected[fqn]) for fqn, tensor in found)


def iterate(directory: str) -> int | None:
    next(loader.iter_convert(directory, memory_budget="16MiB"))  # what is imported on the way counts for nothing
    with PeakMemory() as memory:
        for i, (fqn, tensor) in enumerate(loader.iter_convert(directory, memory_budget="16MiB")):
            assert fqn == f"layer.{i}"
            assert int(tensor[-1, -1]) == i
    assert i == 31
    return memory.stop()


def test_iter_convert_holds_a_few_tensors_however_many_there_are(tmp_path: Path) -> None:
    write_file(tmp_path / FILE, {f"layer.{i}": torch.full((4, MIB), i, dtype=torch.int8) for i in range(32)})
    (peak,) = run_ranks(1, iterate, str(tmp_path))
    assert peak is not None
    assert peak <= 20 * MIB  # the budget, and the tensor in hand
