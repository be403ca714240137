"""What the user must mend: told on every rank as one error, before a weight is read, and with nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from ruamel.yaml import YAML
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

import loader
from loader.errors import LoaderError
from loader.exchange import watch
from tests.checkpoints import random_checkpoint
from tests.endings import SOON, Ending, Giving, took
from tests.proxy import CountingProxy
from tests.ranks import run_ranks
from tests.torchrun import TWO_HOSTS, torchrun

PAIR, RANKS = 2, 3  # for many cases in one world, and for one in each
pytestmark = pytest.mark.timeout(300)
TENSORS = {
    "a.weight": (torch.float32, (300, 70)),
    "b.weight": (torch.float32, (90, 300)),
    "b.bias": (torch.int16, (9,)),
}
SHAPES = {key: shape for key, (_, shape) in TENSORS.items()}
SECRET = "hidden-where-nobody-looks"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A load that must fail. `odd` gives some ranks other shapes; `env` is set meanwhile, or where None, taken away."""

    error: str
    says: Sequence[str]
    at: str = "good"
    shapes: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=lambda: SHAPES)
    odd: Mapping[int, Mapping[str, Sequence[int]]] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    rank: int | None = None


def _options(**options: Any) -> dict[str, Any]:
    return {"arguments": {"storage_options": options}}


NOBODY = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
WRONG = {"AWS_SECRET_ACCESS_KEY": SECRET}

CASES = {
    "bucket": Case("CatalogError", ["s3://no-such-bucket/x", "no such", "bucket"], at="s3://no-such-bucket/x"),
    "bucket's name": Case("CatalogError", ["s3://B!/x", "Invalid bucket name"], at="s3://B!/x"),
    "prefix": Case("CatalogError", ["no such directory, bucket or prefix"], at="nowhere"),
    "file": Case("CatalogError", ["no file other.safetensors", f"there are {FIRST}"], at="good/other.safetensors"),
    "no weights": Case("CatalogError", ["no checkpoint here", "There are: README.md"], at="empty"),
    "scheme": Case("CatalogError", ["nonsense", "cannot be opened"], at="nonsense://x/y"),
    "nobody": Case("CatalogError", ["no usable credentials", "instance role"], env=NOBODY),
    "anonymous": Case("CatalogError", ["AccessDenied", "credentials"], **_options(anon=True)),
    "wrong secret": Case("CatalogError", ["SignatureDoesNotMatch", "credentials"], env=WRONG),
    "wrong secret given": Case("CatalogError", ["SignatureDoesNotMatch"], **_options(key="loader-key", secret=SECRET)),
    "wrong key": Case("CatalogError", ["InvalidAccessKeyId"], **_options(key=SECRET, secret=SECRET)),
    "half of the credentials": Case("CatalogError", ["Partial credentials"], **_options(key=SECRET)),
    "profile": Case("CatalogError", ["profile (nobodys)"], **_options(profile="nobodys")),
    "unknown option": Case("CatalogError", ["'secrett'"], **_options(secrett=SECRET)),
    "file that the index names": Case("CatalogError", [INDEX, SECOND, "not there", FIRST], at="no_second"),
    "key that the index names": Case("CatalogError", [INDEX, "'c.weight'", "no file holds it"], at="no_key"),
    "key that the index lacks": Case("CatalogError", ["'b.bias'", INDEX, "does not name"], at="more_keys"),
    "index that is no JSON": Case("CatalogError", [INDEX, "JSON"], at="torn_index"),
    "numbered file": Case("CatalogError", ["1 of 2 files", SECOND], at="no_second_no_index"),
    "parameter without a source": Case(
        "CoverageError", ["c.weight [5, 3] has no source", "nearest", "a.weight"], shapes={**SHAPES, "c.weight": (5, 3)}
    ),
    "parameter of one rank": Case(
        "CoverageError", ["extra [2]"], odd={1: {**SHAPES, "extra": (2,)}}, rank=1
    ),
    "key without a target": Case(
        "CoverageError", ["1 checkpoint keys have no target: b.bias", "source.ignore"],
        shapes={key: shape for key, shape in SHAPES.items() if key != "b.bias"},
    ),
    "shape": Case(
        "CoverageError", ["a.weight", "[300, 71]", "[300, 70]"], shapes={**SHAPES, "a.weight": (300, 71)}
    ),
    "shape on one rank": Case("CoverageError", ["[8]", "[9]"], odd={1: {**SHAPES, "b.bias": (8,)}}, rank=1),
    "unknown argument": Case("ConfigError", ["rangesize", "range_size"], arguments={"rangesize": "1MiB"}),
    "bad value": Case("ConfigError", ["share", "world"], arguments={"share": "galaxy"}),
    "conversion": Case("ConfigError", ["nowhere"], arguments={"convert": "nowhere:at_all"}),
}  # fmt: skip

