"""Which ranks are on one node."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def node_name() -> str:
    """What ranks of one node have in common: torchrun's node, else the host name and the network namespace."""
    group = os.environ.get("GROUP_RANK")
    return f"node {group}" if group is not None else f"{socket.gethostname()} {_network()}"


def _network() -> str:
    try:
        return str(Path("/proc/self/ns/net").readlink())
    except OSError:
        return ""
