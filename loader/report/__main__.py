"""`python -m loader.report report.json [--trace trace.json] --html out.html`: a report as a page, for a browser."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from loader.errors import SinkError
from loader.report import Report
from loader.report.page import page
from loader.sinks.document import write_document


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, write the page, and return the exit code: 2 where a file is not what it should be."""
    parser = argparse.ArgumentParser(
        prog="python -m loader.report", description="Make one page of a report, that needs nothing beside it."
    )
    parser.add_argument("report", metavar="report.json")
    parser.add_argument("--trace", metavar="trace.json", help="the same load's, for its timeline")
    parser.add_argument("--html", required=True, metavar="out.html", help="where the page is written")
    given = parser.parse_args(argv)
    reading = given.report
    try:
        report = Report.model_validate_json(Path(given.report).read_bytes())
        reading = given.trace
        trace = json.loads(Path(given.trace).read_bytes()) if given.trace else None
        made = page(report, trace)
        write_document(given.html, [made], "page")
    except OSError as error:
        print(f"{reading}: cannot be read: {error.strerror}", file=sys.stderr)  # noqa: T201
    except (ValueError, KeyError, TypeError) as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{reading}: is not one of this loader's, which are JSON: {told}", file=sys.stderr)  # noqa: T201
    except SinkError as error:
        print(error, file=sys.stderr)  # noqa: T201
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
