"""How `vla-rl data` prints: plain lines that can be piped, and progress bars where someone looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vla_rl.data import ArrayStatistics, EpisodeStore, summarize
from vla_rl.data.copying import Progress as Report
from vla_rl.intervals import wilson_interval


def print_store(path: Path, console: Console) -> None:
    """Episodes, steps, success and length per task and source of a store."""
    with EpisodeStore(path, mode="r") as store:
        summary = summarize(store)
        size = sum(info.num_bytes for info in store.index)
        kinds = ", ".join(sorted({info.images for info in store.index}))
        say(
            console,
            f"{path}: {len(store)} episodes, {store.total_steps:,} steps, {size / 1e6:,.1f} MB"
            + (f", pictures {kinds}" if kinds else ""),
        )
    rows = [("task", "source", "episodes", "steps", "success", "95 % interval", "mean length")]
    for row in summary:
        low, high = wilson_interval(round(row.success_rate * row.episodes), row.episodes)
        rate = (f"{row.success_rate:.2f}", f"{low:.2f} .. {high:.2f}")
        rows.append((row.task, row.source, str(row.episodes), f"{row.steps:,}", *rate, f"{row.mean_length:.0f}"))
    say_rows(console, rows, text_columns=(0, 1))


def say(console: Console, text: str) -> None:
    """Prints a line as it is, whatever the width, so that it can be piped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)


def say_rows(console: Console, rows: Sequence[Sequence[str]], *, text_columns: Sequence[int]) -> None:
    """Prints a table; its text columns are flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if k in text_columns else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say(console, "  ".join(cells).rstrip())


def say_array(console: Console, name: str, array: ArrayStatistics) -> None:
    """One row per statistic, one column per dimension."""
    for label, key in (("mean", "mean"), ("std", "std"), ("min", "minimum"), ("max", "maximum")):
        figures = " ".join(f"{value:9.3f}" for value in np.ravel(getattr(array, key)))
        say(console, f"  {name:8} {label:5}{figures}")


@contextmanager
def progress(console: Console, what: str) -> Iterator[Report]:
    """A bar on a terminal, and nothing in a pipe; gives the function to report to."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
