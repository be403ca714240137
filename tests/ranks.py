"""Run a function in every rank of a small world.

`run_ranks` forks its ranks from a server that has torch and the file systems imported already, so a gloo group of four
stands in about 0.1 s; a fresh interpreter for each rank would take 3 s. What a rank prints, its traceback, and the
stacks of one that hangs all come back to the test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import faulthandler
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loader.exchange import watch
from loader.store import patience
from tests.processes import kill_tree, python_path

GRACE = 5.0
"""Seconds that ranks have to end by themselves once one of them has failed."""

# Imported once, in the fork server, and never by a rank again.
_PRELOAD = [
    "gcsfs", "psutil", "pydantic", "pytest", "ruamel.yaml", "s3fs", "safetensors.torch", "tenacity", "tqdm",
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
    "transformers.modeling_utils",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one rank ended. `error` is None where it returned `value`; `report` is a traceback, or how it died."""

    value: Any = None
    error: BaseException | None = None
    report: str = ""
    output: str = ""
    """Its stdout and stderr, and the stacks of its threads where it had to be ended."""


class RankDiedError(Exception):
    """A rank's process ended without an outcome, or did not end."""


class RankFailure(AssertionError):  # noqa: N818 - it is a failed test
    """At least one rank raised, died or hung. The message has what every rank said; `outcomes` are in rank order."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = list(outcomes)
        failed = [rank for rank, outcome in enumerate(outcomes) if outcome.error is not None]
        told = [
            f"---- rank {rank}: {outcome.report or 'returned'}\n{outcome.output}".rstrip()
            for rank, outcome in enumerate(outcomes)
        ]
        super().__init__("\n".join([f"ranks {failed} of {len(outcomes)} failed", *told]))


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 180,
    nodes: int = 1,
    init: bool = True,
    env: Mapping[str, str] | None = None,
    outcomes: bool = False,
    patient: bool = True,
) -> list[Any]:
    """Call the module-level `fn(*args)` in `world_size` processes and return what each returned, in rank order.

    Every rank has this process's environment and working directory, torchrun's variables (`nodes` share the ranks
    evenly), and `env`; in any value, "{rank}" becomes the rank. With `init` a gloo group stands before the call and is
    destroyed after it; without, `init_process_group()` inside works as it does under torchrun (once: torch leaves the
    first group's addresses in the store). Arguments and results travel by pickle.

    A rank that raises, dies, or has not ended after `timeout` seconds makes a RankFailure, at most GRACE seconds after
    the first. With `outcomes`, an Outcome per rank is returned instead, whatever happened, and every rank has the whole
    `timeout`. If `patient`, a rank that gets no core for long does not pass for lost, nor the store: where some are to
    be lost, it must not be.
    """
    call = pickle.dumps((fn, args))
    # Hosted here, the store has its port before any rank asks for it: no race for a free one.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {**os.environ, **_world_environment(world_size, nodes, store.port), **(env or {})}
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch, contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(world_size):
            mine = {name: value.replace("{rank}", str(rank)) for name, value in shared.items()}
            mine |= _rank_environment(rank, world_size // nodes)
            ranks.append(_Rank(call, mine, Path(scratch, str(rank)), timeout, init=init, patient=patient))
            stack.callback(ranks[-1].kill)
        _wait(ranks, timeout, math.inf if outcomes else GRACE)
        results = [rank.outcome() for rank in ranks]
    if not outcomes and any(result.error is not None for result in results):
        raise RankFailure(results)
    for rank, result in enumerate(results):
        if result.output:
            print(f"---- rank {rank}\n{result.output}", end="")  # pytest shows it should the test fail
    return results if outcomes else [result.value for result in results]


def _world_environment(world_size: int, nodes: int, port: int) -> dict[str, str]:
    assert world_size % nodes == 0, f"{world_size} ranks do not share {nodes} nodes evenly"
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size // nodes),
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store stands already, as under torchrun, so that rank 0 must not host it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(),
    }


def _rank_environment(rank: int, ranks_per_node: int) -> dict[str, str]:
    node, local_rank = divmod(rank, ranks_per_node)
    return {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(node)}


def _wait(ranks: Sequence[_Rank], timeout: float, grace: float) -> None:
    """Wait until every rank has ended; end those that have not after `timeout`, or `grace` after the first failure."""
    deadline = time.monotonic() + timeout
    running = list(ranks)
    while running and (left := deadline - time.monotonic()) > 0:
        multiprocessing.connection.wait([handle for rank in running for handle in rank.handles()], left)
        for rank in [rank for rank in running if rank.has_ended()]:
            running.remove(rank)
            if rank.outcome().error is not None:
                deadline = min(deadline, time.monotonic() + grace)
    for rank in running:
        rank.end()


class _Rank:
    """One rank's process as its parent sees it."""

    def __init__(
        self, call: bytes, environ: Mapping[str, str], log: Path, timeout: float, *, init: bool, patient: bool
    ) -> None:
        self.log = log
        self.message: bytes | None = None
        self.hung = False
        context = _forkserver()
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_rank_main,
            args=(call, sender, dict(environ), Path.cwd(), log, timeout),
            kwargs={"init": init, "patient": patient},
        )
        self.process.start()
        sender.close()

    def handles(self) -> list[Any]:
        return [self.process.sentinel] if self.receiver.closed else [self.process.sentinel, self.receiver]

    def has_ended(self) -> bool:
        """Take the message as soon as it is there, for a large one keeps the process alive until it is read."""
        ended = not self.process.is_alive()  # before: what it sends last, it sends before it ends
        if not self.receiver.closed and self.receiver.poll():
            with contextlib.suppress(EOFError):
                self.message = self.receiver.recv_bytes()
            self.receiver.close()
        return ended

    def end(self) -> None:
        self.hung = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)  # faulthandler writes every thread's stack, then the process ends
        self.process.join(2)
        self.kill()

    def kill(self) -> None:
        kill_tree(self.process.pid)
        self.process.join()

    def outcome(self) -> Outcome:
        output = self.log.read_text(errors="replace") if self.log.exists() else ""
        if self.hung:
            said = "" if self.message is None else " though its function had returned or raised"
            report = f"did not end{said}; its stacks are below"
        elif self.message is None:
            report = f"died: {_exit_words(self.process.exitcode)}"
        else:
            value, error, report = pickle.loads(self.message)
            return Outcome(value, error, report, output)
        return Outcome(error=RankDiedError(report), report=report, output=output)


