"""Pictures of the variants with the scripted expert's success: ``python benchmarks/contact_sheet.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
from numpy.typing import NDArray
from vla_rl_envs import make_expert
from vla_rl_envs.tasks import RL_TASKS, VARIANTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUTPUT = Path(__file__).parents[1] / "docs" / "variants" / "contact_sheet.png"


def picture(task: str, variant: str, *, size: int, seed: int) -> NDArray[np.uint8]:
    """First picture of the episode started by ``seed``."""
    env = gym.make("vla_rl_envs:VLA/MetaWorld-v0", task=task, variant=variant, image_size=size)
    observation, _ = env.reset(seed=seed)
    return observation["image"]


def expert_success(task: str, variant: str, *, seeds: int) -> float:
    """Share of ``seeds`` episodes (seeds 0, 1, ...) that the expert solves within 150 steps."""
    env = gym.make("vla_rl_envs:VLA/MetaWorld-v0", task=task, variant=variant, horizon=150, render_quality="none")
    expert, successes = make_expert(env), 0
    for seed in range(seeds):
        env.reset(seed=seed)
        done = False
        while not done:
            _, _, terminated, truncated, info = env.step(expert(env))
            done = terminated or truncated
        successes += info["success"]
    return successes / seeds


def main() -> None:
    """Draw one row per task and one column per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="expert episodes per tile")
    parser.add_argument("--size", type=int, default=160, help="pixels per tile")
    parser.add_argument("--seed", type=int, default=3, help="seed of the pictures")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    tasks = [task for task, _ in RL_TASKS]
    names = ["original", *VARIANTS[tasks[0]]]
    figure, axes = plt.subplots(
        len(tasks), len(names), figsize=(1.75 * len(names), 2.0 * len(tasks)), dpi=120, squeeze=False
    )
    for row, task in enumerate(tasks):
        for column, name in enumerate(names):
            axis = axes[row, column]
            axis.imshow(picture(task, name, size=args.size, seed=args.seed))
            axis.set_axis_off()
            success = expert_success(task, name, seeds=args.seeds)
            axis.set_title(f"{task}\n{name}, expert {success:.2f}", fontsize=7)
            print(f"{task:24s} {name:12s} expert {success:.2f} (n={args.seeds}, 150 steps)", flush=True)
    figure.tight_layout()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
