"""Success of the scripted experts on every Meta-World task and variant: ``python benchmarks/experts.py``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from vla_rl_envs import make_expert
from vla_rl_envs.tasks import TASKS, VARIANTS

OUTPUT = Path(__file__).parent / "results" / "experts.json"


def measure(task: str, variant: str, *, seeds: int, horizon: int) -> dict[str, Any]:
    """Run the expert once per seed (0 ... seeds - 1), on states only."""
    env = gym.make("vla_rl_envs:VLA/MetaWorld-v0", task=task, variant=variant, horizon=horizon, render_quality="none")
    expert = make_expert(env)
    solved: list[int] = []
    for seed in range(seeds):
        env.reset(seed=seed)
        length, done, info = 0, False, {}
        while not done:
            _, _, terminated, truncated, info = env.step(expert(env))
            length, done = length + 1, terminated or truncated
        if info["success"]:
            solved.append(length)
    return {
        "task": task,
        "variant": variant,
        "seeds": seeds,
        "horizon": horizon,
        "success": len(solved) / seeds,
        "success_within_150": sum(length <= 150 for length in solved) / seeds,
        "median_length": float(np.median(solved)) if solved else None,
    }


def main() -> None:
    """Measure, print and write ``benchmarks/results/experts.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="episodes per original task; variants get twice as many")
    parser.add_argument("--horizon", type=int, default=500, help="steps after which an episode counts as failed")
    args = parser.parse_args()
    pairs = [(task, "original", args.seeds) for task in TASKS]
    pairs += [(task, name, 2 * args.seeds) for task, variants in VARIANTS.items() for name in variants]
    rows = []
    for task, variant, seeds in pairs:
        row = measure(task, variant, seeds=seeds, horizon=args.horizon)
        rows.append(row)
        print(
            f"{task:28s} {variant:11s} n={seeds:3d} {row['success']:.2f} "
            f"within 150: {row['success_within_150']:.2f} median length {row['median_length']}",
            flush=True,
        )
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps({"command": "python benchmarks/experts.py", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
