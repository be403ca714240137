"""Code that comes with a checkpoint: it does not run unless `model.trust_remote_code` says so, and then it does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from loader.config import Config
from loader.errors import BuilderError, ConfigError, LoaderError
from loader.exchange.control import Control
from loader.run import run
from tests.checkpoints import tiny_llama
from tests.proxy import CountingProxy
from tests.ranks import run_ranks

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path("code-ran").touch()

class MineConfig(LlamaConfig):
    model_type = "mine-of-the-tests"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_mine import MineConfig
from .helpers import doubled

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = doubled(output.logits)
        return output
"""
HELPERS = """
def doubled(logits):
    return logits * 2
"""
AUTO_MAP = {
    "AutoConfig": "configuration_mine.MineConfig",
    "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
}
TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A real Llama's, whose config names a class in the files beside it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_llama(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["MineForCausalLM"], "model_type": "mine-of-the-tests", "auto_map": AUTO_MAP}
    (directory / "config.json").write_text(json.dumps(config))
    for name, source in {"configuration_mine": CONFIGURATION, "modeling_mine": MODELING, "helpers": HELPERS}.items():
        (directory / f"{name}.py").write_text(source)
    return directory


def _run(uri: str, options: dict[str, Any], directory: str, *, trust: bool) -> tuple[bool, Any]:
    """Load in a directory of this rank's own: whether code of the checkpoint ran there, and logits or an error."""
    mine = Path(directory, str(dist.get_rank()))
    mine.mkdir(parents=True, exist_ok=True)
    os.chdir(mine)
    model = {"device": "cpu", **({"trust_remote_code": True} if trust else {})}
    output = {"entrypoint": "tests.test_remote_code:keep"}
    config = Config(source={"uri": uri, "storage_options": options}, model=model, output=output, report=None)
    try:
        with Control.of_group() as control:
            program = run(config, control, torch.device("cpu"))
        program()
    except LoaderError as error:
        return Path("code-ran").exists(), error
    with torch.no_grad():
        return Path("code-ran").exists(), (type(KEPT[0]).__name__, KEPT[0](TOKENS).logits)


KEPT: list[Any] = []


def keep(model: Any, *_: object) -> None:
    KEPT.append(model)


def _logits_of_llama(directory: Path) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(directory, attn_implementation="sdpa")(TOKENS).logits


def _run_trusting(*args: Any) -> Any:
    return _run(*args, trust=True)


def _run_by_default(*args: Any) -> Any:
    return _run(*args, trust=False)


def test_it_runs_on_every_rank_where_the_key_says_so(checkpoint, s3, tmp_path):
    uri = s3.put(checkpoint)
    with CountingProxy(s3.endpoint, listeners=1) as proxy:
        found = run_ranks(2, _run_trusting, uri, s3.at(proxy.url).storage_options, str(tmp_path))
        read = [request.path.rpartition("/")[2] for request in proxy.select(".py")]
    assert sorted(read) == ["configuration_mine.py", "helpers.py", "modeling_mine.py"]  # by one rank
    expected = 2 * _logits_of_llama(_as_llama(checkpoint, tmp_path / "llama"))
    for ran, (name, logits) in found:
        assert ran
        assert name.endswith("MineForCausalLM")
        torch.testing.assert_close(logits, expected)
    assert not list(tmp_path.rglob("*.py"))  # it was imported from memory


def _as_llama(checkpoint: Path, directory: Path) -> Path:
    shutil.copytree(checkpoint, directory, ignore=shutil.ignore_patterns("*.py"))
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    del config["auto_map"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_it_is_refused_and_not_even_read_without_the_key(checkpoint, s3, tmp_path):
    uri = s3.put(checkpoint)
    with CountingProxy(s3.endpoint) as proxy:
        found = run_ranks(2, _run_by_default, uri, s3.at(proxy.url).storage_options, str(tmp_path))
        assert proxy.select(".py") == []
    for ran, error in found:
        assert not ran
        assert isinstance(error, BuilderError)
        assert "model.trust_remote_code: true" in str(error)
        assert "MineForCausalLM, whose code is in the checkpoint" in str(error)


def test_a_class_that_transformers_has_is_transformers_own_even_where_code_is_trusted(checkpoint, tmp_path):
    directory = _as_llama(checkpoint, tmp_path / "llama")
    config = json.loads((directory / "config.json").read_text()) | {"auto_map": {"AutoModel": "evil.LlamaForCausalLM"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text("open('code-ran', 'w')")
    [(ran, (name, _))] = run_ranks(1, _run_trusting, str(directory), {}, str(tmp_path / "work"))
    assert (ran, name) == (False, "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        ({"AutoModel": "modeling_mine.Other"}, "MineForCausalLM under `architectures`, which `auto_map` has not"),
        ({"AutoModel": "elsewhere/repo--modeling_mine.MineForCausalLM"}, "code beside it was expected"),
        ({"AutoModel": "../modeling_mine.MineForCausalLM"}, "code beside it was expected"),
        ({"AutoModel": "broken.MineForCausalLM"}, "could not be imported\n"),
    ],
)
def test_code_that_is_not_there_or_fails(checkpoint, tmp_path, auto_map, message):
    directory = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = json.loads((directory / "config.json").read_text()) | {"auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "broken.py").write_text("import a_package_that_is_not_there\n")
    for _, error in run_ranks(2, _run_trusting, str(directory), {}, str(tmp_path / "work")):
        assert isinstance(error, BuilderError)
        assert message in str(error)


def test_a_builder_of_ones_own_takes_no_such_key():
    with pytest.raises(ConfigError, match=r"model.trust_remote_code: only the transformers builder runs"):
        Config(source={"uri": "x"}, model={"builder": None, "trust_remote_code": True})


@pytest.mark.parametrize("runs", [_run_by_default, _run_trusting])
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"attn_implementation": "kernels-community/x"},
            "'kernels-community/x': code of a repository, which is not run",
        ),
        ({"num_hidden_layers": 2**31}, "2147483648 layers, of a checkpoint of "),
    ],
)
def test_what_a_config_may_not_ask_for(checkpoint, tmp_path, runs, asked, words):
    directory = _as_llama(checkpoint, tmp_path / "llama")
    config = json.loads((directory / "config.json").read_text()) | asked
    (directory / "config.json").write_text(json.dumps(config))
    [(_, error)] = run_ranks(1, runs, str(directory), {}, str(tmp_path / "work"))
    assert isinstance(error, BuilderError)
    assert words in str(error)