PATHS = ["../x.safetensors", "/etc/passwd", "s3://other/x.safetensors", "a/b.safetensors", "..", "x.safetensors?sig=1"]
CASES |= {
    f"weight_map {path}": Case("CatalogError", [INDEX, repr(path), "plain name"], at=f"path{n}")
    for n, path in enumerate(PATHS)
}

Header = dict[str, Any]


def _lie(**changes: Any) -> Callable[[Header], None]:
    return lambda header: header["a.weight"].update(changes)


SIZE = 300 * 70 * 4
LIES: dict[str, tuple[Callable[[Header], Any] | None, Callable[[bytes], bytes], str]] = {
    "shape": (_lie(shape=[300, 71]), bytes, "takes 85200 bytes"),
    "hole": (_lie(data_offsets=[4, SIZE + 4]), bytes, "should begin at byte"),
    "dtype": (_lie(dtype="F33"), bytes, "unknown dtype 'F33'"),
    "more": (_lie(extra=1), bytes, "nothing else"),
    "overflow": (_lie(shape=[2**62, 8]), bytes, "overflows"),
    "trailing": (None, lambda data: data + b"more", "after its last tensor"),
    "short": (None, lambda data: data[:-1], "is cut short"),
    "long_header": (None, lambda data: struct.pack("<Q", 1 << 40) + data[8:], "stand for a header of"),
    "twice": (
        None,
        lambda data: data.replace(b'"b.bias"', b'"a.bias"').replace(b'"a.bias"', b'"b.weight"'[:8]),
        "JSON",
    ),
    "pointer": (
        None,
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "Git LFS pointer",
    ),
    "empty": (None, lambda _: b"", "not a safetensors file"),
}
CASES |= {
    f"header: {name}": Case("CatalogError", ["model.safetensors", says], at=f"lie_{name}")
    for name, (*_, says) in LIES.items()
}


def _write_all(root: Path) -> None:
    """Every broken checkpoint, in a directory of its own."""
    one = root / "one"
    random_checkpoint(one, TENSORS)
    for name in ["good", "no_second", "no_key", "more_keys", "torn_index", "no_second_no_index"]:
        random_checkpoint(root / name, TENSORS, files=2)
    (root / "empty").mkdir()
    (root / "empty/README.md").write_text("soon")
    (root / "no_second" / SECOND).unlink()
    (root / "no_second_no_index" / SECOND).unlink()
    (root / "no_second_no_index" / INDEX).unlink()
    (root / "torn_index" / INDEX).write_text((root / "good" / INDEX).read_text()[:-9])
    _change_index(root / "no_key", lambda files: files.update({"c.weight": FIRST}))
    _change_index(root / "more_keys", lambda files: files.pop("b.bias"))
    for n, path in enumerate(PATHS):
        (root / f"path{n}").mkdir()
        (root / f"path{n}" / INDEX).write_text(json.dumps({"weight_map": {"a.weight": path}}))
    whole = (one / "model.safetensors").read_bytes()
    for name, (change, spoil, _) in LIES.items():
        (root / f"lie_{name}").mkdir()
        (root / f"lie_{name}" / "model.safetensors").write_bytes(spoil(_with_header(whole, change)))


def _change_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    content = json.loads((directory / INDEX).read_text())
    change(content["weight_map"])
    (directory / INDEX).write_text(json.dumps(content))


