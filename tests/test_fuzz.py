"""A short run of tests/fuzz.py: it has a process of its own, whose memory it limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz


@pytest.mark.timeout(300)
def test_damaged_files_end_in_an_error_or_in_the_right_tensors():
    command = [sys.executable, str(Path(fuzz.__file__)), "--inputs", "4000"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for kind in fuzz.KINDS:
        assert f"{kind:12} refused" in ended.stdout
        assert f"{kind:12} as the library's" in ended.stdout


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_a_wrong_tensor_would_be_found(monkeypatch, kind):
    """A catalog that is one byte off."""
    right = fuzz.catalogued if kind == "zip" else fuzz.parse_header

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        entries = found.contents.entries if kind == "zip" else found
        moved = {key: entry._replace(start=entry.start - 1, stop=entry.stop - 1) for key, entry in entries.items()}
        return found._replace(contents=found.contents._replace(entries=moved)) if kind == "zip" else moved

    monkeypatch.setattr(fuzz, right.__name__, wrong)
    _, check = fuzz.KINDS[kind]
    for data in fuzz._seeds()[kind][:1]:
        with pytest.raises(AssertionError):
            check(data)
