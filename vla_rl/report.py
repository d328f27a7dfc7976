"""What a finished run shows: a table, `report.md`, curves and videos, all read from the files of the run."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from rich.table import Table

from vla_rl.evaluation import EvaluationResult, paired_difference
from vla_rl.runs import GROUPS, Run, evaluations, read_run, standing

PACKAGES = ("vla-rl", "torch", "transformers", "gymnasium", "mujoco", "metaworld", "h5py", "numpy")


def title(label: str, labels: Iterable[str]) -> str:
    """`"task0-round0-after-stage1"` as "after stage 1", with the numbers of task and round where there are several."""
    where, _, stage = label.rpartition("after-stage")
    several = len({other.rpartition("after-stage")[0] for other in labels if other != "after-stage0"}) > 1
    return f"after stage {stage}" + (f" ({where.rstrip('-').replace('-', ', ')})" if where and several else "")


def rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per evaluation: its label, then success, interval and n of every group (empty where not evaluated)."""
    table = []
    found = evaluations(results)
    for label, groups in found.items():
        cells = [_cell(groups[group]) if group in groups else "" for group in GROUPS]
        table.append((title(label, found), *cells))
    return table


def first_and_last(results: Mapping[str, Any], group: str) -> tuple[EvaluationResult, EvaluationResult] | None:
    """A group's evaluations after stage 0 and of the weights at the end; None if there are not two evaluations."""
    stages = [groups[group] for groups in evaluations(results).values() if group in groups]
    kept = [groups[group] for groups in standing(results).values() if group in groups]
    return (stages[0], kept[-1]) if len(stages) > 1 else None


def sign_test(before: EvaluationResult, after: EvaluationResult) -> float:
    """Two-sided exact sign test over paired episodes whose outcome changed (McNemar's exact test): the p-value."""
    first = {(name, e.seed): e.success for name, task in before.tasks.items() for e in task.episodes}
    second = {(name, e.seed): e.success for name, task in after.tasks.items() for e in task.episodes}
    changed = [second[key] for key in first if first[key] != second[key]]
    rarer = min(sum(changed), len(changed) - sum(changed))
    return min(1.0, 2 * sum(math.comb(len(changed), k) for k in range(rarer + 1)) / 2 ** len(changed))


def outcome(before: EvaluationResult, after: EvaluationResult) -> str:
    """`"a gain"` or `"a loss"` where paired interval and sign test both say so, else that nothing can be shown."""
    _, low, high = paired_difference(before, after)
    if sign_test(before, after) < 0.05 and (low > 0 or high < 0):
        return "a gain" if low > 0 else "a loss"
    return "no difference that these episodes can show"


def verdict(results: Mapping[str, Any]) -> list[str]:
    """One honest sentence per group: the paired difference, its interval, and whether it passes the sign test too."""
    sentences = []
    for group, name in GROUPS.items():
        pair = first_and_last(results, group)
        if pair is None:
            continue
        difference, low, high = paired_difference(*pair)
        p = sign_test(*pair)
        sentences.append(
            f"{name[0].upper()}{name[1:]}: {difference:+.2f} [{low:+.2f}, {high:+.2f}] from after stage 0 to "
            f"the end, sign test p {f'= {p:.3f}' if p >= 0.001 else '< 0.001'}: {outcome(*pair)}."
        )
    found, kept = evaluations(results), list(standing(results))
    if len(kept) < len(found):
        sentences.append(f"The end is {title(kept[-1], found)}: what came later was given up (rollback).")
    return sentences


