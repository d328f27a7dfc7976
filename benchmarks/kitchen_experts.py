"""Success of Franka Kitchen's scripted experts, with and without noise: ``python benchmarks/kitchen_experts.py``.

``--videos DIR`` writes one film per task instead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio
import numpy as np
from vla_rl_envs import make_expert
from vla_rl_envs.kitchen_experts import SCRIPTED_TASKS
from vla_rl_envs.kitchen_tasks import EXPERT_TASKS, TASK_TABLE, VARIANTS, JointTask

OUTPUT = Path(__file__).parent / "results" / "kitchen_experts.json"
NOISE = 0.1


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval."""
    z, rate = 1.96, successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return round(float(centre - half), 3), round(float(centre + half), 3)


def episode(env: gym.Env, expert: Any, *, seed: int, noise: float) -> tuple[int, bool, list[Any]]:
    """One episode of the expert with Gaussian action noise; returns its length, success and pictures."""
    rng = np.random.default_rng((seed, 1))
    observation, _ = env.reset(seed=seed)
    frames, length, done, info = [observation["image"]], 0, False, {}
    while not done:
        action = expert(env) + noise * rng.standard_normal(9)
        observation, _, terminated, truncated, info = env.step(np.clip(action, -1, 1).astype(np.float32))
        frames.append(observation["image"])
        length, done = length + 1, terminated or truncated
    return length, info["success"], frames


def measure(task: str, *, seeds: int, noise: float, horizon: int) -> dict[str, Any]:
    """Run the expert once per seed (0 ... seeds - 1), on states only."""
    env = gym.make("vla_rl_envs:VLA/FrankaKitchen-v0", task=task, horizon=horizon, render_quality="none", image_size=1)
    expert, rule = make_expert(env), TASK_TABLE[task]
    lengths, failures = [], []
    for seed in range(seeds):
        length, success, _ = episode(env, expert, seed=seed, noise=noise)
        if success:
            lengths.append(length)
        else:
            reached = env.unwrapped.data.qpos[rule.index]  # pyright: ignore[reportAttributeAccessIssue]
            failures.append({"seed": seed, "joint": round(float(reached), 3)})
    return {
        "task": task,
        "noise": noise,
        "seeds": seeds,
        "horizon": horizon,
        "rule": f"{rule.joint} beyond {rule.threshold}" if isinstance(rule, JointTask) else "kettle at its goal",
        "success": len(lengths) / seeds,
        "wilson_95": wilson(len(lengths), seeds),
        "median_length": float(np.median(lengths)) if lengths else None,
        "p90_length": float(np.percentile(lengths, 90)) if lengths else None,
        "failures": failures,
    }


def film(task: str, variant: str, folder: Path, *, seed: int, size: int, quality: str) -> None:
    """Write ``folder/task[-variant].mp4``: one noisy episode, up to its success (a gif where no mp4 can be written)."""
    env = gym.make(
        "vla_rl_envs:VLA/FrankaKitchen-v0", task=task, variant=variant, image_size=size, render_quality=quality
    )
    length, success, frames = episode(env, make_expert(env), seed=seed, noise=NOISE)
    name = task if variant == "original" else f"{task}-{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.mp4"
    try:
        imageio.mimwrite(path, frames, fps=12)  # pyright: ignore[reportArgumentType]
    except (ImportError, ValueError):
        path = path.with_suffix(".gif")
        imageio.mimwrite(path, frames, duration=1000 / 12)  # pyright: ignore[reportArgumentType]
    print(f"{path}: {length} steps, success {success}", flush=True)


def main() -> None:
    """Measure, print and write ``benchmarks/results/kitchen_experts.json``, or film."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="episodes per task of the paper; a fifth for the others")
    parser.add_argument("--horizon", type=int, default=280, help="steps after which an episode counts as failed")
    parser.add_argument("--videos", type=Path, help="write one film per task into this folder and measure nothing")
    parser.add_argument("--size", type=int, default=256, help="pixels of the films")
    parser.add_argument("--quality", default="fast", choices=("fast", "full"), help="rendering of the films")
    args = parser.parse_args()
    if args.videos:
        for task in SCRIPTED_TASKS:
            for variant in ("original", *VARIANTS.get(task, {})):
                film(task, variant, args.videos, seed=0, size=args.size, quality=args.quality)
        return
    rows = []
    for task in SCRIPTED_TASKS:
        for noise in (NOISE, 0.0):
            seeds = args.seeds if task in EXPERT_TASKS else max(1, args.seeds // 5)
            row = measure(task, seeds=seeds, noise=noise, horizon=args.horizon)
            rows.append(row)
            low, high = row["wilson_95"]
            print(
                f"{task:16s} noise {noise:.1f} n={seeds:3d} {row['success']:.2f} [{low:.2f}, {high:.2f}] "
                f"median length {row['median_length']}",
                flush=True,
            )
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/kitchen_experts.py --seeds {args.seeds} --horizon {args.horizon}"
    OUTPUT.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
