"""How many files and sockets this process may have open."""

from __future__ import annotations

import resource
from pathlib import Path

from loader.errors import UserError

_OTHERS = 256
"""Left for what a load opens beside: connections to the bucket, memory files, and what libraries need for a while."""


def make_room(sockets: int, why: str) -> None:
    """Let this process open so many more: its soft limit, often 1,024, is raised as far as it must be. `why` begins the
    sentence of the error. Raises UserError where the hard limit does not let.

    With 40 files open, 2,159 sockets need a limit of 40 + 2,159 + 256 = 2,455.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = sum(1 for _ in Path("/dev/fd").iterdir()) + sockets + _OTHERS
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"{why} {sockets} sockets, for which this process would have to open {needed} files; the most it may open "
            f"(ulimit -Hn) are {hard}: raise that for the job"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
