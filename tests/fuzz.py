"""Damaged and hostile headers, index files, configs, zip directories and pickles, without end.

    python tests/fuzz.py --inputs 100000 [--seed 0] [--first 0]

Every input must end in an error of loader.errors, or in the tensors that the format's own library makes of it: never in
another exception, a hang, or memory that the input is not worth. Input n depends on the seed and n alone: the number
that a failure names is run again with --first n --inputs 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import pickletools
import random
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from loader.convert.conversion import visible_keys
from loader.errors import LoaderError
from loader.formats.index import parse_index
from loader.formats.layout import assemble
from loader.formats.safetensors import header_length, parse_header
from loader.plan.catalog import Contents, File
from loader.plan.geometry import whole
from tests.checkpoints import same_bits
from tests.convert.test_pull import fill
from tests.fuzz_configs import CONFIGS, SETTINGS, check_config, check_yaml, damaged_yaml
from tests.torch_files import catalogued, records, saved, tensors_of, zipped

SECONDS = 10
"""Of CPU time, for one input of a kilobyte or two. The slowest takes a tenth of one."""

ROOM = 512 << 20
"""Address space above what the process has before the first input: what is beyond is a MemoryError."""

GROWTH = 128 << 20
"""Bytes that the process may have grown by at the end."""

Random = random.Random


# ---------------------------------------------------------------- sound inputs


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    fused, embed = torch.randn(6, 4), torch.randn(5, 2)
    return {
        "a.weight": torch.randn(3, 4), "a.bias": torch.arange(3), "b": torch.randn(4, 3).t(), "c": torch.tensor(2.0),
        "square": torch.randn(3, 3).t(),
        "embed": embed, "head": embed, "q": fused[:4], "k": fused[2:], "columns": torch.randn(6, 4)[:, 1:3],
        "half": torch.randn(3).bfloat16(), "u16": torch.arange(4).to(torch.uint16), "empty": torch.zeros(0, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)), "flags": torch.tensor([True, False]),
    }  # fmt: skip


def _seeds() -> dict[str, list[bytes]]:
    state = _tensors()
    nested = {"state_dict": collections.OrderedDict(state), "epoch": 3, "args": {"lr": 0.5, "names": ("a", None)}}
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    plain = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    legacy = {"_use_new_zipfile_serialization": False}
    old = {key: tensor for key, tensor in state.items() if key != "u16"}  # which torch.load cannot read there
    return {
        "safetensors": [safetensors.torch.save(plain), safetensors.torch.save({}, metadata={"format": "pt"})],
        "index": [
            json.dumps(
                {"metadata": {"total_size": 9}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "f"}}
            ).encode()
        ],
        "config": CONFIGS,
        "yaml": [SETTINGS],
        "zip": [saved(state), saved(nested), saved(module), zipped(records(saved(state)), zip64=True)],
        "pickle": [saved(state), saved(nested), saved(module), saved(state, pickle_protocol=4)],
        "legacy": [saved(old, **legacy), saved({**nested, "state_dict": old}, **legacy), saved(module, **legacy)],
    }


# ---------------------------------------------------------------- what is done to them

NUMBERS = [0, 1, 2, 3, 7, 8, 64, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62,
           2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip
JUNK: list[Any] = [None, True, -1, 0, 1, 3, 2**31, 2**63 - 1, 2**63, 10**30, 1.5, float("nan"), "", "F32", "I8", "BF16",
                   "x", "\ud800", "../x", "s3://b/f", [], [0], [2, 3], [2**40] * 3, {}, {"dtype": "F32"}]  # fmt: skip
GLOBALS = [b"posix\nsystem", b"builtins\neval", b"builtins\nbytearray", b"torch\nFloatTensor", b"torch\nTensor",
           b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter", b"torch\nHalfStorage",
           b"torch.storage\nUntypedStorage", b"collections\nOrderedDict", b"torch\nfloat16",
           b"torch\nSize"]  # fmt: skip


def damaged(data: bytes, rng: Random, near: tuple[int, int] | None = None) -> bytes:
    """A few bytes changed, cut, doubled or put in, within `near`."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        low, high = near or (0, len(result))
        at = rng.randrange(low, max(low + 1, min(high, len(result))))
        length = rng.choice((1, 1, 2, 4, 8, 30))
        kind = rng.randrange(7)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(result):
            result[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            size = rng.choice((2, 4, 8))
            result[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        elif kind == 3:
            del result[at : at + length]
        elif kind == 4:
            result[at:at] = result[at : at + length]
        elif kind == 5:
            result[at:at] = rng.randbytes(length)
        else:
            other = rng.randrange(len(result) + 1)
            result[at : at + length] = result[other : other + length]
    return bytes(result[: rng.randrange(len(result) + 1)]) if rng.random() < 0.05 else bytes(result)


def damaged_json(value: Any, rng: Random) -> Any:
    """A value somewhere in it changed, renamed, taken out or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {key: item for key, item in value.items() if key != name}
        if kind == 1:
            return {**value, rng.choice(["", "new", "__metadata__", name + name]): value[name]}
        return {**value, name: damaged_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_json(value[at], rng), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.7:
        return value + rng.choice((-8, -4, -1, 1, 4, 8)) * rng.choice((1, 1, 1, 3))
    return rng.choice(JUNK)


def damaged_pickle(data: bytes, rng: Random) -> bytes:
    """Other numbers, mostly; steps changed, taken out, doubled, exchanged; other names to import."""
    edges = [at for _, _, at in pickletools.genops(data)]
    steps = [data[a:b] for a, b in zip(edges, [*edges[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(max(1, len(steps) - 1))
        other = rng.randrange(max(1, len(steps) - 1))
        numbers = [n for n, step in enumerate(steps) if step[:1] in b"KMJh"]
        kind = rng.randrange(14)
        if kind > 6 and numbers:
            at = rng.choice(numbers)
            most = 40 if steps[at][:1] == b"h" else 13
            steps[at] = (b"h" if steps[at][:1] == b"h" else b"K") + bytes([rng.randrange(most)])
        elif kind == 0 and len(steps) > 1:
            del steps[at]
        elif kind == 1:
            steps.insert(at, steps[other])
        elif kind == 2:
            steps[at], steps[other] = steps[other], steps[at]
        elif kind == 3:
            steps[at] = b"\x8a\x09" + rng.choice(NUMBERS).to_bytes(9, "little", signed=True)
        elif kind == 4:
            steps[at] = b"J" + struct.pack("<i", rng.choice((-1, 0, 1, 2, 3, 4, 5, 2**31 - 1)))
        elif kind == 5:
            steps[at] = b"c" + rng.choice(GLOBALS) + b"\n"
        else:
            steps[at] = rng.choice(
                [b"N", b")", b"]", b"}", b"(", b"t", b"R", b"b", b"Q", b"0", b"\x85", b"\x86", b"2", b"u"]
            )
    return b"".join(steps)


# ---------------------------------------------------------------- one input of each kind


def safetensors_input(data: bytes, rng: Random) -> bytes:
    length = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        return damaged(data, rng, (0, length) if rng.random() < 0.9 else None)
    header = json.loads(data[8:length])
    for _ in range(rng.choice((1, 1, 2))):
        header = damaged_json(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[length:]


def index_input(data: bytes, rng: Random) -> bytes:
    return damaged(data, rng) if rng.random() < 0.5 else json.dumps(damaged_json(json.loads(data), rng)).encode()


def zip_input(data: bytes, rng: Random) -> bytes:
    directory = data.index(b"PK\1\2")
    headers = [info.header_offset for info in zipfile.ZipFile(io.BytesIO(data)).infolist()]
    header = rng.choice(headers)
    return damaged(
        data, rng, rng.choice([(directory, len(data)), (len(data) - 100, len(data)), (header, header + 60), None])
    )


def pickle_input(data: bytes, rng: Random) -> bytes:
    content = records(data)
    change = damaged_pickle if rng.random() < 0.8 else damaged
    content["archive/data.pkl"] = change(content["archive/data.pkl"], rng)
    if rng.random() < 0.1:
        del content[rng.choice([name for name in content if name != "archive/data.pkl"])]
    return zipped(content)


def legacy_input(data: bytes, rng: Random) -> bytes:
    stream = io.BytesIO(data)
    ends = [0]
    for _ in range(5):
        collections.deque(pickletools.genops(stream), maxlen=0)
        ends.append(stream.tell())
    if rng.random() < 0.4:
        return damaged(data, rng, (0, ends[-1] + 16) if rng.random() < 0.8 else None)
    number = rng.choice((0, 1, 2, 3, 3, 3, 3, 4))
    part = damaged_pickle(data[ends[number] : ends[number + 1]], rng)
    return data[: ends[number]] + part + data[ends[number + 1] :]


def yaml_input(data: bytes, rng: Random) -> bytes:
    return damaged(data, rng) if rng.random() < 0.3 else damaged_yaml(data, rng)


def check_safetensors(data: bytes) -> str:
    length = header_length(data[:8], "f", len(data))
    entries = parse_header(data[:length], file="f", file_number=0, size=len(data))
    theirs = dict(safetensors.deserialize(data))
    assert theirs.keys() == entries.keys()
    for key, entry in entries.items():
        assert bytes(theirs[key]["data"]) == data[entry.start : entry.stop], key
        assert tuple(theirs[key]["shape"]) == entry.shape, key
    visible_keys(assemble([File("f", len(data), "", length)], [Contents(entries)]), (), "")
    return "as the library's"


def check_index(data: bytes) -> str:
    found = parse_index(data, file="f")
    assert found == json.loads(data)["weight_map"]
    assert not any(set(name) & set('/\\:*?#%"\n') - {'"'} for name in found.values())
    return "as the library's"


def check_torch(data: bytes) -> str:
    """Against torch.load of the same records, newly zipped: a wrong checksum is not ours to see."""
    found = catalogued(data)
    ours = tensors_of(data, found)
    keys = visible_keys(assemble([File("f", len(data), "", 0)], [found.contents]), (), "")
    stored = [
        torch.frombuffer(bytearray(data[e.start : e.stop]) or bytearray(1), dtype=torch.uint8)
        for e in found.contents.entries.values()
    ]
    sources = [
        s[: e.stop - e.start].clone().view(e.dtype).view(e.shape)
        for s, e in zip(stored, found.contents.entries.values(), strict=True)
    ]
    for key, node in keys.items():
        if node.shape and 0 not in node.shape and ours[key].numel() < 4096:
            view = torch.empty(node.shape, dtype=node.dtype)
            fill(node, whole(node.shape), view, sources)
            assert same_bits(view, torch.empty_like(view).copy_(ours[key])), key
    try:
        theirs = _as_torch_loads(data)
    except Exception:  # noqa: BLE001 - whatever torch raises: then there is nothing to compare with
        return "torch refuses"
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert same_bits(_own(ours[key]), _own(tensor)), key
    return "as the library's"


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _as_torch_loads(data: bytes) -> dict[str, torch.Tensor]:
    if not data.startswith(b"\x80"):
        data = zipped(_records(data))
    with _alarm(SECONDS):
        value = torch.load(io.BytesIO(data), weights_only=True)
    for name in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(value.get(name), dict) and any(isinstance(item, torch.Tensor) for item in value[name].values()):
            value = value[name]
            break
    return {key: item for key, item in value.items() if isinstance(item, torch.Tensor)}


def _records(data: bytes) -> dict[str, bytes]:
    """Those that can be read: of others than the weights torch asks none."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            with contextlib.suppress(zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError):
                found[info.filename] = archive.read(info)
    return found


KINDS: dict[str, tuple[Callable[[bytes, Random], bytes], Callable[[bytes], str]]] = {
    "safetensors": (safetensors_input, check_safetensors),
    "index": (index_input, check_index),
    "zip": (zip_input, check_torch),
    "pickle": (pickle_input, check_torch),
    "legacy": (legacy_input, check_torch),
    "config": (index_input, check_config),
    "yaml": (yaml_input, check_yaml),
}


class HangError(BaseException):
    """An input takes too long."""


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise HangError(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(number: int, seed: int, seeds: dict[str, list[bytes]]) -> tuple[str, str]:
    """Input `number`: its kind, and how it ended. Raises what should not be."""
    rng = Random(f"{seed}/{number}")
    kind = list(KINDS)[number % len(KINDS)]
    make, check = KINDS[kind]
    data = make(rng.choice(seeds[kind]), rng)
    try:
        with _alarm(SECONDS):
            return kind, check(data)
    except LoaderError as error:
        if error.exit_code != 2:  # it is the user's to mend
            raise
        return kind, "refused"


def main() -> int:
    """Run, count, and stop at the first that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    zipfile.ZipExtFile._update_crc = lambda *_: None  # type: ignore[method-assign]
    seeds = _seeds()
    for number in range(len(KINDS) * 20):  # what is imported and cached on first use
        with contextlib.suppress(Exception):
            run(-1 - number, given.seed, seeds)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended: collections.Counter[tuple[str, str]] = collections.Counter()
    begun = time.monotonic()
    for number in range(given.first, given.first + given.inputs):
        try:
            ended[run(number, given.seed, seeds)] += 1
        except (Exception, HangError):  # noqa: BLE001 - that none comes is what is tried
            traceback.print_exc()
            print(f"input {number} of seed {given.seed} is wrong: --seed {given.seed} --first {number} --inputs 1")
            return 1
    for (kind, how), count in sorted(ended.items()):
        print(f"{kind:12} {how:20} {count:>9,}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"{given.inputs:,} inputs in {time.monotonic() - begun:.0f} s; the process grew by {grown / 2**20:.0f} MiB")
    return 0 if grown <= GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
