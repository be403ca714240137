"""`torchrun -m loader.init_from_hf --config cfg.yaml [key=value ...]`: the init step of a training job."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import torch

from loader.config import Config, parse
from loader.dry_run import World, dry_run
from loader.errors import LoaderError, TerminatedError
from loader.exchange.control import Control
from loader.exchange.group import own_device, process_group
from loader.exchange.watch import BEAT, LOST_AFTER
from loader.ground.logs import Voice
from loader.run import run

LEAVE = 3.0
"""Seconds that a rank with an error waits for the others to have told theirs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, run, and return the exit code; an error ends the process (see `end`).

    Without `argv` it is the process's own command, and its last: from the return on SIGTERM is ignored.
    """
    given = _parser().parse_intermixed_args(argv)
    voice = Voice(int(os.environ.get("RANK", "0")), given.level, given.log_format == "json")
    voice.start()
    world = World(given.world_size, given.ranks_per_host, given.bucket_gbps, given.peer_gbps) if given.dry_run else None
    if world and os.environ.get("RANK", "0") != "0":
        return 0  # rank 0 foresees for all
    config: Config | LoaderError
    device = torch.device("cpu")
    try:
        config = parsed = parse(given.config, given.overrides)
        device = own_device(parsed.model.device) if world is None else device
    except LoaderError as error:
        config = error
    with nullcontext() if world else process_group(device):
        with Control.of_group() as control, _sigterm_told(control):
            try:
                go_on = _run(config, control, device, world, voice)
            except Exception as error:  # noqa: BLE001 - what no phase caught is told as a bug of ours
                end(control.fail(error), control, voice)
        code = go_on()
        if argv is None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for another rank's code: this one's is decided
        return code


@contextmanager
def _sigterm_told(control: Control) -> Iterator[None]:
    """Make SIGTERM an error like any other until the load's end: told on every rank, and what was begun is removed.

    torchrun sends it also where another rank was killed. That one is to be named, so there is time to miss it.
    """

    def tell(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        until = time.monotonic() + LOST_AFTER + 2 * BEAT
        while control.world_size > 1 and control.error is None and time.monotonic() < until:
            time.sleep(BEAT / 5)
        raise TerminatedError("ended by SIGTERM, which torchrun or the cluster sent: start again")

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loader.init_from_hf",
        description="Load a Hugging Face checkpoint from a bucket straight into every rank's own shards.",
        epilog="Dotted keys override the file: read.share=node mesh.tp=2. Run it under torchrun, or alone.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the file's keys")
    parser.add_argument(
        "--dry-run", action="store_true", help="read headers alone; print and report what would be done"
    )
    parser.add_argument(
        "--quiet", dest="level", action="store_const", const=logging.WARNING, help="warnings and errors alone"
    )
    parser.add_argument(
        "--verbose", dest="level", action="store_const", const=logging.DEBUG, help="every step and retry of every rank"
    )
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="json: a line for each thing that is said"
    )
    parser.set_defaults(level=logging.INFO)
    foreseen = parser.add_argument_group("the job that a dry run foresees")
    for name, default, text in (
        ("world-size", int(os.environ.get("WORLD_SIZE", "1")), "ranks; default: WORLD_SIZE, else 1"),
        ("ranks-per-host", int(os.environ.get("LOCAL_WORLD_SIZE", "8")), "default: LOCAL_WORLD_SIZE, else 8"),
        ("bucket-gbps", 25.0, "Gbit/s of a host's link to the bucket; default: %(default)s"),
        ("peer-gbps", 100.0, "Gbit/s of a host's link to other hosts; default: %(default)s"),
    ):
        foreseen.add_argument(f"--{name}", default=default, type=type(default), metavar="N", help=text)
    return parser


def _run(
    config: Config | LoaderError, control: Control, device: torch.device, world: World | None, voice: Voice
) -> Callable[[], int]:
    with control.phase("config"):
        if isinstance(config, LoaderError):
            raise config
    if world is None:
        return run(config, control, device, voice)
    dry_run(config, control, world, voice)
    return lambda: 0


def end(error: LoaderError, control: Control, voice: Voice) -> NoReturn:
    """Tell the error, wait until all ranks have, and end the process with its exit code.

    The rank on which it began tells all of it, a traceback in user code included; the others its first and last line.

    torchrun answers the first rank's end with a SIGTERM to the others, which must not change their code. Threads that
    still wait for a lost rank, or for a silent server, are not waited for.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elsewhere = error.rank is not None and error.rank != control.rank
    first, *rest = str(error).splitlines() or [""]
    told = f"(first on rank {error.rank}) {' … '.join([first, *rest[-1:]])}" if elsewhere else str(error)
    message = f"rank {control.rank}: {type(error).__name__}: {told}"
    sys.stdout.flush()
    voice.end(message, error=type(error).__name__, exit_code=error.exit_code, first_rank=error.rank)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it is to stand last: torch tells at length of a store that is gone
    _tell_torchrun(message)
    control.leave(LEAVE)
    os._exit(error.exit_code)


def _tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for one: else its summary, which comes last, names no cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        shown = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": shown}}))


if __name__ == "__main__":
    sys.exit(main())
