"""The hand-written pages, as markdown-it reads them: code blocks, links, prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PARSER = MarkdownIt("commonmark").enable("table")


def pages() -> list[Path]:
    """README, CONTRIBUTING and everything under docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def written() -> list[Path]:
    """Those that no generator writes."""
    return [page for page in pages() if REFERENCE not in page.parents]


def name(page: Path) -> str:
    """As shown in test names."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that its first line names in a comment, such as `# mine.yaml` or `# a/b.py`."""
        named = re.match(r"# ([\w./-]+\.(?:yaml|py|toml))(?::.*)?\n", self.text)
        return named[1] if named else None

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """Its fenced blocks in these languages, or all of them."""
    found = []
    for token in PARSER.parse(page.read_text()):
        if token.type == "fence":
            line = token.map[0] + 1 if token.map else 0
            found.append(Block(page, line, token.info.strip(), token.content))
    return [block for block in found if not languages or block.language in languages]


@dataclass(frozen=True)
class Command:
    """A line after `$ ` in a console block, and what the page says that it prints."""

    block: Block
    line: str
    shown: tuple[str, ...]
    """Lines that must come in this order; `...` stands for anything, alone or at the end of a line."""

    def matches(self, printed: str) -> str | None:
        """The first shown line that is missing, or None."""
        rest = iter(" ".join(line.split()) for line in printed.splitlines())
        for wanted in self.shown:
            start = " ".join(wanted.split())
            if start == "...":
                continue
            whole = not start.endswith("...")
            start = start.removesuffix("...").rstrip()
            if not any(line == start if whole else line.startswith(start) for line in rest):
                return wanted
        return None


def commands(page: Path) -> list[Command]:
    """What the page's console blocks tell a reader to type, in order; comments after `  #` are dropped."""
    found = []
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, *shown = part.rstrip("\n").split("\n")
            found.append(Command(block, re.sub(r"\s{2,}#.*", "", line), tuple(filter(None, shown))))
    return found


def tokens(page: Path) -> Iterator[Token]:
    """Inline tokens: text, links, images."""
    for token in PARSER.parse(page.read_text()):
        yield from token.children or ()


def prose(page: Path) -> str:
    """Its text outside of code blocks and code spans."""
    return " ".join(token.content for token in tokens(page) if token.type == "text")
