import math

import pytest
import torch

from loader.config import parse_bytes, parse_seconds
from loader.config.values import parse_dtype, parse_function
from loader.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("512MiB", 512 * 2**20),
        ("8MB", 8_000_000),
        ("64KiB", 65536),
        ("1.5GiB", 3 * 2**29),
        ("1 TiB", 2**40),
        ("7B", 7),
        ("1048576", 1048576),
        (1048576, 1048576),
        (0, 0),
    ],
)
def test_sizes(value, size):
    assert parse_bytes(value) == size
    assert type(parse_bytes(value)) is int


@pytest.mark.parametrize(
    "value",
    ["512Mb", "512mib", "8 parsecs", "-1", -1, True, None, "", "0.3B", 1.5, "MiB", [8], math.inf, math.nan, "٣B"],
)
def test_what_is_no_size_is_named_with_what_is(value):
    with pytest.raises(ConfigError, match=r'should be a size such as "512MiB", "8MB" or 1048576 \(bytes\), found '):
        parse_bytes(value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("30s", 30.0), ("30min", 1800.0), ("1.5h", 5400.0), ("500ms", 0.5), ("30", 30.0), (30, 30.0), (0.25, 0.25)],
)
def test_durations(value, seconds):
    assert parse_seconds(value) == seconds
    assert type(parse_seconds(value)) is float


@pytest.mark.parametrize("value", ["30m", "0s", 0, -1, "1:30", False, None, "soon", {"s": 1}])
def test_what_is_no_duration_is_named_with_what_is(value):
    with pytest.raises(ConfigError, match='should be a duration above zero such as "30s", "30min"'):
        parse_seconds(value)


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float8_e4m3fn"])
def test_dtypes(name):
    assert parse_dtype(name) is getattr(torch, name)


@pytest.mark.parametrize("value", ["bf16", "int8", "nn", "torch.bfloat16", 16, None])
def test_what_is_no_dtype_is_named(value):
    with pytest.raises(ConfigError, match="should be a dtype of torch such as bfloat16"):
        parse_dtype(value)


@pytest.mark.parametrize("name", ["train:main", "a.b_c.d1:run", "pkg.mod:Class.method"])
def test_functions(name):
    assert parse_function(name) == name


@pytest.mark.parametrize(
    "name", ["train.main", "train:", ":main", "a b:c", "a:b c", "a..b:c", "a.py:main()", "1a:b", "a:b\n"]
)
def test_what_is_no_function_is_named(name):
    with pytest.raises(ConfigError, match=r'should be "package\.module:function", found '):
        parse_function(name)
