import re
import sys

import pytest

from loader.sinks.entrypoint import call


def test_it_is_called_with_model_mesh_and_report():
    seen = []

    def train(*args: object) -> None:
        seen.extend(args)

    assert call(train, "model", "mesh", "report") == 0
    assert seen == ["model", "mesh", "report"]


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3), (255, 255)])
def test_what_it_returns_is_the_exit_code(returned: int | None, code: int):
    assert call(lambda *_: returned, None, None, None) == code


@pytest.mark.parametrize("returned", [True, "done", 1.0, -1, 256, {"loss": 1}])
def test_anything_else_is_told(returned: object, capsys):
    assert call(lambda *_: returned, None, None, None) == 2
    assert re.search(r"returned .*: return None, or the process's exit code", capsys.readouterr().err)


def test_its_exception_is_printed_from_its_own_frame_on(capsys):
    def train(*_: object) -> None:
        raise RuntimeError("the user's own")

    assert call(train, None, None, None) == 1
    printed = capsys.readouterr().err
    assert "RuntimeError: the user's own" in printed
    assert "in train" in printed
    assert "loader/sinks" not in printed


def test_it_may_exit_by_itself():
    with pytest.raises(SystemExit) as caught:
        call(lambda *_: sys.exit(7), None, None, None)
    assert caught.value.code == 7
