"""Pieces of a self-contained page: the frame with its style sheet, tables, cards and lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from vla_rl._svg import interval_bar


class Raw(str):
    """Text that is HTML already."""


def text(value: object) -> str:
    """HTML of a value: as it is if it is `Raw`, else escaped."""
    return value if isinstance(value, Raw) else escape(str(value))


def page(title: str, body: str) -> str:
    """The whole document; nothing in it is fetched from anywhere."""
    style = (files("vla_rl") / "assets" / "report.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def table(header: Sequence[str], body: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> Raw:
    """A table; a row of one cell is a heading across it.

    Args:
        header: names of the columns.
        body: rows of cells.
        numbers: columns that are flush right.
    """

    def css(column: int) -> str:
        return ' class="num"' if column in numbers else ""

    lines = []
    for row in body:
        if len(row) == 1:
            lines.append(f'<tr class="group"><th colspan="{len(header)}">{text(row[0])}</th></tr>')
        else:
            lines.append("<tr>" + "".join(f"<td{css(i)}>{text(cell)}</td>" for i, cell in enumerate(row)) + "</tr>")
    head = "".join(f"<th{css(i)}>{text(name)}</th>" for i, name in enumerate(header))
    return Raw(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def rate(value: float, low: float, high: float, n: int, *, kind: int = 0) -> Raw:
    """A success rate in a table's cell: number, interval, n, and a bar."""
    return Raw(
        f'<b>{value:.2f}</b> <span class="ci">[{low:.2f}, {high:.2f}] n = {n}</span>'
        + interval_bar(value, low, high, kind=kind)
    )


def tag(words: str) -> Raw:
    """`a gain` in green, `a loss` in red, anything else as "no difference shown" in grey."""
    kind = {"a gain": " good", "a loss": " bad"}.get(words)
    return Raw(f'<span class="tag{kind or ""}">{words if kind else "no difference shown"}</span>')


def section(anchor: str, title: str, *parts: str) -> str:
    """A part of the page with a heading; empty where all its parts are."""
    inside = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{inside}</section>' if inside else ""


def paragraph(words: object, *, css: str = "") -> str:
    """A paragraph."""
    return f'<p class="{css}">{text(words)}</p>' if css else f"<p>{text(words)}</p>"


def duration(seconds: float) -> str:
    """`45 s`, `7.0 min` or `2.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
