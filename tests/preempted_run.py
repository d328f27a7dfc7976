"""A run of the toy env that says where it is and waits there a moment, so that a test can send it a signal.

    python preempted_run.py WORKDIR EXPERT PLACE [METHOD [LAUNCH]]

`PLACE` is what the metrics to wait at are logged under, or "episode N" for the end of the N-th one of stage 1; empty to
run through.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import torch
from toy_run import CONFIG, toy_trainer

from vla_rl.config import with_method
from vla_rl.rl.practice import EpisodeRecord
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rundir import RunDirectory

SAC = SACfDConfig(
    total_timesteps=400, num_envs=4, rollout_steps=5, num_demos=1, learning_starts=60, utd_ratio=0.25, num_critics=2,
    batch_size=8, critic_warmup_updates=10, converged_success=float("inf"),
)  # fmt: skip


def main(workdir: str, expert: str, wait_at: str, method: str = "ire-vla", launch: str | None = None) -> None:
    """Begin the run, or go on with it."""
    torch.set_num_threads(1)
    original, note, ended = RunDirectory.log, EpisodeRecord.__call__, []

    def log(self, metrics, *, phase, step):
        original(self, metrics, phase=phase, step=step)
        if phase == wait_at:
            print("here", flush=True)
            time.sleep(1)

    def end(self, episode):
        note(self, episode)
        ended.append(episode)
        if f"episode {len(ended)}" == wait_at:
            print("here", flush=True)
            time.sleep(1)

    RunDirectory.log, EpisodeRecord.__call__ = log, end
    config = with_method(replace(CONFIG, num_workers=2, sacfd=SAC, collect_episodes=16), method)
    if launch is not None:
        config = replace(config, stage0=replace(config.stage0, steps=200))
    trainer = toy_trainer(Path(workdir), Path(expert), config=config)
    trainer.launch = launch
    trainer.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
