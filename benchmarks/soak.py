"""Many env steps of the toy env through stage 1: does memory, the number of threads or files, or the speed drift?

    python benchmarks/soak.py --steps 1000000 --output benchmarks/results/soak.json

Needs Linux (it reads /proc) and an otherwise idle machine. One that changes its speed makes the last tenth differ from
the first for no fault of the run; so fresh processes take turns with the last tenth as well, each doing the work of the
first: they tell such a machine from a run that slows down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from toy_env import toy_env
from toy_run import EXPERT_TASK, toy_policy

from vla_rl.report import versions
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.stage1 import run_ppo
from vla_rl.rundir import write_json
from vla_rl.vector import WorkerVectorEnv


@dataclass
class Args:
    """Settings."""

    steps: int = 1_000_000
    """env steps"""
    num_envs: int = 16
    """parallel environments"""
    rollout_steps: int = 64
    """env steps per environment between two looks at the processes"""
    num_workers: int = 2
    """processes that step them"""
    seed: int = 0
    """seed"""
    turns: int = 8
    """fresh processes that take turns with the last tenth"""
    output: Path | None = None
    """JSON file for the figures"""


@dataclass
class Sample:
    """One look at the processes, after an update."""

    steps: int
    seconds: float
    cpu_seconds: float
    rss_mb: float
    workers_rss_mb: float
    threads: int
    files: int


def children(pid: int) -> list[int]:
    """Processes that a process has started and that still run."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def look(steps: int, start: float) -> Sample:
    """Read the processes."""
    pid = os.getpid()
    return Sample(
        steps=steps,
        seconds=time.monotonic() - start,
        cpu_seconds=sum(map(cpu_seconds, [pid, *children(pid)])),
        rss_mb=rss_mb(pid),
        workers_rss_mb=sum(map(rss_mb, children(pid))),
        threads=len(os.listdir("/proc/self/task")),
        files=len(os.listdir("/proc/self/fd")),
    )


def judge(samples: list[Sample]) -> dict[str, Any]:
    """Drift from the second tenth (after filling buffers) to the last; of the speed, from the first tenth."""
    total = samples[-1].steps
    tenths = [[s for s in samples if k * total / 10 < s.steps <= (k + 1) * total / 10] for k in range(10)]

    def drift(of: str) -> float:
        begin, end = (float(np.mean([getattr(s, of) for s in tenths[k]])) for k in (1, 9))
        return round(100 * (end / begin - 1), 2)

    return {
        "rss_growth_percent": drift("rss_mb"),
        "workers_rss_growth_percent": drift("workers_rss_mb"),
        "thread_growth": samples[-1].threads - tenths[1][0].threads,
        "file_growth": samples[-1].files - tenths[1][0].files,
        "steps_per_second_first_tenth": round(speed(tenths[0]), 1),
        "steps_per_second_last_tenth": round(speed(tenths[9]), 1),
    }


def speed(samples: list[Sample]) -> float:
    """Env steps per second from the first sample to the last."""
    return (samples[-1].steps - samples[0].steps) / (samples[-1].seconds - samples[0].seconds)


def fresh_speed(args: Args, steps: int) -> float:
    """Env steps per second of a new process, without its start."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "soak.json"
        words = ["--steps", steps, "--turns", 0, "--num-envs", args.num_envs, "--rollout-steps", args.rollout_steps]
        words += ["--num-workers", args.num_workers, "--seed", args.seed, "--output", output]
        subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.DEVNULL, check=True)
        return speed([Sample(**sample) for sample in json.loads(output.read_text())["samples"]])


def main(args: Args) -> None:
    """Measure."""
    torch.set_num_threads(1)
    config = PPOConfig(
        total_timesteps=args.steps, num_envs=args.num_envs, rollout_steps=args.rollout_steps, minibatch_size=512,
        update_epochs=1, converged_success=float("inf"),
    )  # fmt: skip
    env = WorkerVectorEnv(
        [partial(toy_env, EXPERT_TASK)] * args.num_envs,
        num_workers=args.num_workers,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        timeout=600,
        max_restarts=1,
    )
    samples: list[Sample] = []
    turns: list[tuple[float, float]] = []
    per_turn = max(1, args.steps // (10 * max(args.turns, 1) * args.num_envs * args.rollout_steps))  # updates
    load, start = os.getloadavg()[0], time.monotonic()

    def log(metrics: dict[str, float], steps: int) -> None:
        nonlocal start
        samples.append(look(steps, start))
        if steps < 0.9 * args.steps or len(turns) == args.turns:
            return
        marks.append(len(samples) - 1)
        if len(marks) <= per_turn:
            return
        mine = samples[marks[0] :]
        begin = time.monotonic()
        one = args.num_envs * args.rollout_steps  # the first update of a process is its start
        turns.append((speed(mine), fresh_speed(args, mine[-1].steps - mine[0].steps + one)))
        marks.clear()
        start += time.monotonic() - begin

    marks: list[int] = []
    try:
        result = run_ppo(
            toy_policy(seed=args.seed), env, task=EXPERT_TASK, config=config, max_successes=32, seed=args.seed, log=log
        )
        restarts = env.num_restarts
    finally:
        env.close()
    if not args.turns:
        write_json(args.output or Path("soak.json"), {"samples": [asdict(sample) for sample in samples]})
        return
    found = judge(samples)
    first, last = (found[f"steps_per_second_{tenth}_tenth"] for tenth in ("first", "last"))
    mine, fresh = (float(1 / np.mean([1 / turn[k] for turn in turns])) for k in (0, 1))  # of all turns together
    found |= {
        "speed_change_percent": round(100 * (last / first - 1), 2),
        "turns": [[round(speed, 1) for speed in turn] for turn in turns],
        "steps_per_second_in_turns": round(mine, 1),
        "steps_per_second_of_fresh_processes": round(fresh, 1),
        "speed_change_in_turns_percent": round(100 * (mine / fresh - 1), 2),
    }
    kept = {
        "memory (within 3 %)": max(found["rss_growth_percent"], found["workers_rss_growth_percent"]) <= 3,
        "threads and files (none more)": found["thread_growth"] <= 0 and found["file_growth"] <= 0,
        "speed (within 5 %)": abs(found["speed_change_percent"]) <= 5,
    }
    figures = {
        "command": f"python benchmarks/soak.py --steps {args.steps} --num-envs {args.num_envs} "
        f"--rollout-steps {args.rollout_steps} --num-workers {args.num_workers} --seed {args.seed}",
        "env_steps": result.num_env_steps,
        "episodes": result.num_episodes,
        "worker_restarts": restarts,
        **found,
        "kept": kept,
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "samples": [asdict(s) for s in samples[:: max(1, len(samples) // 50)]],
        "versions": versions(),
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "samples"}, indent=2))
    if args.output is not None:
        write_json(args.output, figures)
    if not all(kept.values()):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
