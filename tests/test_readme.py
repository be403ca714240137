"""README holds: its commands run, its examples do what they say, its configs are configs, its links lead somewhere.

A block that nobody runs fails here: each is run as it stands, or named below with what else runs it, and why.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

import loader
from launch.make import FILES
from loader.config import Config, parse
from loader.init_from_hf import _parser, main
from loader.report import Report
from loader.store import schemes
from tests.checkpoints import same_bits, tiny_llama
from tests.documents import anchors, commands, commented, links, paths
from tests.processes import ROOT, kill_tree, python_path
from tests.ranks import run_ranks
from tests.readme_examples import BLOCKS, EXAMPLES, URI, example, wrong
from tests.shards import write_file

README = (ROOT / "README.md").read_text()

AS_HERE = {
    "--nproc-per-node 8": "--nproc-per-node 2",  # eight processes would take two cores a minute; -1 in the mesh fills
}
"""What is put in another's place, in every command."""

SHORTER = {
    "python tests/benchmarks/slow_bucket.py": "--size=8MiB --repeats=1",
    "python tests/benchmarks/clients.py": "--size=8MiB --range=1MiB --repeats=1",
    "python tests/benchmarks/plan_scale.py": "--ranks 8 --mesh fsdp --layers 4",
    "python tests/benchmarks/convert_scale.py": "--ranks 8 --layers 4",
    "python tests/benchmarks/dry_run_scale.py": "--ranks 8 --mesh fsdp --layers 1",
}
"""Benchmarks take minutes: what is put behind them."""


class Elsewhere(NamedTuple):
    """Who runs it: a file or folder, and words in there that do; and why it is not run here."""

    place: str
    words: str
    why: str


OF_A_MODEL = "tests/convert/test_olmo_core.py"
ELSEWHERE = {
    "launch/quickstart.sh": Elsewhere("launch/test.sh", "step launch/quickstart.sh", "it makes the .venv we are in"),
    "launch/test.sh": Elsewhere(".ci/run", "../launch/test.sh", "it runs this test"),
    "torchrun --nproc-per-node 8 -m loader.init_from_hf --config configs/llama-local.yaml": Elsewhere(
        "tests/configs", '/ "llama-local.yaml"', "with a directory of its own: /dev/shm/init is everybody's"
    ),
    "torchrun --nproc-per-node 8 configs/train_local.py": Elsewhere(
        "tests/configs", '"train_local.py"', "it takes over what that left"
    ),
    "python tests/fuzz.py": Elsewhere("tests/test_fuzz.py", '"--inputs", "4000"', "it is run there, for less long"),
    "python tests/soak.py": Elsewhere("tests/test_soak.py", "soak(6, 1, tmp_path)", "it is run there, for less long"),
    "python tests/benchmarks/peers.py": Elsewhere(
        "tests/benchmarks/test_peers.py", '"tests/benchmarks/peers.py", "--size=8MiB"', "it is run there, with less"
    ),
    "python tests/benchmarks/budgets.py": Elsewhere(
        "tests/benchmarks/test_budgets.py", '"tests/benchmarks/budgets.py", "--budget"', "it is run there, with less"
    ),
    "python tests/benchmarks/lab.py": Elsewhere(
        "tests/benchmarks/test_lab.py", '"tests/benchmarks/lab.py", "--scenario=hsdp2"', "it is run there, with less"
    ),
    "def phi3": Elsewhere(OF_A_MODEL, "def test_the_readmes_family_is_right", "there, by README's lines"),
    "docker build": Elsewhere("tests/docker/test_dockerfile.py", "image.build()", "there is no engine here"),
    "docker run": Elsewhere("tests/docker/test_dockerfile.py", 'image.config["ENTRYPOINT"]', "there is no engine here"),
}
"""By the words that a command or a block of Python begins with."""


def elsewhere(text: str) -> Elsewhere | None:
    return next((found for words, found in ELSEWHERE.items() if text.startswith(words)), None)


