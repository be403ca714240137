"""fsspec's event loop: one thread, through which all bytes of its asynchronous clients go."""

from __future__ import annotations

from pathlib import Path

from fsspec.asyn import iothread


def loop_seconds() -> float:
    """Seconds for which that thread has computed or waited for a core, since it began; 0 without one, and where the
    kernel does not tell (Linux does, in /proc/…/schedstat: nanoseconds of both)."""
    if iothread[0] is None:
        return 0.0
    try:
        computed, waited, _ = Path(f"/proc/self/task/{iothread[0].native_id}/schedstat").read_text().split()
    except OSError:
        return 0.0
    return (int(computed) + int(waited)) * 1e-9
