"""The commands that look at runs: `vla-rl report` and `vla-rl compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console


@dataclass
class Report:
    """One run, finished or not, as a page that can be sent to somebody: success, curves, episodes, time, settings.

    Example: vla-rl report runs/demo
    """

    run_dir: tyro.conf.Positional[Path]
    """work directory of the run"""
    out: Path | None = None
    """file to write; by default report.html in the run"""
    max_megabytes: float = 16.0
    """of moving pictures; beyond it episodes are shown as strips of frames"""

    def run(self, console: Console) -> None:
        """Write the page."""
        from vla_rl.report import verdict
        from vla_rl.report_html import write_html
        from vla_rl.runs import read_run

        path = write_html(self.run_dir, out=self.out, max_megabytes=self.max_megabytes)
        for sentence in verdict(read_run(self.run_dir).results):
            console.print(sentence, markup=False)
        size = path.stat().st_size / 1e6
        console.print(f"wrote {path} ({size:.1f} MB); open it in a browser", markup=False, soft_wrap=True)


@dataclass
class Compare:
    """Runs side by side, the differences taken on episodes of the same reset seeds, as Markdown or a page.

    Example: vla-rl compare runs/sft-s0 runs/ire-vla-s0 --out compare.html
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """work directories; the first is the one to compare with"""
    by_task: bool = False
    """one row per task, instead of the mean over a group"""
    out: Path | None = None
    """write a page there too"""

    def run(self, console: Console) -> None:
        """Print and write."""
        from vla_rl.compare import markdown, read_runs, write_comparison

        runs = read_runs(self.runs)
        console.print(markdown(runs, by_task=self.by_task), markup=False, highlight=False, soft_wrap=True)
        if self.out is not None:
            path = write_comparison(runs, self.out)
            console.print(f"wrote {path}", markup=False, soft_wrap=True)