def _exit_words(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # else importing numpy starts threads, which do not survive a fork
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


def _rank_main(
    call: bytes,
    sender: Any,
    environ: dict[str, str],
    cwd: Path,
    log: Path,
    timeout: float,
    *,
    init: bool,
    patient: bool,
) -> None:
    """What a rank's process does: one call, one message."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=True)
    faulthandler.dump_traceback_later(timeout + 30, exit=True)  # the parent may have been killed and never come
    try:
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(cwd)
        torch.set_num_threads(1)
        if patient:
            watch.LOST_AFTER = watch.SILENT_AFTER = 90.0
        patience.LEAST = 10.0  # a rank that gets no core is no stalled connection: what a server counts is not to vary
        fn, args = pickle.loads(call)
        if init:
            # Longer than the parent waits: a hang is told with its stacks, and not as gloo's time-out.
            dist.init_process_group("gloo", timeout=dt.timedelta(seconds=timeout + 30))
        value = fn(*args)
        if init and dist.is_initialized():
            dist.destroy_process_group()
        message = pickle.dumps((value, None, ""))
    except BaseException as error:  # noqa: BLE001 - SystemExit too is an outcome
        message = _pickle_error(error)
    sys.stdout.flush()
    sender.send_bytes(message)
    sender.close()


def _pickle_error(error: BaseException) -> bytes:
    report = "".join(traceback.format_exception(error))
    try:
        message = pickle.dumps((None, error, report))
        pickle.loads(message)
    except Exception:  # noqa: BLE001 - whatever its pickling raises
        message = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), report))
    return message
