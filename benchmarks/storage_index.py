"""How long `vla-rl data info` and `stats` take on a store of many episodes, as a user types them.

python benchmarks/storage_index.py --output benchmarks/results/storage_index.json
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from vla_rl.data import Episode, EpisodeStore
from vla_rl.rundir import write_json


@dataclass
class Args:
    """Settings."""

    episodes: int = 10_000
    """episodes of the store"""
    steps: int = 40
    """steps of each; their pictures have 4 x 4 pixels, since neither tool opens a file of an episode"""
    repeats: int = 5
    """calls of each tool"""
    output: Path | None = None
    """JSON file for the figures"""


def make_episode(number: int, steps: int) -> Episode:
    """Random actions and states."""
    rng = np.random.default_rng(number)
    return Episode(
        observations={
            "image": np.zeros((steps + 1, 4, 4, 3), np.uint8),
            "task_id": np.zeros(steps + 1, np.int64),
            "state": rng.standard_normal((steps + 1, 4)).astype(np.float32),
        },
        actions=rng.uniform(-1, 1, (steps, 4)).astype(np.float32),
        rewards=np.zeros(steps),
        terminations=np.arange(steps) == steps - 1,
        truncations=np.zeros(steps, dtype=bool),
        success=bool(number % 2),
        source="expert",
        task=f"task-{number % 25}",
        instruction="open the drawer",
        seed=number,
    )


def main(args: Args) -> None:
    """Measure."""
    with tempfile.TemporaryDirectory() as folder:
        with EpisodeStore(Path(folder) / "store") as store:
            for number in range(args.episodes):
                store.append(make_episode(number, args.steps))
        seconds: dict[str, list[float]] = {}
        for _ in range(args.repeats):
            for tool in ("info", "stats"):
                command = [sys.executable, "-m", "vla_rl", "data", tool, str(store.path)]
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds.setdefault(tool, []).append(round(time.perf_counter() - start, 3))
    figures = {
        "command": "python benchmarks/storage_index.py",
        "episodes": args.episodes,
        "steps": args.episodes * args.steps,
        "wall_seconds_with_the_start_of_python": seconds,
        "load_average": os.getloadavg(),
    }
    print(figures)
    if args.output is not None:
        write_json(args.output, figures)


if __name__ == "__main__":
    main(tyro.cli(Args))
