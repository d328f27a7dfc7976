"""The demo over several seeds: success by group and stage, per seed and pooled, with the gain on paired episodes.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --out benchmarks/results/demo.json

Runs that exist already under `--root` are read, not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from vla_rl.evaluation import EvaluationResult, TaskResult, paired_difference, wilson_interval
from vla_rl.report import GROUPS, evaluations, first_and_last, versions


@dataclass
class Args:
    """Which runs."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """one demo per seed, one after the other"""
    root: Path = Path("runs/demo-seeds")
    """work directories go to <root>/seed-<s>"""
    out: Path = Path("benchmarks/results/demo.json")
    """summary"""
    demo_args: str = ""
    """further arguments for `vla-rl demo`"""


def pooled(results: list[EvaluationResult]) -> tuple[float, float, float, int]:
    """Mean success over seeds and tasks, its Wilson interval over all episodes, and their number.

    The interval knows of episodes, not of the spread between training seeds, which is given beside it.
    """
    tasks: list[TaskResult] = [task for result in results for task in result.tasks.values()]
    n = sum(task.n for task in tasks)
    successes = sum(task.successes for task in tasks)
    return successes / n, *wilson_interval(successes, n), n


def main(args: Args) -> None:
    """Run, read, print, write."""
    runs = {}
    for seed in args.seeds:
        workdir = args.root / f"seed-{seed}"
        if not (workdir / "report.md").is_file():
            command = ["vla-rl", "demo", "--seed", str(seed), "--workdir", str(workdir), *args.demo_args.split()]
            print("$", " ".join(command), flush=True)
            subprocess.run(command, check=True)
        runs[seed] = json.loads((workdir / "results.json").read_text())
    stages = {seed: evaluations(results) for seed, results in runs.items()}
    summary: dict[str, object] = {
        "command": "python " + " ".join(sys.argv),
        "versions": versions(),
        "minutes": {seed: round(results["seconds"]["total"] / 60, 2) for seed, results in runs.items()},
        "stage1": {
            seed: {key: value for key, value in results.items() if key.endswith("-stage1") and "-after-" not in key}
            for seed, results in runs.items()
        },
    }
    table, gains = [], []
    for label in stages[args.seeds[0]]:
        for group in GROUPS:
            found = [stages[seed][label][group] for seed in args.seeds if group in stages[seed][label]]
            if found:
                rate, low, high, n = pooled(found)
                per_seed = [result.mean for result in found]
                tasks = {name: float(np.mean([result.tasks[name].rate for result in found])) for name in found[0].tasks}
                table.append(
                    {"stage": label, "group": group, "success": rate, "interval": [low, high], "n": n,
                     "per_seed": per_seed, "per_task": tasks}
                )  # fmt: skip
    for group in GROUPS:
        pairs = [first_and_last(runs[seed], group) for seed in args.seeds]
        found = [paired_difference(*pair) for pair in pairs if pair is not None]
        gains.append({"group": group, "per_seed": found, "mean": float(np.mean([change[0] for change in found]))})
    summary |= {"success": table, "gain": gains}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(summary, indent=2) + "\n")
    print("| stage | tasks | success [95 % Wilson, episodes pooled] | n | per seed |\n|---|---|---|---|---|")
    for row in table:
        low, high = row["interval"]
        seeds = ", ".join(f"{value:.2f}" for value in row["per_seed"])
        print(
            f"| {row['stage']} | {row['group']} | {row['success']:.2f} [{low:.2f}, {high:.2f}] | {row['n']} | {seeds} |"
        )
    for row in gains:
        print(f"gain, {row['group']}: {row['mean']:+.2f}; per seed (paired episodes) {row['per_seed']}")
    print("minutes:", summary["minutes"])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
