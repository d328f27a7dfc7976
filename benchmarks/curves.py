"""From the TensorBoard logs of several runs to a table and to curves of the interquartile mean with intervals.

    python benchmarks/curves.py --runs runs --tag charts/success_rate --out runs/curves

Runs of one `exp_name` are seeds of an algorithm; tasks and seeds are told apart by the hyperparameters that the scripts
log. The interquartile mean over runs and its stratified bootstrap are those of Agarwal et al. 2021 (arXiv 2108.13264).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from numpy.typing import NDArray
from scipy.stats import trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Args:
    """Which logs, and what of them."""

    runs: tuple[Path, ...] = (Path("runs"),)
    """directories that are searched for TensorBoard logs"""
    tag: str = "charts/success_rate"
    """scalar to read"""
    by: tuple[str, ...] = ("exp_name",)
    """hyperparameters that make an algorithm; runs that agree in them are seeds and tasks of one"""
    points: int = 50
    """points of a curve"""
    resamples: int = 2000
    """bootstrap resamples"""
    out: Path = Path("runs/curves")
    """writes <out>.md and <out>.png"""


class CurvesError(ValueError):
    """Logs that do not make a comparison."""


@dataclass(frozen=True)
class Run:
    """One run's log.

    Attributes:
        algorithm: values of the hyperparameters that tell algorithms apart.
        task: environment and task.
        seed: of the run.
        steps: env steps of the values, increasing, [N].
        values: [N].
        minutes: between the first and the last value.
    """

    algorithm: str
    task: str
    seed: int
    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    minutes: float


def read_run(directory: Path, *, tag: str, by: Sequence[str]) -> Run | None:
    """The run logged in a directory; None if it holds no value of that tag.

    Raises:
        CurvesError: it logs no hyperparameters.
    """
    log = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    log.Reload()
    if tag not in log.Tags()["scalars"]:
        return None
    if "hyperparameters/text_summary" not in log.Tags()["tensors"]:
        raise CurvesError(f"{directory} logs {tag} but no hyperparameters, so its seed is unknown; leave it out")
    text = log.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    cells = [line.strip("|").split("|", 1) for line in text.splitlines()[2:]]
    options = {name: value for name, value in (cell for cell in cells if len(cell) == 2)}
    missing = [name for name in (*by, "seed") if name not in options]
    if missing:
        raise CurvesError(f"{directory} logs no hyperparameter {missing[0]!r}, only {sorted(options)}; change --by")
    events = log.Scalars(tag)
    return Run(
        algorithm=", ".join(options[name] for name in by),
        task=" ".join(part for part in (options.get("env_id", ""), options.get("task", "")) if part),
        seed=int(options["seed"]),
        steps=np.array([event.step for event in events], dtype=np.float64),
        values=np.array([event.value for event in events], dtype=np.float64),
        minutes=(events[-1].wall_time - events[0].wall_time) / 60,
    )


def find_runs(directories: Sequence[Path], *, tag: str, by: Sequence[str]) -> list[Run]:
    """Every run below the directories that logs the tag, by algorithm, task and seed.

    Raises:
        CurvesError: there is none, or two have the same algorithm, task and seed.
    """
    logs = sorted({path.parent for directory in directories for path in directory.rglob("events.out.tfevents.*")})
    found: dict[tuple[str, str, int], Run] = {}
    for directory in logs:
        run = read_run(directory, tag=tag, by=by)
        if run is None:
            continue
        key = (run.algorithm, run.task, run.seed)
        if key in found:
            raise CurvesError(
                f"{directory} is the second run of {key[0]!r} on {key[1]!r} with seed {key[2]}; remove one, or name in "
                "--by the hyperparameters in which they differ"
            )
        found[key] = run
    if not found:
        raise CurvesError(f"no log below {', '.join(map(str, directories))} holds {tag!r}; check --runs and --tag")
    return [found[key] for key in sorted(found)]


def on_grid(run: Run, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values at the env steps of `grid` [P], linear between those logged, constant before the first and past the last.

    A run that stopped early because it had converged keeps its last value.
    """
    return np.interp(grid, run.steps, run.values)