def _with_header(data: bytes, change: Callable[[Header], Any] | None) -> bytes:
    if change is None:
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def _suffer(root: str, endpoints: Sequence[str]) -> dict[str, tuple[str, str, int | None, Ending]]:
    """Each case's error as this rank sees it; after each, the group must work as before."""
    told = {}
    rank = dist.get_rank()
    watch.BEAT = 0.05  # there are many cases
    mesh = init_device_mesh("cpu", (PAIR,))
    for name, case in CASES.items():
        shapes = case.odd.get(rank, case.shapes)
        dtypes = {key: dtype for key, (dtype, _) in TENSORS.items()}
        target = {
            key: zeros(*shape, dtype=dtypes.get(key, torch.float32), device_mesh=mesh, placements=[Shard(0)])
            for key, shape in shapes.items()
        }
        uri = case.at if "://" in case.at else f"{root}/{case.at}"
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in {"AWS_ENDPOINT_URL": endpoints[rank], **case.env}.items():
                patch.setenv(variable, value) if value is not None else patch.delenv(variable)
            giving = Giving(patch)
            try:
                loader.load(target, uri, **{"retries": 1, **case.arguments})
            except LoaderError as error:
                told[name] = (type(error).__name__, str(error), error.rank, giving.end())
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == PAIR
        assert not any(shard.to_local().any() for shard in target.values()), name
    return told


@pytest.fixture(scope="module")
def suffered(s3, tmp_path_factory):
    """What every rank told of every case, with their output; and what the server was asked for meanwhile."""
    root = tmp_path_factory.mktemp("broken")
    _write_all(root)
    uri = s3.put(root)
    env = s3.environment | {"AWS_EC2_METADATA_DISABLED": "true"}
    with CountingProxy(s3.endpoint, listeners=PAIR) as proxy:
        endpoints = [proxy.url_for(rank) for rank in range(PAIR)]
        outcomes = run_ranks(PAIR, _suffer, uri, endpoints, env=env, outcomes=True)
        assert [outcome.report for outcome in outcomes] == [""] * PAIR
        return outcomes, list(proxy.requests), s3.secret


@pytest.mark.parametrize("name", CASES)
def test_each_case_is_told_alike_on_every_rank(suffered, name):
    case = CASES[name]
    told = [outcome.value.get(name) for outcome in suffered[0]]
    assert None not in told
    assert {(kind, message, rank) for kind, message, rank, _ in told} == {told[0][:3]}
    kind, message, rank, _ = told[0]
    assert kind == case.error
    for words in case.says:
        assert words in message
    assert rank == case.rank or case.rank is None
    assert took(ending for *_, ending in told) < SOON


def test_only_rank_0_looked_and_only_at_headers(suffered):
    _, requests, _ = suffered
    reads = [request for request in requests if request.method == "GET" and ".safetensors" in request.path]
    reads = [request for request in reads if not request.path.endswith(".json")]
    assert reads
    assert {request.rank for request in reads} == {0}
    assert all(re.fullmatch(r"bytes=0-\d+", request.range) for request in reads)
    assert max(int(request.range.partition("-")[2]) for request in reads) < 64 * 1024


def test_no_secret_is_told(suffered):
    outcomes, _, secret = suffered
    for outcome in outcomes:
        said = outcome.output + json.dumps(outcome.value)
        assert SECRET not in said
        assert secret not in said


# The command


def _main(arguments: Sequence[str]) -> int:
    from loader.init_from_hf import main

    return main(arguments)


def _config(directory: Path, **sections: Any) -> str:
    path = directory / "cfg.yaml"
    YAML().dump({"mesh": {"dp_shard": -1}, "report": None, **sections}, path)
    return str(path)


def _builder_that_raises(_config: Any, _mesh: Any) -> None:
    raise RuntimeError("not today")


PROGRAM = (
    "import os\nif os.environ['RANK'] == '1':\n    raise ImportError('only here')\ndef run(model, mesh, report): pass\n"
)
HERE = "tests.test_bad_input"
RULES = [{"match": "*", "shard": {"dp_shard": 0}}]

