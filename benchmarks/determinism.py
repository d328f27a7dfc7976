"""The same seed gives the same run, bit for bit, whatever the number of env workers; another seed gives another.

python benchmarks/determinism.py --output benchmarks/results/determinism.json

It ends with exit code 1 where this does not hold.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from toy_run import CONFIG, outcome, settings, toy_expert, toy_trainer

from vla_rl.report import versions
from vla_rl.rundir import write_json


@dataclass
class Args:
    """Settings."""

    workers: tuple[int, ...] = (0, 1, 2, 3)
    """numbers of env workers to compare"""
    seeds: tuple[int, ...] = (0, 1)
    """seeds to do so with"""
    output: Path | None = None
    """JSON file for the figures"""


def main(args: Args) -> None:
    """Measure."""
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        expert = toy_expert(root / "expert")
        found = {}
        for seed in args.seeds:
            for workers in args.workers:
                workdir = root / f"s{seed}-w{workers}"
                toy_trainer(workdir, expert, config=replace(CONFIG, num_workers=workers), seed=seed).run()
                found[seed, workers] = outcome(workdir)
                same = found[seed, workers] == found[seed, args.workers[0]]
                print(f"seed {seed}, {workers} workers: {'the same run' if same else 'ANOTHER RUN'}", flush=True)
    equal = {seed: sum(found[seed, w] == found[seed, args.workers[0]] for w in args.workers) for seed in args.seeds}
    first, second = (found[seed, args.workers[0]] for seed in args.seeds[:2])
    figures = {
        "command": f"python benchmarks/determinism.py --workers {' '.join(map(str, args.workers))} "
        f"--seeds {' '.join(map(str, args.seeds))}",
        "workers": list(args.workers),
        "bit_equal_runs_by_seed": {str(seed): f"{count} of {len(args.workers)}" for seed, count in equal.items()},
        "other_seed_differs": first["checkpoints"] != second["checkpoints"],
        "compared": "checksums of the weights in every checkpoint, results.json, every stored episode, phases done",
        "seconds": round(time.monotonic() - start),
        "settings": settings(),
        "versions": versions(),
    }
    if args.output is not None:
        write_json(args.output, figures)
    if any(count < len(args.workers) for count in equal.values()) or not figures["other_seed_differs"]:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
