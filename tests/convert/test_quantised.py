"""Quantised checkpoints: what lands is the slice of the dequantised tensor to the bit, and no more is read for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import loader
from loader.convert.graph import Key
from loader.convert.pull import pull_back
from loader.convert.quantised import dequantise
from loader.errors import ConversionError, CoverageError
from loader.plan.geometry import Box
from tests.checkpoints import same_bits
from tests.convert.test_pull import fill
from tests.proxy import CountingProxy
from tests.quantised import float8, product, scales
from tests.ranks import run_ranks
from tests.shards import blank, differences, shard, write_file

FILE = "model.safetensors"
EARLY = 64 * 1024


# ---------------------------------------------------------------- any box of a tensor


def keys_of(stored: dict[str, Tensor]) -> tuple[dict[str, Key], list[Tensor]]:
    nodes = {key: Key(tuple(t.shape), t.dtype, position) for position, (key, t) in enumerate(stored.items())}
    return nodes, list(stored.values())


def a_box(draw: st.DataObject, shape: tuple[int, ...]) -> Box:
    offsets = [draw.draw(st.integers(0, size - 1)) for size in shape]
    return Box(
        tuple(offsets), tuple(draw.draw(st.integers(1, size - at)) for size, at in zip(shape, offsets, strict=True))
    )


def part_of(stored: dict[str, Tensor], config: dict[str, Any], box: Box) -> Tensor:
    """The one tensor that `stored` is seen as: `box` of it, made only of what it is pulled back to."""
    keys, sources = keys_of(stored)
    ((_, node),) = dequantise(keys, config).items()
    view = torch.full(box.sizes, torch.nan)
    fill(node, box, view, sources)
    return view


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.data())
def test_any_box_of_block_scaled_float8(data) -> None:
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    block = (data.draw(st.integers(1, 17)), data.draw(st.integers(1, 17)))
    experts = data.draw(st.sampled_from([(), (3,)]))
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e8m0fnu]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = float8((*experts, *shape), generator)
    grid = (*experts, -(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scale = scales(grid, generator).to(kind)
    box = a_box(data, tuple(weight.shape))
    found = part_of({"w": weight, "w_scale_inv": scale}, {"quant_method": "fp8", "weight_block_size": block}, box)
    assert same_bits(found, product(weight, scale, block)[box.slices()])


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.data())
def test_any_box_of_mxfp4_in_every_dtype_as_transformers_makes_it(data) -> None:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    box = a_box(data, (shape[0], shape[2] * 32, shape[1]))
    found = part_of({"w_blocks": blocks, "w_scales": exponents}, {"quant_method": "mxfp4"}, box)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = convert_moe_packed_tensors(blocks, exponents, dtype=dtype)[box.slices()]
        assert same_bits(found.to(dtype), expected.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("kind", [torch.float32, torch.float8_e8m0fnu, torch.uint8])
def test_block_scaled_float8_is_what_transformers_makes(kind) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = float8((48, 64), generator)
    scale = torch.randint(110, 140, (3, 4), dtype=torch.uint8, generator=generator)
    scale = {torch.float32: scale.float() / 7, torch.uint8: scale}.get(kind, scale.view(torch.float8_e8m0fnu))
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    found = part_of({"w": weight, "w_scale_inv": scale}, config, Box((0, 0), (48, 64)))
    for dtype in (torch.bfloat16, torch.float32):
        assert same_bits(found.to(dtype), Fp8Dequantize(None)._dequantize_one(weight, scale, dtype))


def needs(stored: dict[str, Tensor], config: dict[str, Any], box: Box) -> dict[str, int]:
    """By key, how many of its elements `box` takes."""
    keys, _ = keys_of(stored)
    ((_, node),) = dequantise(keys, config).items()
    counts = dict.fromkeys(stored, 0)
    open_steps = list(pull_back(node, box, torch.empty(box.sizes, device="meta")))
    while open_steps:
        step = open_steps.pop()
        if hasattr(step, "key"):
            counts[list(stored)[step.key]] += step.box.numel
        else:
            for part, region in zip(step.node.parts, step.node.over(step.box)[0], strict=True):
                open_steps += pull_back(part, region, torch.empty(region.sizes, device="meta"))
    return counts


def test_a_slice_takes_its_own_scales_and_no_more() -> None:
    stored = {"w": torch.zeros(300, 500, dtype=torch.float8_e4m3fn), "w_scale_inv": torch.zeros(3, 4)}
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert needs(stored, config, Box((128, 0), (128, 500))) == {"w": 64_000, "w_scale_inv": 4}
    assert needs(stored, config, Box((120, 250), (20, 200))) == {"w": 4000, "w_scale_inv": 6}
    packed = {"w_blocks": torch.zeros(2, 6, 3, 16, dtype=torch.uint8), "w_scales": torch.zeros(2, 6, 3)}
    assert needs(packed, {"quant_method": "mxfp4"}, Box((0, 30, 2), (1, 5, 3))) == {"w_blocks": 9, "w_scales": 6}


TENSORS = {"symmetric": True, "type": "float", "num_bits": 8}


def groups(**weights: Any) -> dict[str, Any]:
    found = {"group_0": {"targets": ["Linear"], "weights": {**TENSORS, **weights}, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": found}


# ---------------------------------------------------------------- what is read, held, and kept

ROWS, COLUMNS, BLOCK = 1024, 512, (48, 80)
BLOCKS = {"quant_method": "fp8", "weight_block_size": BLOCK}


def large() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    grid = (-(-ROWS // BLOCK[0]), -(-COLUMNS // BLOCK[1]))
    return {"w": float8((ROWS, COLUMNS), generator), "w_scale_inv": scales(grid, generator)}


def save(directory: Path, tensors: dict[str, Tensor], config: Any = BLOCKS, **fields: Any) -> str:
    write_file(directory / FILE, tensors)
    fields = {"model_type": "llama", **fields, "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(fields))
    return str(directory)


def load_large(uri: str, options: Any, placement: Any, share: str) -> tuple[bool, Any]:
    mesh = init_device_mesh("cpu", (4,))
    meant = product(large()["w"], large()["w_scale_inv"], BLOCK).to(torch.bfloat16)
    state = {"w": blank(shard(meant, mesh, [placement]))}
    report = loader.load(state, uri, storage_options=options, share=share, range_size="64KiB", memory_budget="64MiB")
    return differences(state, {"w": shard(meant, mesh, [placement])}) == [], report


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_the_bucket_serves_quantised_bytes_and_scales_once(s3, tmp_path, placement) -> None:
    save(tmp_path, large())
    with CountingProxy(s3.endpoint) as proxy:
        uri, options = s3.put(tmp_path), s3.at(proxy.url).storage_options
        found = run_ranks(4, load_large, uri, options, placement, "world")
        bytes_of_keys = sum(tensor.nbytes for tensor in large().values())
        assert all(right for right, _ in found)
        assert found[0][1].needed_bytes == bytes_of_keys
        assert bytes_of_keys <= proxy.bytes_served(FILE) <= bytes_of_keys + EARLY + 1024


def test_a_rank_alone_reads_its_own_blocks_and_their_scales(s3, tmp_path) -> None:
    uri = s3.put(Path(save(tmp_path, large())))
    found = run_ranks(4, load_large, uri, s3.storage_options, Shard(0), "none")
    assert all(right for right, _ in found)
    for rank in (1, 2, 3):  # rank 0 reads the header too
        rows = range(rank * 256, rank * 256 + 256)
        touched = len({row // BLOCK[0] for row in rows})
        assert found[0][1].ranks[rank].fetched_bytes == 256 * COLUMNS + touched * 7 * 4


def transposed(keys: Any, _: Any) -> dict[str, Tensor]:
    return {"w": keys["w"].t()}


def load_many(directory: str, convert: Any) -> int | None:
    state = {"w": torch.zeros(6144, 6144, dtype=torch.bfloat16)}
    report = loader.load(state, directory, convert=convert, memory_budget="16MiB")
    assert (state["w"] == 2).all()
    return report.memory.peak_over_shards_bytes


@pytest.mark.parametrize("convert", [None, transposed])
def test_dequantising_stays_within_the_budget(tmp_path, convert) -> None:
    """36 MiB: transposed too, where rows of what is stored are columns of what is filled."""
    tensors = {"w": torch.ones(6144, 6144).to(torch.float8_e4m3fn), "w_scale_inv": torch.full((48, 48), 2.0)}
    save(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    (peak,) = run_ranks(1, load_many, str(tmp_path), convert)
    assert peak is not None
    assert peak <= 16 << 20


def test_iter_convert_dequantises_to_the_configs_dtype(tmp_path) -> None:
    meant = product(large()["w"], large()["w_scale_inv"], BLOCK)
    for name, dtype in ({"torch_dtype": "float16"}, torch.float16), ({}, torch.bfloat16):
        ((fqn, tensor),) = loader.iter_convert(save(tmp_path, large(), **name))
        assert fqn == "w"
        assert same_bits(tensor, meant.to(dtype))


def test_a_target_of_the_stored_dtype_gets_what_is_stored(tmp_path) -> None:
    state = {key: torch.zeros_like(tensor) for key, tensor in large().items()}
    loader.load(state, save(tmp_path, large()))
    assert differences(state, large()) == []


def load_halves(directory: str) -> list[str]:
    """Rank 0 has the weight, rank 1 the scales alone: what one keeps, all keep."""
    rank = torch.distributed.get_rank()
    mine = {key: tensor for number, (key, tensor) in enumerate(large().items()) if number == rank}
    state = {key: torch.zeros_like(tensor) for key, tensor in mine.items()}
    loader.load(state, directory)
    return differences(state, mine)


def test_what_is_kept_on_one_rank_is_kept_on_all(tmp_path) -> None:
    assert run_ranks(2, load_halves, save(tmp_path, large())) == [[], []]


def without(key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in large().items() if name != key}


W, EXPERTS = large(), {"e_blocks": torch.zeros(2, 4, 3, 16, dtype=torch.uint8)}
INT4 = {**groups(), "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 4}}}}


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (W, {"quant_method": "gptq", "bits": 4}, ["'gptq'", "fp8", "mxfp4", "model.dequantize: false"]),
        (W, {"quant_method": "bitsandbytes", "load_in_4bit": True}, ["'bitsandbytes'"]),
        (W, INT4, ["group_0", "num_bits': 4", "symmetric float8"]),
        (W, {"quant_method": {"fp8": 1}}, ["quantised as {'fp8': 1}"]),
        (W, groups(group_size=[20]), ["a block of scales", "[1, [20]]"]),
        (W, groups(symmetric=False), ["group_0", "'symmetric': False"]),
        (without("w_scale_inv"), BLOCKS, ["w is torch.float8_e4m3fn", "no w_scale_inv", "source.ignore"]),
        (W, {**BLOCKS, "weight_block_size": [32, 80]}, ["w_scale_inv is [22, 7]", "w is [1024, 512]", "[32, 7]"]),
        (W, {**BLOCKS, "weight_block_size": [32, -1]}, ["a block of scales", "[32, -1]"]),
        (W, {**BLOCKS, "weight_block_size": "big"}, ["a block of scales", "'big'"]),
        (W, {**BLOCKS, "weight_block_size": [2, 32, 80]}, ["w_scale_inv is [22, 7]"]),
        (W, {**groups(), "config_groups": [1]}, ["config_groups", "should be an object, found [1]"]),
        (W, {**groups(), "config_groups": {"group_0": 3}}, ["group_0", "should be an object, found 3"]),
        (EXPERTS, {"quant_method": "mxfp4"}, ["e_blocks", "without e_scales"]),
        ({**EXPERTS, "e_scales": torch.zeros(2, 4, 2)}, {"quant_method": "mxfp4"}, ["[2, 4, 3, 16]", "[2, 4, 2]"]),
        ({**EXPERTS, "e_scales": torch.zeros(2, 4, 3), "e": torch.zeros(1)}, {"quant_method": "mxfp4"}, ["e is there"]),
    ],
)
def test_what_cannot_be_dequantised_is_named(tmp_path, tensors, config, words) -> None:
    with pytest.raises(ConversionError) as caught:
        loader.load({"w": torch.zeros(ROWS, COLUMNS)}, save(tmp_path, tensors, config))
    assert caught.value.exit_code == 2
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize("scale", ["w_scale_inv", "w_scale"])
def test_scales_that_config_json_does_not_tell_of_are_named(tmp_path, scale) -> None:
    """Ignoring them would load other weights."""
    uri = save(tmp_path, {"w": W["w"], scale: W["w_scale_inv"]}, config=None)
    with pytest.raises(
        ConversionError, match=f"w is torch.float8_e4m3fn, with {scale} beside it, .*quantization_config"
    ):
        loader.load({"w": torch.zeros(ROWS, COLUMNS)}, uri)
    state = {"w": torch.zeros_like(W["w"]), scale: torch.zeros_like(W["w_scale_inv"])}
    loader.load(state, uri)
    assert differences(state, {"w": W["w"], scale: W["w_scale_inv"]}) == []


def test_a_scale_without_a_weight_is_left_to_the_proof_of_coverage(tmp_path) -> None:
    tensors = {**large(), "v_scale_inv": torch.ones(1)}
    with pytest.raises(CoverageError, match=r"v_scale_inv \[1\]"):
        loader.load({"w": torch.zeros(ROWS, COLUMNS)}, save(tmp_path, tensors))