COMMANDS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "unknown key": ({"read": {"range_sise": 9}}, [], ["ConfigError", "cfg.yaml:", "read.range_sise", "'range_size'"]),
    "unknown override": ({}, ["read.shares=node"], ["ConfigError", "override 'read.shares=node'", "'share'"]),
    "mesh": ({"mesh": {"dp_shard": 2, "tp": 2}}, [], ["ConfigError", "multiply to 4", "world size is 3"]),
    "prefix": ({"source": {"uri": "nowhere"}}, [], ["CatalogError", "nowhere", "no such directory"]),
    "dim": ({"placements": [{"match": "b.bias", "shard": {"dp_shard": 1}}]}, [], ["ConfigError", "b.bias", "dim"]),
    "builder": ({"model": {"builder": f"{HERE}:_builder_that_raises"}}, [], ["BuilderError", "not today"]),
    "no builder": ({"model": {"builder": "nowhere_at_all:build"}}, [], ["ConfigError", "nowhere_at_all"]),
    "config.json": ({"model": {"builder": "transformers"}}, [], ["CatalogError", "no config.json", "model.builder"]),
    "entrypoint": ({"output": {"entrypoint": "nowhere_at_all:run"}}, [], ["ConfigError", "nowhere_at_all"]),
    "report": ({"report": "program.py/report.json"}, [], ["ConfigError", "report: nothing can be written at"]),
    "trace": ({}, ["trace=."], ["ConfigError", "trace: nothing can be written at .: it is a directory"]),
    "entrypoint of one rank": ({"output": {"entrypoint": "program:run"}}, [], ["ConfigError", "program:run"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_ends_every_rank_with_2_and_leaves_nothing(tmp_path, monkeypatch, name):
    sections, overrides, says = COMMANDS[name]
    random_checkpoint(tmp_path / "good", TENSORS)
    (tmp_path / "good/config.json").write_text(json.dumps({"model_type": "llama"}))
    if name == "config.json":
        (tmp_path / "good/config.json").unlink()
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    base = {"source": {"uri": "good"}, "model": {"builder": None}}
    base |= {} if "model" in sections else {"placements": RULES}
    sections = {**base, **sections, "output": {**sections.get("output", {}), "checkpoint": str(tmp_path / "out")}}
    outcomes = run_ranks(
        RANKS, _main, ["--config", _config(tmp_path, **sections), *overrides], init=False, outcomes=True
    )
    for rank, outcome in enumerate(outcomes):
        assert outcome.report == "died: exit code 2", outcome
        last = outcome.output[outcome.output.rindex(f"rank {rank}: {says[0]}: ") :]
        assert all(words in last for words in says), last
        assert "Traceback" not in outcome.output[: outcome.output.index(last)]
    assert not (tmp_path / "out").exists()


def test_under_torchrun_two_agents_end_alike_and_a_bucket_is_left_as_it_was(s3, tmp_path):
    random_checkpoint(tmp_path / "good", TENSORS)
    uri, out = s3.put(tmp_path / "good"), s3.prefix()
    config = _config(
        tmp_path,
        source={"uri": uri, "ignore": ["a.*"]},
        model={"builder": f"{HERE}:one_too_few"},
        output={"checkpoint": out},
    )
    (tmp_path / "good/config.json").write_text("{}")
    s3.put(tmp_path / "good", uri)
    finished = torchrun(1, ["-m", "loader.init_from_hf", "--config", config], hosts=TWO_HOSTS, env=s3.environment)
    assert finished.returncode == 1
    assert set(re.findall(r"exitcode\s*: (-?\d+)", finished.stderr)) == {"2"}
    for rank in (0, 1):
        assert f"rank {rank}: CoverageError: " in finished.stderr
    # In torchrun's own summary too, which stands last in a terminal.
    assert len(re.findall(r"traceback : rank \d: CoverageError: .*b\.bias", finished.stderr)) == 2
    fs = fsspec.filesystem("s3", **s3.storage_options, skip_instance_cache=True)
    assert set(fs.find(out)) <= {out.removeprefix("s3://")}  # SeaweedFS keeps the prefix


def one_too_few(_config: Any, _mesh: Any) -> torch.nn.Module:
    """The checkpoint's `b.weight`, but not its `b.bias`."""
    module = torch.nn.Module()
    module.b = torch.nn.Module()
    module.b.weight = torch.nn.Parameter(torch.empty(90, 300, device="meta"))
    return module
