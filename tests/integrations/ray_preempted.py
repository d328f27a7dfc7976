"""Stage 1 on the workers of a Ray cluster of its own, with snapshots; says "here" after every update.

python ray_preempted.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray
import torch
from ray_cluster import toy_envs
from tiny import tiny_policy

from vla_rl.integrations.ray import RayRolloutCollector, RolloutWorkers
from vla_rl.preemption import stop_on_sigterm
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.snapshots import StageSnapshots
from vla_rl.rl.stage1 import run_ppo

CONFIG = PPOConfig(
    total_timesteps=600, num_envs=4, rollout_steps=25, minibatch_size=50, update_epochs=1, critic_warmup_updates=1,
    converged_success=float("inf"),
)  # fmt: skip


def main(folder: Path) -> None:
    """Begin the stage, or go on with it; `trained` and `result.json` in the folder are what came of it."""
    torch.set_num_threads(1)
    policy = tiny_policy(init_std=1.0)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    said: list[str] = []
    snapshots = StageSnapshots(folder / "snapshots", of={"task": "reach-red"}, say=said.append)
    with (
        RolloutWorkers(policy, toy_envs, num_envs=CONFIG.num_envs, num_workers=2) as workers,
        stop_on_sigterm(),
        snapshots.on_sigterm(),
    ):
        result = run_ppo(
            policy,
            workers,
            task="reach-red",
            config=CONFIG,
            make_collector=RayRolloutCollector,
            snapshots=snapshots,
            seed=3,
            log=lambda metrics, step: print("here", flush=True),
        )
        policy.save_pretrained(folder / "trained")
        snapshots.finish()
    summary = {"num_env_steps": result.num_env_steps, "num_episodes": result.num_episodes, "said": said}
    (folder / "result.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