def iqm(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interquartile mean over tasks and seeds: [T, S, P] to [P]."""
    return trim_mean(scores.reshape(-1, scores.shape[-1]), 0.25, axis=0)


def interval(
    scores: NDArray[np.float64], *, resamples: int, seed: int = 0, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds [P] of the interquartile mean: seeds [T, S, P] drawn with replacement within each task, percentiles."""
    rng = np.random.default_rng(seed)
    tasks, seeds, points = scores.shape
    drawn = np.empty((resamples, points))
    for i in range(resamples):
        rows = rng.integers(seeds, size=(tasks, seeds))
        drawn[i] = iqm(np.take_along_axis(scores, rows[..., None], axis=1))
    tail = 50 * (1 - confidence)
    return np.percentile(drawn, tail, axis=0), np.percentile(drawn, 100 - tail, axis=0)


def stack(runs: Sequence[Run], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores [T, S, P] of one algorithm.

    Raises:
        CurvesError: its tasks have different numbers of seeds.
    """
    tasks = {task: [on_grid(run, grid) for run in runs if run.task == task] for task in sorted({r.task for r in runs})}
    counts = {task: len(rows) for task, rows in tasks.items()}
    if len(set(counts.values())) > 1:
        raise CurvesError(f"{runs[0].algorithm!r} has different numbers of seeds: {counts}; run the missing ones")
    return np.array(list(tasks.values()))


def table(runs: Sequence[Run], *, tag: str, resamples: int) -> str:
    """Markdown: the last value by algorithm and task, and over all tasks the interquartile mean with its interval."""
    lines = [
        f"| algorithm | task | seeds | last {tag} (each seed) | mean | env steps | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for algorithm in sorted({run.algorithm for run in runs}):
        rows = [run for run in runs if run.algorithm == algorithm]
        for task in sorted({run.task for run in rows}):
            seeds = [run for run in rows if run.task == task]
            last = [float(run.values[-1]) for run in seeds]
            each = " ".join(f"{value:.2f}" for value in last)
            steps, minutes = np.mean([run.steps[-1] for run in seeds]), np.mean([run.minutes for run in seeds])
            figures = f"{each} | {np.mean(last):.2f} | {steps:,.0f} | {minutes:.1f}"
            lines.append(f"| {algorithm} | {task} | {len(seeds)} | {figures} |")
        scores = stack(rows, np.array([np.inf]))
        low, high = interval(scores, resamples=resamples)
        whole = f"{iqm(scores)[0]:.2f} [{low[0]:.2f}, {high[0]:.2f}]"
        lines.append(f"| **{algorithm}** | interquartile mean | {len(rows)} | | {whole} | | |")
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], path: Path, *, args: Args) -> None:
    """Interquartile mean over env steps, one line per algorithm, with its interval and the number of runs."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for algorithm in sorted({run.algorithm for run in runs}):
        rows = [run for run in runs if run.algorithm == algorithm]
        grid = np.linspace(0, max(run.steps[-1] for run in rows), args.points)
        scores = stack(rows, grid)
        low, high = interval(scores, resamples=args.resamples)
        (line,) = axes.plot(grid, iqm(scores), label=f"{algorithm} ({len(rows)} runs)")
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="env steps", ylabel=f"{args.tag}, interquartile mean", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args) -> None:
    """Read, print the table, write table and curves."""
    runs = find_runs(args.runs, tag=args.tag, by=args.by)
    text = table(runs, tag=args.tag, resamples=args.resamples)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text)
    draw(runs, args.out.with_suffix(".png"), args=args)
    print(text)
    print(f"{args.out.with_suffix('.md')}, {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except CurvesError as error:
        raise SystemExit(str(error)) from None
