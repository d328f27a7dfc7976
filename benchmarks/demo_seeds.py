"""The demo's experiment over several seeds, beside its controls: success by group and stage, and paired gains.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --out benchmarks/results/demo.json

Runs that exist already under `--root` are read, not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vla_rl.evaluation import EvaluationResult, TaskResult, paired_difference, wilson_interval
from vla_rl.report import GROUPS, evaluations, first_and_last, versions

POLICY = Path(__file__).parents[1] / "vla_rl" / "assets" / "metaworld-base"
METHODS: dict[str, tuple[str, ...]] = {
    "ire-vla": (),
    "filtered-bc": ("--method", "filtered-bc", "--train.collect-episodes", "288"),
    "more-sft": ("--train.stage1-mode", "none", "--train.stage2-data", "expert"),
}
"""What is added to `vla-rl train metaworld-demo`: the demo itself; about as many env steps (40,000) without RL, their
successes imitated; and the same supervised steps on the demonstrations alone."""


@dataclass
class Args:
    """Which runs."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """one run per seed and method, one after the other"""
    methods: tuple[str, ...] = tuple(METHODS)
    """rows of METHODS"""
    root: Path = Path("runs/demo-seeds")
    """work directories go to <root>/<method>-<seed>"""
    out: Path = Path("benchmarks/results/demo.json")
    """summary"""


def pooled(results: list[EvaluationResult]) -> tuple[float, float, float, int]:
    """Mean success over seeds and tasks, its Wilson interval over all episodes, and their number.

    The interval knows of episodes, not of the spread between training seeds, which is given beside it. The runs start
    from one checkpoint and evaluate on the same reset seeds, so before stage 1 their results are one: it counts once.
    """
    distinct = {json.dumps(result.to_dict(), sort_keys=True): result for result in results}
    tasks: list[TaskResult] = [task for result in distinct.values() for task in result.tasks.values()]
    n = sum(task.n for task in tasks)
    successes = sum(task.successes for task in tasks)
    return successes / n, *wilson_interval(successes, n), n


def run(method: str, seed: int, root: Path) -> dict[str, Any]:
    """Results of one run, made if it is not there."""
    workdir = root / f"{method}-{seed}"
    if not (workdir / "report.md").is_file():
        # A control that collapses is to be seen, not rescued.
        fixed = ["--policy", str(POLICY), "--guards.rollback-after", "0"]
        options = [*fixed, "--train.seed", str(seed), "--workdir", str(workdir), *METHODS[method]]
        command = ["vla-rl", "train", "metaworld-demo", *options]
        print("$", " ".join(command), flush=True)
        subprocess.run(command, check=True)
    return json.loads((workdir / "results.json").read_text())


def summarize(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Success by stage and group, gains on paired episodes, minutes and stage-1 figures of one method's runs."""
    stages = {seed: evaluations(results) for seed, results in runs.items()}
    table, gains = [], {}
    for label in next(iter(stages.values())):
        for group in GROUPS:
            found = [stages[seed][label][group] for seed in runs if group in stages[seed][label]]
            if found:
                rate, low, high, n = pooled(found)
                tasks = {name: float(np.mean([result.tasks[name].rate for result in found])) for name in found[0].tasks}
                table.append(
                    {"stage": label, "group": group, "success": rate, "interval": [low, high], "n": n,
                     "per_seed": [result.mean for result in found], "per_task": tasks}
                )  # fmt: skip
    for group in GROUPS:
        pairs = [first_and_last(results, group) for results in runs.values()]
        gains[group] = [paired_difference(*pair) for pair in pairs if pair is not None]
    stage1 = {
        seed: {key: value for key, value in results.items() if key.endswith("-stage1") and "-after-" not in key}
        for seed, results in runs.items()
    }
    minutes = {seed: round(results["seconds"]["total"] / 60, 2) for seed, results in runs.items()}
    return {"minutes": minutes, "stage1": stage1, "success": table, "gain_per_seed": gains}


def main(args: Args) -> None:
    """Run, read, print, write."""
    summary: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "versions": versions()}
    for method in args.methods:
        summary[method] = summarize({seed: run(method, seed, args.root) for seed in args.seeds})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(summary, indent=2) + "\n")
    print(
        "| method | stage | tasks | success [95 % Wilson, episodes pooled] | n | per seed |\n|---|---|---|---|---|---|"
    )
    for method in args.methods:
        for row in summary[method]["success"]:
            low, high = row["interval"]
            seeds = ", ".join(f"{value:.2f}" for value in row["per_seed"])
            cells = (
                method,
                row["stage"],
                row["group"],
                f"{row['success']:.2f} [{low:.2f}, {high:.2f}]",
                row["n"],
                seeds,
            )
            print("|", " | ".join(map(str, cells)), "|")
        for group, changes in summary[method]["gain_per_seed"].items():
            print(f"{method}: gain per seed, paired episodes, {group}: {changes}")
        print(f"{method}: minutes {summary[method]['minutes']}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
