"""The user's program, called with what was loaded."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

from loader.errors import ConfigError


def call(entrypoint: Callable[[Any, Any, Any], Any], model: Any, mesh: Any, report: Any) -> int:
    """`entrypoint(model, mesh, report)`, and the exit code that it returns: None is 0.

    What it raises is no error of the loader's: its traceback is printed and the code is 1, as for any Python program;
    SystemExit and KeyboardInterrupt pass. Where it returns anything else than None or 0 to 255, that is told, and the
    code is 2: it is called when the load is over, so that its errors are this rank's alone.
    """
    try:
        code = entrypoint(model, mesh, report)
    except Exception as error:  # noqa: BLE001 - any exception of the user's
        trace = error.__traceback__
        traceback.print_exception(error.with_traceback(trace.tb_next if trace else None))  # without this frame
        return 1
    if code is None:
        return 0
    if isinstance(code, bool) or not isinstance(code, int) or not 0 <= code <= 255:
        name = f"{getattr(entrypoint, '__module__', '')}:{getattr(entrypoint, '__qualname__', entrypoint)}"
        found = f"{code!r:.80} ({type(code).__name__})"
        print(  # noqa: T201
            f"output.entrypoint {name} returned {found}: return None, or the process's exit code, an int from 0 to 255",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    return code
