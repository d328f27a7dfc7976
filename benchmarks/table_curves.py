"""Curves of the tables' runs: success with exploration noise over env steps, and success by RL task learned."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from table_runs import TableRun

from vla_rl.report import GROUPS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KEY = "Runs"
COLOURS = {
    "sft": "C7",
    "more-sft": "C8",
    "filtered-bc": "C0",
    "ppo": "C1",
    "ppo-replay": "C5",
    "ppo-bc": "C6",
    "ire-vla-frozen": "C4",
    "ire-vla": "C3",
    "ire-vla-sacfd": "C2",
    "no-curriculum": "C8",  # the rows of a skill stand beside `sft` and `ire-vla` alone
    "rnd": "C0",
    "curriculum-rnd": "C4",
    "curriculum-shaping": "C1",
}


def fingerprint(directory: Path) -> str:
    """Digest of all runs of a preset."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.json")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest that `draw_curves` left in a picture; None if there is none."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(KEY)


def draw_curves(runs: Mapping[str, Sequence[TableRun]], path: Path, *, title: str, digest: str) -> None:
    """Draw a panel per stage 1 and a panel per group of tasks; thin lines are seeds, thick ones their mean.

    Args:
        runs: row -> its runs.
        path: of the PNG.
        title: above all.
        digest: of the runs, kept in the PNG's text.
    """
    stages = list(dict.fromkeys(stage for row in runs.values() for run in row for stage in run.data["stage1"]))
    groups = [group for group in GROUPS if any(len(run.after_tasks(group)) > 1 for row in runs.values() for run in row)]
    columns = min(3, max(1, len(stages) + len(groups)))
    lines = -(-(len(stages) + len(groups)) // columns) or 1
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3.6 * lines + 0.8), layout="constrained", squeeze=False
    )
    panels = list(axes.flat)
    for axis, stage in zip(panels, stages, strict=False):
        task = next(
            run.data["stage1"][stage]["task"] for row in runs.values() for run in row if stage in run.data["stage1"]
        )
        for method, row in runs.items():
            curves = [run.data["stage1"][stage]["noisy_success"] for run in row if stage in run.data["stage1"]]
            _lines(axis, [np.array(curve, dtype=float).T for curve in curves if curve], method)
        rounds = len({other.split("-")[1] for other in stages}) > 1
        axis.set(
            title=f"Stage 1: {task}" + f", {stage.split('-')[1]}" * rounds,
            xlabel="env steps",
            ylabel="success with noise",
        )
        axis.locator_params(axis="x", nbins=5)  # more would run into each other
    for axis, group in zip(panels[len(stages) :], groups, strict=False):
        for method, row in runs.items():
            curves = [np.array([result.mean for result in run.after_tasks(group)]) for run in row]
            _lines(axis, [np.stack([np.arange(len(curve)), curve]) for curve in curves], method, marker="o")
        ticks = max(len(run.after_tasks(group)) for row in runs.values() for run in row)
        axis.set(
            title=f"{GROUPS[group].capitalize()}, deterministic".replace("Rl", "RL"),
            xlabel="RL tasks learned",
            ylabel="success",
        )
        axis.set_xticks(range(ticks))
    for axis in panels[len(stages) + len(groups) :]:
        axis.remove()
    for axis in panels[: len(stages) + len(groups)]:
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    handles = {
        label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.suptitle(title)
    figure.savefig(path, dpi=100, metadata={KEY: digest, "Software": None})
    plt.close(figure)


def _lines(axis: Any, curves: Sequence[np.ndarray], method: str, *, marker: str = "") -> None:
    """Curves float [2, T] (x, y) of one row: each seed thin, the mean of as many points as all seeds have thick."""
    if not curves:
        return
    colour = COLOURS.get(method, "black")
    if len(curves) > 1:
        for x, y in curves:
            axis.plot(x, y, color=colour, linewidth=0.7, alpha=0.4)
    shortest = min(curve.shape[1] for curve in curves)
    x, y = np.mean([curve[:, :shortest] for curve in curves], axis=0)
    axis.plot(
        x, y, color=colour, linewidth=2, marker=marker or ("o" if shortest == 1 else ""), markersize=4, label=method
    )
