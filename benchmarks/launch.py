"""Run one command for several tasks and seeds, a few at a time, as CleanRL's `cleanrl_utils.benchmark` does.

    python benchmarks/launch.py --workers 2 --tasks reach-red:new reach-blue:new --num-seeds 3 \
        --command "python examples/ppo_frozen_vlm.py --policy runs/sft/model --total-timesteps 20000"

A run that ended well is not repeated by the same command line; one that failed is.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    """Which runs."""

    command: str
    """what to run; `--task TASK` and `--seed SEED` are added"""
    tasks: tuple[str, ...] = ()
    """labels of tasks; none leaves `--task` out"""
    start_seed: int = 1
    """first seed"""
    num_seeds: int = 3
    """seeds per task"""
    workers: int = 1
    """runs at the same time"""
    threads: int = 1
    """threads of PyTorch and BLAS per run; several runs that spin on the same cores slow each other down"""
    logs: Path = Path("runs/launch")
    """output of every run, one file each"""


def commands(args: Args) -> list[list[str]]:
    """The command line of every run, seeds of a task together."""
    base, seeds = shlex.split(args.command), range(args.start_seed, args.start_seed + args.num_seeds)
    tasks = [("--task", task) for task in args.tasks] or [()]
    return [[*base, *task, "--seed", str(seed)] for task, seed in itertools.product(tasks, seeds)]


def log_paths(runs: Sequence[Sequence[str]], directory: Path) -> list[Path]:
    """A file for the output of each run, the same whenever the same commands are given."""
    names = [f"{'_'.join(command)}" for command in runs]
    safe = ["".join(char if char.isalnum() or char in "-.=" else "_" for char in name) for name in names]
    return [directory / f"{name[-180:]}.log" for name in safe]


def run(command: Sequence[str], log: Path, *, threads: int) -> int | None:
    """Run one command with its output in `log`; its exit code, or None if it ended well before."""
    first_line = f"$ {shlex.join(command)}"
    if log.is_file():
        lines = log.read_text(errors="replace").splitlines()
        if lines and lines[0] == first_line and lines[-1] == "exit code 0":
            return None
    count = str(threads)
    environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        file.write(first_line + "\n")
        file.flush()
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        file.write(f"\nexit code {code}\n")
    return code


def main(args: Args) -> int:
    """Run what is missing; 1 if a run failed."""
    runs = commands(args)
    args.logs.mkdir(parents=True, exist_ok=True)
    paths = log_paths(runs, args.logs)

    def one(command: list[str], path: Path) -> bool:
        start = time.perf_counter()
        code = run(command, path, threads=args.threads)
        said = {None: "done before", 0: f"done in {time.perf_counter() - start:.0f} s"}.get(code, f"exit code {code}")
        print(f"{said}: {shlex.join(command)}  ({path})", flush=True)
        return code in (None, 0)

    with ThreadPoolExecutor(args.workers) as pool:
        ended_well = list(pool.map(one, runs, paths))
    print(f"{sum(ended_well)} of {len(runs)} runs ended well")
    return 0 if all(ended_well) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
