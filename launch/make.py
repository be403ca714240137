"""Make the files that start the init step, and then a training command: on a laptop, under Slurm, on Kubernetes.

    python -m launch.make slurm --config cfg.yaml --nodes 2 --ranks-per-node 8 --train "torchrun train.py" --out job

What is made is for people to read, keep and change; each file says why it is as it is.
"""

# ruff: noqa: INP001, T201 - launch is a folder of commands, not a package of the library, and commands print
from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from launch.job import CPUS_PER_RANK, Job, job_of
from loader.errors import ConfigError, LoaderError

CONFIG = "cfg.yaml"
FILES = {"laptop": ("run.sh", CONFIG), "slurm": ("job.sbatch", CONFIG), "kubernetes": ("jobset.yaml",)}
"""What is made of a job: the first from the template of that name. Kubernetes has the config in it, as a ConfigMap."""

MOUNTED = f"/etc/loader/{CONFIG}"
"""Where the pods see that ConfigMap."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, make the files, tell their names, and return the exit code."""
    given = _parser().parse_intermixed_args(argv)
    out = Path(given.out).absolute()
    try:
        job = job_of(given)
        script, *others = FILES[given.form]
        config_path = str(out / CONFIG) if others else MOUNTED
        texts = {script: render(script, job, config_path), **dict.fromkeys(others, job.config)}
        _write(out, texts)
    except LoaderError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(*(out / name for name in texts), sep="\n")
    return 0


def render(template: str, job: Job, config_path: str) -> str:
    """The template of that name, filled. What it asks for and the job does not have is an error (jinja2's)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - no HTML: shell and YAML, each with its own quotes, the filters below
    )
    environment.filters["shell"] = shlex.join
    environment.filters["yaml"] = _yaml
    return environment.get_template(template).render(dataclasses.asdict(job), config_path=config_path)


def _yaml(value: object) -> str:
    """JSON is YAML, on one line, and takes no text for a number or a truth."""
    return json.dumps(value, ensure_ascii=False)


def _write(out: Path, texts: Mapping[str, str]) -> None:
    """Write each text under its name in `out`, none of which may be there: someone may have changed it."""
    there = [out / name for name in texts if (out / name).exists()]
    if there:
        raise ConfigError(f"--out: {there[0]} is there already: remove it, or name another directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
            if text.startswith("#!"):
                (out / name).chmod(0o755)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from error


def _number(text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"should be a whole number, found {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not _number(text):
        raise argparse.ArgumentTypeError(f"should be 1 or more, found {text}")
    return int(text)


def _name(text: str) -> str:
    """A label of RFC 1035, for on Kubernetes host names begin with it."""
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"should be of a-z, 0-9 and '-', with a letter first, found {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.make",
        description="Make the files that start the init step, and then a training command.",
        epilog="Dotted keys override the file, as they do for the init step: read.share=node mesh.tp=2.",
    )
    parser.add_argument("form", choices=FILES, help="where the job is to run")
    parser.add_argument("--config", required=True, metavar="FILE", help="the init step's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the file's keys")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the files are made")
    parser.add_argument("--ranks-per-node", required=True, type=_count, metavar="N", help="one for each GPU, if any")
    parser.add_argument("--gpus-per-node", type=_number, metavar="N", help="to ask for; default: one for each rank")
    parser.add_argument("--nodes", default=1, type=_count, metavar="N", help="default: %(default)s")
    parser.add_argument("--name", default="train", type=_name, help="of the job; default: %(default)s")
    parser.add_argument(
        "--train",
        metavar="COMMAND",
        help="runs on each node after the init step: 'torchrun train.py' takes nodes and ranks from its environment. "
        "Without it the config's output.entrypoint trains",
    )
    pod = parser.add_argument_group("for kubernetes alone")
    pod.add_argument("--image", help="of the init step; with a digest a restart cannot find another one")
    pod.add_argument("--train-image", metavar="IMAGE", help="of the training command; default: --image")
    pod.add_argument("--memory-gib", type=_count, metavar="N", help="of a pod, with what lies in /dev/shm")
    pod.add_argument("--shm-gib", type=_count, metavar="N", help="size of /dev/shm; default: half of the memory")
    pod.add_argument("--cpus", type=_count, metavar="N", help=f"of a pod; default: {CPUS_PER_RANK} for each rank")
    pod.add_argument("--service-account", metavar="NAME", help="whose role may read the bucket")
    pod.add_argument("--secret", metavar="NAME", help="a Secret whose entries become environment variables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
