"""How fast the phases of finished runs went, per second: what `vla-rl train --dry-run` reckons minutes with.

    python benchmarks/phase_rates.py runs/demo runs/metaworld-base

Medians over the runs that have the phase, written to `benchmarks/results/phase_rates.json`. Give runs that had the
machine to themselves.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from vla_rl.report import versions
from vla_rl.runs import Run, read_run


@dataclass
class Args:
    """Which runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """directories of finished runs"""
    out: Path = Path("benchmarks/results/phase_rates.json")
    """summary"""


def rates(run: Run) -> dict[str, float]:
    """Units per second of every phase of a run; the supervised stages by what they train."""
    seconds, found = run.results["seconds"], {}
    played = [(label, groups) for label, groups in run.evaluations.items()]
    for label, groups in played:
        phase = label.replace("after-stage0", "eval-stage0").replace("after-stage", "eval")
        steps = sum(e.length for result in groups.values() for task in result.tasks.values() for e in task.episodes)
        if phase in seconds:
            found.setdefault("eval_steps", []).append(steps / seconds[phase])
    for phase, duration in seconds.items():
        stage = "stage0" if phase == "stage0" else "stage2" if phase.endswith("-stage2") else None
        if stage is not None:
            config = run.config[stage]
            found.setdefault(f"{config['scope']}_samples", []).append(config["steps"] * config["batch_size"] / duration)
        elif phase.endswith("-stage1") and run.config["stage1_mode"] == "ppo":
            found.setdefault("stage1_steps", []).append(run.results[phase]["num_env_steps"] / duration)
        elif phase == "collect" and (index := run.path / "expert_data" / "data" / "episodes.jsonl").is_file():
            with index.open() as lines:
                found.setdefault("expert_episodes", []).append(sum(1 for _ in lines) / duration)
    return {name: median(values) for name, values in found.items()}


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    found_runs = {path.name: read_run(path) for path in args.runs}
    by_run = {name: rates(run) for name, run in found_runs.items()}
    names = sorted({name for found in by_run.values() for name in found})
    summary = {name: median(found[name] for found in by_run.values() if name in found) for name in names}
    result = {
        "command": shlex.join(["python", "benchmarks/phase_rates.py", *(path.name for path in args.runs)]),
        "cores": os.cpu_count(),
        "versions": versions(),
        "rates_per_second": summary,
        "runs": by_run,
        "minutes": {name: run.results["seconds"]["total"] / 60 for name, run in found_runs.items()},
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    json.dump(summary, sys.stdout, indent=2)
