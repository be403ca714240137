"""The trainers of configs/ really train: on two ranks, from a real bucket, from its weights bit for bit."""

import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import loader
import tests.torchtitan_models  # noqa: F401 - without a GPU torchtitan wants its kernels replaced
from loader.init_from_hf import main
from tests.checkpoints import tiny_llama
from tests.ranks import run_ranks
from tests.torchrun import torchrun

PATIENCE = 300.0
"""Seconds that a start may take."""
pytestmark = pytest.mark.timeout(2 * PATIENCE)  # a trainer takes seconds to import, many on a machine that is busy

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
COUNT = 32
"""Tokens of a row, as each example has them."""
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 16}
TITAN = {**SIZES, "num_key_value_heads": 16, "vocab_size": 2048, "rms_norm_eps": 1e-5}
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""torchtitan's `debugmodel` of llama3."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def bucket(s3, monkeypatch):
    """S3, where this process and those that it starts look for it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return s3


def rows(vocabulary: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """What an example draws."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def hf_model(directory, dtype=torch.bfloat16):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def loss_of(model, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()


def assert_trained(told: str, losses: str, weights: str, loss: float) -> None:
    """It started from `weights` (a fingerprint, so every bit), with `loss`; its steps changed both.

    Losses are told in four digits, and sums are of another order in FSDP's kernels: 0.01 of about 6 or 8.
    """
    before, after = re.findall(r"weights (f1\w{16})", told)
    assert before == weights
    assert after != before
    first, *others = [float(found) for found in re.findall(losses, told)]
    assert abs(first - loss) < 0.01
    assert len(others) == 2
    assert all(math.isfinite(other) and other != first for other in others)


OURS = r"step \d loss ([\d.]+)"


def test_plain_fsdp_in_the_process_that_loaded(bucket, llama):
    """The command of llama-fsdp.yaml as it is, with a source of ours."""
    config = ["--config", CONFIGS / "llama-fsdp.yaml", f"source.uri={bucket.put(llama)}", "report=null"]
    done = torchrun(2, ["-m", "loader.init_from_hf", *config], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    model = hf_model(llama)
    loss = loss_of(model, rows(model.config.vocab_size, 1, COUNT))
    assert_trained(done.stdout, OURS, loader.fingerprint(model), loss)


def test_transformers_own_trainer(bucket, llama, tmp_path):
    config = ["--config", CONFIGS / "llama-fsdp.yaml", f"source.uri={bucket.put(llama)}", "report=null"]
    entrypoint = "output.entrypoint=configs.train_transformers:main"
    done = torchrun(2, ["-m", "loader.init_from_hf", *config, entrypoint], cwd=tmp_path, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    model = hf_model(llama)
    first = rows(model.config.vocab_size, 3 * 2, COUNT)[:2]  # a row for each rank
    assert_trained(done.stdout, r"'loss': '([\d.]+)'", loader.fingerprint(model), loss_of(model, first))


def test_olmo_cores_own_trainer(bucket, llama, tmp_path):
    from olmo_core.nn.hf.checkpoint import load_hf_model

    from configs.trainers import olmo_core_config

    model = hf_model(llama, torch.float32)
    tokens = rows(model.config.vocab_size, 1, COUNT)
    np.tile(tokens.numpy().astype(np.uint16), 64).tofile(tmp_path / "tokens.npy")  # in whatever order, it is this row
    script = [CONFIGS / "train_olmo_core.py", bucket.put(llama), tmp_path / "tokens.npy", tmp_path / "run"]
    done = torchrun(2, script, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    theirs = olmo_core_config(model.config).build(init_device="cpu")
    state = theirs.state_dict()
    load_hf_model(llama, state)
    theirs.load_state_dict(state)
    assert_trained(
        done.stdout + done.stderr, r"train/CE loss=([\d.]+)", loader.fingerprint(theirs), loss_of(model, tokens)
    )


def convert(uri: str, checkpoint: str) -> int:
    overrides = [f"source.uri={uri}", f"output.checkpoint={checkpoint}", "report=null"]
    return main(["--config", str(CONFIGS / "torchtitan-dcp.yaml"), *overrides])


def test_torchtitans_own_trainer(bucket, tmp_path):
    from torchtitan.models.llama3 import model_registry

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **ROPE}
    llama = tiny_llama(tmp_path / "llama", **TITAN, max_position_embeddings=131072, rope_parameters=rope)
    checkpoint = bucket.prefix()
    assert run_ranks(2, convert, bucket.put(llama), checkpoint, init=False, timeout=PATIENCE) == [0, 0]
    script = [CONFIGS / "train_torchtitan.py", "debugmodel", checkpoint, tmp_path / "run"]
    done = torchrun(2, [ROOT / "tests/torchtitan_on_cpu.py", *script], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr

    spec = model_registry("debugmodel")
    theirs = spec.model.build()
    model = hf_model(llama, torch.float32)
    theirs.load_state_dict(spec.state_dict_adapter(spec.model, None).from_hf(model.state_dict()))
    both = [loss_of(model, rows(model.config.vocab_size, 1, COUNT + 1, seed=rank)) for rank in range(2)]
    told = re.sub(r"\x1b\[[\d;]*m", "", done.stderr + done.stdout)
    told = "\n".join(dict.fromkeys(re.findall(r"weights .*|step: .*loss: +[\d.]+", told)))  # all ranks log alike
    assert_trained(told, r"loss: +([\d.]+)", loader.fingerprint(theirs), sum(both) / 2)


# ---------------------------------------------------------------- plain FSDP2 again, in ranks that are there already


def run_script(name: str, *arguments: str) -> None:
    """As torchrun runs it in a rank."""
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(CONFIGS))
    runpy.run_path(str(CONFIGS / name), run_name="__main__")


def load_local(uri: str, directory: str) -> int:
    overrides = [f"source.uri={uri}", f"output.local={directory}", "report=null"]
    return main(["--config", str(CONFIGS / "llama-local.yaml"), *overrides])


@pytest.mark.parametrize("name", ["train_local.py", "train_dcp.py"])
def test_plain_fsdp_in_a_process_of_its_own(name, bucket, llama, tmp_path):
    """Over files of the node, and through `dcp.load` with our reader."""
    given, init = bucket.put(llama), tmp_path / "init"
    if name == "train_local.py":
        assert run_ranks(2, load_local, given, str(init), init=False, timeout=PATIENCE) == [0, 0]
        given = str(init)
    done = run_ranks(2, run_script, name, given, init=False, outcomes=True, timeout=PATIENCE)
    assert [outcome.error for outcome in done] == [None, None], done
    model = hf_model(llama)
    loss = loss_of(model, rows(model.config.vocab_size, 1, COUNT))
    assert_trained(done[0].output, OURS, loader.fingerprint(model), loss)
    assert not init.exists()  # as the trainer asked
