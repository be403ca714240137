"""How many files and sockets this process may have open."""

from __future__ import annotations

import resource
from pathlib import Path

from loader.errors import UserError

_OTHERS = 256
"""Left for what a load opens beside: connections to the bucket, memory files, and what libraries need for a while."""


def make_room(sockets: int, why: str) -> None:
    """Let this process open so many more: its soft limit, often 1,024, is raised as far as it must be. Where the hard
    limit does not let, raises UserError, which begins with `why`.

    With 40 files open, 2,159 sockets need a limit of 40 + 2,159 + 256 = 2,455.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = sum(1 for _ in Path("/dev/fd").iterdir()) + sockets + _OTHERS
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"{why}, for which its process is to have {needed} files open, {sockets} of them new sockets: "
            f"it may have {hard} (ulimit -Hn); raise that for the job"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
