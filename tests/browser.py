"""Headless Chromium, as Debian's package has it: what a page looks like to whoever opens it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from tests.debian import install

OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
    "--virtual-time-budget=5000", "--window-size=1280,1600",
]  # fmt: skip


def opened(page: Path) -> tuple[str, list[str]]:
    """The document as it is when the page has loaded, and what it said on the console, errors among it."""
    install(["chromium"], ["chromium"])
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            ["chromium", *OPTIONS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
    return done.stdout, [line for line in done.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)]