# ---------------------------------------------------------------- a newcomer's directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def environ(s3, checkpoint):
    """Of someone who has credentials, and whose bucket is on this machine: README's own URIs lead there."""
    for uri in {*re.findall(r"s3://[\w./-]+", README)}:
        s3.put(checkpoint, uri)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    torchrun = {
        "PET_STANDALONE": "1",
        "PET_LOCAL_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **s3.environment, **torchrun, "PATH": path, "PYTHONPATH": python_path()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkout, with README's files in it, and a directory of Llama 3 8B's shape whose weights are holes."""
    directory = tmp_path_factory.mktemp("home")
    for name in ("configs", "launch", "loader", "tests"):
        (directory / name).symlink_to(ROOT / name)
    for block in BLOCKS:
        if block.file:
            (directory / block.file).write_text(block.text)
    write_llama_3_8b(directory / "llama-3-8b")
    return directory


def write_llama_3_8b(directory: Path) -> None:
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(**sizes, **heads, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        tensors = list(transformers.LlamaForCausalLM(config).bfloat16().state_dict().items())
    config.save_pretrained(directory)
    files: list[dict[str, torch.Tensor]] = [{}]
    for key, tensor in tensors:
        if sum(each.nbytes for each in files[-1].values()) + tensor.nbytes > 5e9:  # as it was published
            files.append({})
        files[-1][key] = tensor
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    for name, held in zip(names, files, strict=True):
        write_file(directory / name, held)
    weight_map = {key: name for name, held in zip(names, files, strict=True) for key in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# ---------------------------------------------------------------- commands

COMMANDS = [command for block in BLOCKS if block.language in {"bash", "console"} for command in commands(block)]


def shape(line: str) -> str:
    """A line of the report without what differs from one load to the next."""
    line = re.sub(r"rank \d+ on [\w.-]+", "rank # on #", line)
    line = re.sub(r"^(bound by  )\w+", r"\1#", line)
    line = re.sub(r"dp_shard \d+ x tp \d+ \(\d+ ranks\)", "#", line)
    return re.sub(r"[\d.,]*\d( ([kMGT]i?B|Bytes?))?", "#", line)


def run(words: str, home: Path, environ: Mapping[str, str]) -> tuple[str, str]:
    """What it prints, on stdout and stderr."""
    process = subprocess.Popen(
        ["bash", "-euc", words], cwd=home, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, err = process.communicate()
    finally:
        kill_tree(process.pid)
    assert process.returncode == 0, f"{words}\n{out}{err}"
    return out, err


@pytest.mark.timeout(1200)
def test_every_command_runs(home, environ):
    """In README's order, in one directory, for one makes what another one reads."""
    for command in COMMANDS:
        if elsewhere(command.words):
            continue
        words = command.words
        for theirs, ours in AS_HERE.items():
            words = words.replace(theirs, ours)
        more = next((more for begins, more in SHORTER.items() if words.startswith(begins)), "")
        out, err = run(f"{words} {more}", home, environ)
        if "--dry-run" in words:
            assert out == command.output
        elif command.output is not None:
            printed = {shape(line) for line in (out + err).splitlines()}
            told = [shape(line) for line in command.output.splitlines()]
            assert [line for line in told if line not in printed] == []
    assert "<svg" in (home / "report.html").read_text()
    for form, files in FILES.items():
        assert {path.name for path in (home / form).iterdir()} == {*files}


@pytest.mark.timeout(400)
def test_the_counts_of_the_first_screen_are_those_of_that_load(home, monkeypatch):
    """What a dry run foresees is what the load counts (`tests/test_dry_run.py`): here for all eight ranks."""
    monkeypatch.chdir(home)
    arguments = ["--config", "cfg.yaml", "--dry-run", "--world-size=8", "source.uri=llama-3-8b", "report=eight.json"]
    assert run_ranks(1, main, arguments, init=False, timeout=300) == [0]
    report = Report.model_validate_json(Path("eight.json").read_bytes())
    foreseen = report.model_copy(update={"predicted": None}).table().replace(" llama-3-8b", f" {URI}").splitlines()
    assert COMMANDS[0].output is not None
    assert set(foreseen[:2]) <= set(COMMANDS[0].output.splitlines())


# ---------------------------------------------------------------- examples in Python


@pytest.mark.parametrize("begins", EXAMPLES)
def test_an_example_does_what_it_says(begins, s3, environ, checkpoint, tmp_path):
    text = example(begins).text.replace("/dev/shm/init", f"{tmp_path}/init")
    if begins == "loader.attach(":
        init = ["--config", str(ROOT / "configs/llama-local.yaml"), f"output.local={tmp_path}/init", "report=null"]
        assert run_ranks(2, main, init, init=False, env=s3.environment) == [0, 0]
    assert run_ranks(2, EXAMPLES[begins], text, checkpoint, env=s3.environment) == [[], []]


def test_the_sink_writes_every_ranks_shards(home, s3, environ, checkpoint, monkeypatch):
    monkeypatch.chdir(home)
    arguments = ["--config", "cfg.yaml", "mesh={dp_shard: -1}", "output.entrypoint=sink:main", "report=null"]
    assert run_ranks(2, main, arguments, init=False, env=s3.environment) == [0, 0]
    name = "model.layers.0.mlp.down_proj.weight"
    shards = [load_file(f"rank-{rank}.safetensors")[name] for rank in range(2)]
    assert same_bits(
        torch.cat(shards), transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()[name]
    )


def test_the_scheme_is_one(home, checkpoint, monkeypatch):
    spec = importlib.util.spec_from_file_location("loader.store.schemes.mine", home / "mine.py")
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[spec.name])
    monkeypatch.setitem(schemes.MODULES, "mine", "mine")
    expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    found = {fqn: torch.empty_like(tensor) for fqn, tensor in expected.items()}
    loader.load(found, f"mine://{checkpoint}")
    assert wrong(found, checkpoint) == []


# ---------------------------------------------------------------- nothing is left out


def test_every_block_is_run_or_named_with_what_runs_it():
    assert {block.language for block in BLOCKS} == {"yaml", "console", "bash", "python", "text"}
    for block in BLOCKS:
        if block.language == "python" and not block.file:
            known = elsewhere(block.text) or any(map(block.text.startswith, EXAMPLES))
            assert known, f"README.md:{block.line}: nobody runs it: name it in EXAMPLES, or in ELSEWHERE"
        if block.language == "text":  # what something prints, or a tree
            assert not re.search(r"^(\$ )?(python|torchrun|pip|launch/)", block.text, re.MULTILINE)
    files = {block.file for block in BLOCKS if block.file}
    assert files == {"cfg.yaml", "train.py", "sink.py", "mine.py"}, "each file is used by a command or a test here"


def test_what_is_named_does_run_it():
    texts = [command.words for command in COMMANDS] + [block.text for block in BLOCKS if block.language == "python"]
    texts += commented((ROOT / "docker/Dockerfile").read_text())
    for words, found in ELSEWHERE.items():
        assert any(text.startswith(words) for text in texts), f"README does not show it any longer: {words}"
        place = ROOT / found.place
        files = [place] if place.is_file() else place.glob("*.py")
        assert any(found.words in file.read_text() for file in files), found
    shown = [command.words for command in COMMANDS]
    for words in (*SHORTER, *AS_HERE):
        assert any(words in each for each in shown), f"README does not show it any longer: {words}"


def test_every_benchmark_is_shown():
    shown = {word for command in COMMANDS for word in command.words.split()}
    benchmarks = [path.relative_to(ROOT) for path in (ROOT / "tests/benchmarks").glob("*.py")]
    assert {str(path) for path in benchmarks if "\nif __name__ ==" in (ROOT / path).read_text()} <= shown


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: f"line {block.line}"
)
def test_every_yaml_is_a_config(block, tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text(block.text)
    assert isinstance(parse(str(path), [] if "source:" in block.text else [f"source.uri={URI}"]), Config)


COMMENTED = [
    (path.relative_to(ROOT), command)
    for path in [*(ROOT / "configs").iterdir(), ROOT / "docker/Dockerfile"]
    if path.is_file()
    for command in commented(path.read_text())
]


@pytest.mark.parametrize(("path", "command"), COMMENTED)
def test_commands_in_comments_are_taken_by_torchrun_and_the_loader(path, command):
    """Each config is loaded in tests/configs; here the command that its comment shows is read, by who would read it."""
    if elsewhere(command):
        return
    program, *words = shlex.split(command)
    assert program == "torchrun", f"{path}: who runs {command}?"
    given = get_args_parser().parse_args(words)
    if not given.module:
        assert (ROOT / given.training_script).exists()
        return
    assert given.training_script == "loader.init_from_hf"
    ours = _parser().parse_intermixed_args(given.training_script_args)
    assert Path(ours.config) == path
    assert isinstance(parse(str(ROOT / ours.config), ours.overrides), Config)


def test_links_lead_somewhere():
    there, outside = anchors(README), []
    for link in links(README):
        path, _, anchor = link.partition("#")
        if "://" in path:
            outside.append(path)
        elif path:
            assert (ROOT / path).exists(), link
        else:
            assert anchor in there, link
    assert all(each.startswith("https://") for each in outside)
    for path in paths(README):
        assert (ROOT / path).exists(), path
