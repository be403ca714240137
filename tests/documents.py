"""A Markdown document, taken apart: its fenced blocks, the commands in them, and what it links to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between two fences. `line` is that of the first fence, from 1."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name of the file that it is, where its first line is a comment with that alone."""
        named = re.match(r"# ([\w.-]+\.\w+)\n", self.text)
        return named[1] if named else None


@dataclasses.dataclass(frozen=True)
class Command:
    """One command, as it is typed; with `$ ` before it in the document, what it prints is told too."""

    words: str
    output: str | None


def blocks(document: str) -> list[Block]:
    return [Block(found[1], found[2], document.count("\n", 0, found.start()) + 1) for found in FENCE.finditer(document)]


def commands(block: Block) -> list[Command]:
    """The commands of a `bash` block, a line each, or the one of a `console` block; lines that end in a \\ go on."""
    text = block.text.replace("\\\n", "")
    if block.language == "console":
        first, _, output = text.partition("\n")
        assert first.startswith("$ "), f"line {block.line}: a console block begins with a command"
        return [Command(first[2:], output)]
    lines = [re.sub(r"\s+# .*", "", line) for line in text.splitlines()]
    return [Command(line, None) for line in lines if line and not line.startswith("#")]


def commented(text: str) -> list[str]:
    """The commands in a file's comments, which stand three spaces in."""
    lines = re.findall(r"^#   (\S.*)$", re.sub(r" \\\n# +", " ", text), re.MULTILINE)
    return [line.strip() for line in lines]


def links(document: str) -> Iterator[str]:
    """Targets of the links outside of blocks."""
    yield from re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", FENCE.sub("", document))


def paths(document: str) -> Iterator[str]:
    """What is set as code outside of blocks, and is a path of the repository by its first part."""
    yield from re.findall(r"`((?:tests|loader|launch|configs|docker)/[\w./-]*)`", FENCE.sub("", document))


def anchors(document: str) -> set[str]:
    """Of its headings, as GitHub makes them: small letters, digits, - and _, with a - for each space."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