def summary_table(results: Mapping[str, Any]) -> Table:
    """The table for the terminal."""
    table = Table(title="Deterministic success [95 % Wilson interval]")
    for name in ("stage", *GROUPS.values()):
        table.add_column(name)
    for row in rows(results):
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def versions() -> dict[str, str]:
    """Python, platform and the packages that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def write_report(workdir: str | Path, *, command: str, wall_clock_s: float, notes: list[str]) -> Path:
    """Write `report.md` (with curves and videos where matplotlib and imageio are installed) and return its path."""
    run = read_run(workdir)
    results = run.results
    lines = ["# Report", "", f"    {command}", "", f"Wall-clock: {wall_clock_s / 60:.1f} minutes. ", *notes, ""]
    lines += ["## Success", "", "Deterministic policy, the same reset seeds at every stage, 95 % Wilson intervals.", ""]
    lines += markdown_table(("stage", *GROUPS.values()), rows(results))
    lines += ["", *(f"- {sentence}" for sentence in verdict(results)), "", "### By task", ""]
    lines += markdown_table(("stage", "task", "success", "interval", "n", "mean length"), _task_rows(results))
    stage1 = {label: entry for label, entry in results.items() if label.endswith("-stage1") and "-after-" not in label}
    if stage1:
        lines += ["", "## Stage 1", ""]
        header = ("stage", "task", "env steps", "episodes", "VLM frames per env step", "noisy success first -> last")
        lines += markdown_table(header, [_stage1_row(label, entry) for label, entry in stage1.items()])
    lines += ["", "## Where the time went", "", *markdown_table(("phase", "seconds"), _time_rows(results, run))]
    figures = [*_curves(run, results), *_videos(run)]
    if figures:
        links = {path.stem: quote(path.relative_to(run.path).as_posix(), safe="/+") for path in figures}
        lines += ["", "## Pictures", "", *(f"![{name}]({link})" for name, link in links.items())]
    lines += ["", "## Versions", "", *(f"* {name} {version}" for name, version in versions().items()), ""]
    path = run.path / "report.md"
    path.write_text("\n".join(lines))
    return path


def _cell(result: EvaluationResult) -> str:
    low, high = result.interval
    n = sum(task.n for task in result.tasks.values())
    return f"{result.mean:.2f} [{low:.2f}, {high:.2f}] n={n}"


def _task_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found = evaluations(results)
    return [
        (
            title(label, found),
            name,
            f"{t.rate:.2f}",
            f"[{t.interval[0]:.2f}, {t.interval[1]:.2f}]",
            str(t.n),
            f"{t.mean_length:.0f}",
        )
        for label, groups in found.items()
        for result in groups.values()
        for name, t in result.tasks.items()
    ]


def _stage1_row(label: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    frames = entry["num_vlm_frames"] / max(entry["num_env_steps"], 1)
    change = f"{entry['first_success_rate']:.2f} -> {entry['last_success_rate']:.2f}"
    return label, entry["task"], f"{entry['num_env_steps']:,}", str(entry["num_episodes"]), f"{frames:.3f}", change


def _time_rows(results: Mapping[str, Any], run: Run) -> list[tuple[str, ...]]:
    table = [(phase, f"{seconds:.0f}") for phase, seconds in results.get("seconds", {}).items()]
    last: dict[str, dict[str, float]] = {}
    for entry in run.metrics:
        if "time/rollout_s" in entry:
            last[entry["phase"]] = entry
    for phase, entry in last.items():
        rollout, simulate, encode = (entry[f"time/{name}_s"] for name in ("rollout", "simulate", "encode"))
        table += [
            (f"{phase}: simulate and render", f"{simulate:.0f}"),
            (f"{phase}: encode", f"{encode:.0f}"),
            (f"{phase}: rest of the rollout", f"{rollout - simulate - encode:.0f}"),
            (f"{phase}: update", f"{entry['time/update_s']:.0f}"),
        ]
    return table


def markdown_table(header: Sequence[str], table: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown; a ``|`` within a cell does not end it."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *table)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _curves(run: Run, results: Mapping[str, Any]) -> list[Path]:
    """Success by stage with intervals, noisy success of stage 1 over env steps, loss of the supervised stages."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = run.metrics
    figure, axes = plt.subplots(1, 3, figsize=(17, 4), width_ratios=(1.4, 1, 1), layout="constrained")
    stages = evaluations(results)
    for group, name in GROUPS.items():
        points = [(i, groups[group]) for i, groups in enumerate(stages.values()) if group in groups]
        if not points:
            continue
        x = np.array([i for i, _ in points]) + 0.05 * list(GROUPS).index(group)
        y = np.array([result.mean for _, result in points])
        bounds = np.array([result.interval for _, result in points])
        axes[0].errorbar(x, y, yerr=np.abs(bounds.T - y), marker="o", capsize=3, label=name)
    axes[0].set_xticks(range(len(stages)), [title(label, stages).replace(" (", "\n(") for label in stages], fontsize=8)
    axes[0].set(title="Deterministic success", ylim=(-0.03, 1.03), ylabel="success rate")
    axes[0].legend()
    for phase in dict.fromkeys(entry["phase"] for entry in metrics):
        mine = [entry for entry in metrics if entry["phase"] == phase]
        if "charts/success_rate" in mine[0]:
            x = [entry["step"] for entry in mine]
            axes[1].plot(x, [entry["charts/success_rate"] for entry in mine], marker=".", label=phase)
        elif "losses/bc_loss" in mine[0]:
            axes[2].plot([entry["step"] for entry in mine], [entry["losses/bc_loss"] for entry in mine], label=phase)
    axes[1].set(title="Stage 1: success with exploration noise", xlabel="env steps", ylim=(-0.03, 1.03))
    axes[2].set(title="Supervised loss", xlabel="gradient steps", yscale="log")
    for axis in axes[1:]:
        if axis.lines:
            axis.legend(fontsize=8)
    path = run.path / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def _videos(run: Run) -> list[Path]:
    """A gif per set of kept frames, four times larger, the episodes one after the other."""
    try:
        import imageio.v3 as imageio
    except ImportError:
        return []
    paths = []
    for source in sorted((run.path / "frames").glob("*.npz")):
        with np.load(source) as archive:
            frames = np.concatenate([archive[name] for name in archive.files])
        path = run.path / "videos" / f"{source.stem}.gif"
        path.parent.mkdir(exist_ok=True)
        enlarge = max(1, 256 // frames.shape[1])
        imageio.imwrite(path, frames.repeat(enlarge, axis=1).repeat(enlarge, axis=2), duration=50, loop=0)
        paths.append(path)
    return paths
