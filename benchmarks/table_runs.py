"""One run of the tables as a JSON file: made from a work directory, read back, pooled over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.evaluation import EpisodeOutcome, EvaluationResult, TaskResult
from vla_rl.report import evaluations
from vla_rl.rundir import RunDirectory, write_json

Phases = dict[str, dict[str, EvaluationResult]]
"""Label of an evaluation, in the order of the run -> group of tasks -> result."""


@dataclass(frozen=True)
class TableRun:
    """What a file of the tables holds.

    Attributes:
        method: the row.
        seed: of the run.
        phases: its evaluations.
        data: the whole file.
    """

    method: str
    seed: int
    phases: Phases
    data: dict[str, Any]

    def last(self, group: str) -> EvaluationResult | None:
        """The latest evaluation of a group; None if it was never evaluated."""
        found = [groups[group] for groups in self.phases.values() if group in groups]
        return found[-1] if found else None

    def first(self, group: str) -> EvaluationResult | None:
        """The evaluation of a group after stage 0."""
        return self.phases["after-stage0"].get(group)

    def after_tasks(self, group: str) -> list[EvaluationResult]:
        """The group's evaluation after stage 0 and the latest one of each RL task, in the order of learning."""
        latest = {label.partition("-")[0]: groups[group] for label, groups in self.phases.items() if group in groups}
        return list(latest.values())


def summarize(workdir: str | Path, **head: Any) -> dict[str, Any]:
    """The content of a run's file: `head`, then what the work directory of the finished run says.

    Args:
        workdir: of `vla-rl train`.
        **head: preset, method, seed and all else that the work directory does not know.
    """
    run = RunDirectory(workdir, resume=True)
    results = run.read_results()
    stage1 = {label: entry for label, entry in results.items() if label.endswith("-stage1") and "-after-" not in label}
    curves: dict[str, list[list[float | None]]] = {label: [] for label in stage1}
    for entry in run.metrics():
        if entry["phase"] in curves and "charts/success_rate" in entry:
            rate = entry["charts/success_rate"]
            curves[entry["phase"]].append([entry["step"], None if math.isnan(rate) else rate])
    phases = evaluations(results)
    return {
        **head,
        "minutes": round(results["seconds"]["total"] / 60, 2),
        "seconds": {phase: round(value, 1) for phase, value in results["seconds"].items()},
        "env_steps": sum(entry["num_env_steps"] for entry in stage1.values()),
        "vlm_frames": sum(entry["num_vlm_frames"] for entry in stage1.values()),
        "stage1": {label: entry | {"noisy_success": curves[label]} for label, entry in stage1.items()},
        "success": {
            label: {group: round(result.mean, 4) for group, result in groups.items()}
            for label, groups in phases.items()
        },
        "evaluations": {
            label: {group: compact(result) for group, result in groups.items()} for label, groups in phases.items()
        },
    }


def compact(result: EvaluationResult) -> dict[str, Any]:
    """Every episode of every task in two lines: "0110" for the successes, and the lengths."""
    return {
        name: {
            "n": task.n,
            "successes": task.successes,
            "seeds": [task.episodes[0].seed, task.episodes[-1].seed],
            "success": "".join(str(int(episode.success)) for episode in task.episodes),
            "lengths": " ".join(str(episode.length) for episode in task.episodes),
        }
        for name, task in result.tasks.items()
    }


def expand(data: Mapping[str, Any]) -> EvaluationResult:
    """What `compact` was given, without the returns (nan)."""
    tasks = {}
    for name, task in data.items():
        first, last = task["seeds"]
        episodes = zip(range(first, last + 1), task["success"], task["lengths"].split(), strict=True)
        tasks[name] = TaskResult(
            tuple(EpisodeOutcome(seed, success == "1", int(length), math.nan) for seed, success, length in episodes)
        )
    return EvaluationResult(tasks)


def run_file(directory: str | Path, method: str, seed: int) -> Path:
    """Where the run of a row and a seed is kept."""
    return Path(directory) / f"{method}-s{seed}.json"


def write_run(directory: str | Path, content: Mapping[str, Any]) -> Path:
    """Write the file of one run."""
    path = run_file(directory, content["method"], content["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path


def read_run(path: Path) -> TableRun:
    """Read the file of one run.

    Raises:
        ValueError: the file is called other than its content says.
    """
    data = json.loads(path.read_text())
    if path != run_file(path.parent, data["method"], data["seed"]):
        raise ValueError(f"{path} holds {data['method']} of seed {data['seed']}; rename it to method-s<seed>.json")
    phases = {
        label: {group: expand(tasks) for group, tasks in groups.items()}
        for label, groups in data["evaluations"].items()
    }
    return TableRun(data["method"], data["seed"], phases, data)


def read_runs(directory: str | Path) -> dict[str, list[TableRun]]:
    """All runs of a preset: row -> its runs by rising seed.

    Raises:
        ValueError: the runs of one seed began with different stages 0, or runs had different options, so that they
            cannot be compared.
    """
    runs = sorted((read_run(path) for path in Path(directory).glob("*.json")), key=lambda run: (run.method, run.seed))
    starts: dict[int, str | None] = {}
    for run in runs:
        if run.data["stage0_sha256"] != starts.setdefault(run.seed, run.data["stage0_sha256"]):
            raise ValueError(
                f"{run_file(directory, run.method, run.seed)} began with another stage 0 than other runs of its seed; "
                "remove the files of one of the two and run benchmarks/tables.py again"
            )
        if run.data["options"] != runs[0].data["options"]:
            raise ValueError(
                f"{run_file(directory, run.method, run.seed)} was made with the options {run.data['options']}, "
                f"{runs[0].method} with {runs[0].data['options']}; make all runs of a table with the same"
            )
    found: dict[str, list[TableRun]] = {}
    for run in runs:
        found.setdefault(run.method, []).append(run)
    return found


def pool(results: Iterable[EvaluationResult]) -> EvaluationResult:
    """The episodes of several seeds' evaluations of one group as one evaluation.

    Raises:
        ValueError: an episode's seed comes twice (the same episode would count as two), or the tasks differ.
    """
    results = list(results)
    names = list(results[0].tasks)
    if any(set(result.tasks) != set(names) for result in results):
        raise ValueError(f"cannot pool evaluations of different tasks: {[list(result.tasks) for result in results]}")
    tasks = {}
    for name in names:
        episodes = [episode for result in results for episode in result.tasks[name].episodes]
        if len({episode.seed for episode in episodes}) < len(episodes):
            raise ValueError(
                f"{name!r} was evaluated on the same reset seeds by two runs; give each seed its eval_seed"
            )
        tasks[name] = TaskResult(tuple(sorted(episodes, key=lambda episode: episode.seed)))
    return EvaluationResult(tasks)


def common_seeds(first: Sequence[TableRun], second: Sequence[TableRun]) -> list[tuple[TableRun, TableRun]]:
    """The runs of two rows that share a seed, paired."""
    by_seed = {run.seed: run for run in second}
    return [(run, by_seed[run.seed]) for run in first if run.seed in by_seed]
