"""The Markdown pages as the documentation's tests read them: code blocks with their marks, and command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/tiny/README.md")]
"""Pages outside `docs/`, whose commands are read as well."""
MARKS = ("elsewhere", "slow", "simulator", "needs", "setup")

WHOLE_PAGES = {  # written from docstrings, where no mark can stand
    "environments/metaworld.md": "simulator",
    "environments/kitchen.md": "simulator",
    "environments/robohive.md": "elsewhere",  # tests/envs/test_robohive.py, with RoboHive's own interpreter
}
"""Marks for every block of a page."""

_PIECE = re.compile(
    r"<!-- test: (?P<mark>\w+):?(?P<rest>.*?)-->|^(?P<fence>`{3,}) *(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=fence)",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block, or the hidden code of a `setup` comment.

    Attributes:
        page: relative to `docs/`, where it lies there, else to the repository.
        line: of its first line of code.
        language: "python", "bash", ...; "python" for hidden code.
        code: text.
        mark: "", or one of MARKS, from the comment right before it.
        reason: the comment's, which every mark but `setup` has; of `needs`, the module.
    """

    page: str
    line: int
    language: str
    code: str
    mark: str = ""
    reason: str = ""


def blocks(path: Path) -> list[Block]:
    """All blocks of a page in order.

    A mark is a comment before a block: `<!-- test: slow: why -->`, `simulator: why`, `needs: package`, which runs the
    block where that can be imported, or `elsewhere: file` where another test runs it. Code that a page needs and no
    reader does stands in `<!-- test: setup` ... `-->`.

    Raises:
        ValueError: an unknown mark, a mark without a reason or without a block.
    """
    text, page = path.read_text(), path.relative_to(DOCS if path.is_relative_to(DOCS) else path.parents[0]).as_posix()
    found: list[Block] = []
    mark, reason = "", ""
    for match in _PIECE.finditer(text):
        start = match.start("rest" if match["mark"] else "code")
        line = text.count("\n", 0, start) + 1
        if match["mark"] == "setup":
            found.append(Block(page, line, "python", match["rest"], "setup"))
        elif match["mark"]:
            if mark or match["mark"] not in MARKS or not match["rest"].strip():
                raise ValueError(
                    f"{page}:{line}: {match.group()!r}; expected <!-- test: elsewhere|slow|simulator|needs: why -->"
                )
            mark, reason = match["mark"], match["rest"].strip()
        else:
            found.append(Block(page, line, match["language"], match["code"], mark or WHOLE_PAGES.get(page, ""), reason))
            mark, reason = "", ""
    if mark:
        raise ValueError(f"{page}: the mark {mark!r} stands before no block")
    return found


def commands(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and words of every command in a page's bash blocks; those with a `...` in them are left out."""
    for block in blocks(path):
        if block.language in ("bash", "sh", "console"):
            lines = block.code.replace("\\\n", "  ").splitlines()
            for number, text in enumerate(lines, start=block.line):
                words = shlex.split(text, comments=True)
                if "..." in words:
                    continue
                parts: list[list[str]] = [[]]
                for word in words:
                    if word in ("&&", "||", "|", ";"):
                        parts.append([])
                    elif parts[-1] or not re.fullmatch(r"[A-Z_]+=\S*", word):
                        parts[-1].append(word)
                yield from ((number, _without_redirection(part)) for part in parts if part)


def _without_redirection(words: list[str]) -> list[str]:
    return words[: words.index(">")] if ">" in words else words
