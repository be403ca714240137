"""Damaged and hostile `config.json` and YAML, for tests/fuzz.py."""

from __future__ import annotations

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from loader.config import parse
from loader.convert.conversion import visible_keys
from loader.convert.graph import Node
from loader.convert.quantised import dequantise, dtype_of, quantisation, unquantised
from loader.formats.hf_config import parse_config, vocab_size
from loader.formats.layout import assemble
from loader.formats.safetensors import header_length, parse_header
from loader.place.transformers_builder import config_of, model_class
from loader.plan.catalog import Contents, File

transformers.logging.set_verbosity_error()  # it warns of each

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32, "dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}, "attn_implementation": "sdpa",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "eos_token_id": [1, 2],
}  # fmt: skip
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": 8, "block_structure": None}
QUANTISED: list[dict[str, Any]] = [
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "dynamic"}},
    {
        "compression_config": {
            "format": "float-quantized", "kv_cache_scheme": None,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": FLOAT8}},
        }
    },
    {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["head"]}},
]  # fmt: skip
TOWER = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": PLAIN}
CONFIGS = [json.dumps(PLAIN | more).encode() for more in ({}, *QUANTISED, {**TOWER, "vocab_size": None})]

SETTINGS = b"""\
source: {uri: s3://models/llama, storage_options: &options {anon: true}}
model:
  builder: null
  dtype: bfloat16
mesh: {dp_shard: -1, tp: 1}
placements:
  - {match: "*.weight", shard: {dp_shard: 0}}
read: {memory_budget: 512MiB, timeout: 30s}
verify: fingerprint
"""


@cache
def _keys() -> dict[str, Node]:
    """Of a checkpoint that any of these may be of."""
    weight = torch.arange(96, dtype=torch.uint8).view(torch.float8_e4m3fn).view(6, 16)
    data = safetensors.torch.save({
        "a.weight": weight, "a.weight_scale_inv": torch.ones(2, 2), "a.weight_scale": torch.ones(6, 2),
        "m_blocks": torch.zeros(2, 3, 1, 16, dtype=torch.uint8), "m_scales": torch.zeros(2, 3, 1, dtype=torch.uint8),
        "head": torch.ones(2, 3),
    })  # fmt: skip
    length = header_length(data[:8], "f", len(data))
    entries = parse_header(data[:length], file="f", file_number=0, size=len(data))
    return visible_keys(assemble([File("f", len(data), "", length)], [Contents(entries)]), (), "")


def check_config(data: bytes) -> str:
    """Whatever the loader makes of a `config.json`."""
    fields = parse_config(data, file="config.json")
    assert fields == json.loads(data)
    keys, quantised = _keys(), quantisation(fields)
    if quantised:
        keys = dequantise(keys, quantised)
    for node in keys.values():
        assert isinstance(dtype_of(node, fields), torch.dtype)
    assert isinstance(vocab_size(fields), int | None)
    model_class(config_of(unquantised(fields)))
    return "as the library's"


def check_yaml(data: bytes) -> str:
    """The file is data, or refused."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(data)
        parse(file.name)
    return "as the library's"


def damaged_yaml(data: bytes, rng: random.Random) -> bytes:
    """Here and there a tag, an alias, an anchor, or what only YAML reads as a number."""
    lines = data.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        name, colon, rest = lines[at].partition(b": ")
        lines[at] = rng.choice([
            name + colon + rng.choice(YAML_JUNK) + b"\n", lines[at] * 2, b"", b"  " + lines[at], b"- " + lines[at],
            name + colon + b"[" * rng.choice((3, 400)) + rest,
        ])  # fmt: skip
    return b"".join(lines)


YAML_JUNK = [
    b"!!python/object/apply:os.system [exit]", b"!!python/name:os.system", b"!mine 3", b"!!binary aGk=",
    b"!!set {a, b}", b"*options", b"*nobody", b"&a [*a]", b"&a {<<: *a}", b"{<<: [*options, *options]}", b"{? [a]: b}",
    b"{1: 2}", b"{a: 1, a: 2}",
    b"2001-01-01", b"0o17", b"1_000", b"12:30:45", b".inf", b".nan", b"1e400", b"9" * 5000, b"~",
    b"'\\ud800'", b'"\\ud800"', b"\xff", b"|", b"%", b"---", b"\t- 1",
]  # fmt: skip
