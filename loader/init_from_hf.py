"""`torchrun -m loader.init_from_hf --config cfg.yaml [key=value ...]`: the init step of a training job."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from loader.config import parse
from loader.errors import LoaderError
from loader.exchange.control import Control
from loader.exchange.group import own_device, process_group
from loader.run import run

LEAVE = 5.0
"""Seconds that a rank with an error waits for the others to have told theirs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, run, and return the exit code; an error ends the process (see `end`)."""
    parser = argparse.ArgumentParser(
        prog="python -m loader.init_from_hf",
        description="Load a Hugging Face checkpoint from a bucket straight into every rank's own shards.",
        epilog="Dotted keys override the file: read.share=node mesh.tp=2. Run it under torchrun, or alone.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the file's keys")
    given = parser.parse_args(argv)
    try:
        config = parse(given.config, given.overrides)
    except LoaderError as error:
        config, unusable = None, error
    device = own_device(config.model.device if config else "cpu")
    with process_group(device), Control.of_group() as control:
        try:
            with control.phase("config"):
                if config is None:
                    raise unusable
            return run(config, control, device)
        except LoaderError as error:
            end(error, control)


def end(error: LoaderError, control: Control) -> NoReturn:
    """Tell the error, wait until all ranks have, and end the process with its exit code.

    The rank on which it began tells all of it, a traceback in user code included; the others its first line.

    torchrun answers the first rank's end with a SIGTERM to the others, which must not change their code. Threads that
    still wait for a lost rank, or for a silent server, are not waited for.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elsewhere = error.rank is not None and error.rank != control.rank
    told = f"(first on rank {error.rank}) {str(error).splitlines()[0]}" if elsewhere else str(error)
    print(f"rank {control.rank}: {type(error).__name__}: {told}", file=sys.stderr, flush=True)  # noqa: T201
    control.leave(LEAVE)
    sys.stdout.flush()
    os._exit(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
