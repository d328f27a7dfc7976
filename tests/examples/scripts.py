"""How the tests run the single-file scripts, and the small settings that they share."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(
    path
    for pattern in ("*_vlm.py", "ire_vla_*.py", "sacfd_latent.py", "collect_demos.py", "evaluate.py")
    for path in EXAMPLES.glob(pattern)
)
SMALL_VLM = "--small-image-size 32 --small-width 16 --small-heads 2 --small-vision-layers 1 --small-text-layers 1"
SMALL_HEAD = "--width 16 --num-queries 2 --hidden-dim 16"
SMALL_PPO = "--num-envs 4 --num-steps 16 --total-timesteps 128 --minibatch-size 32 --update-epochs 1"
SL = "--{0}.steps 2 --{0}.batch-size 8 --{0}.scope all"
THREE_STAGES = (
    f"--env-id vla_rl_envs:VLA/Toy-v0 --rl-tasks reach-green --unseen-tasks reach-red:new --demos {{demos}} "
    f"--stage2.steps 2 --stage2.batch-size 8 --lora-rank 2 --init-std 3 {SMALL_PPO} {SMALL_HEAD} "
    f"--critic-warmup-iterations 0 --dtype float32"
)
RUNS = {
    "sft_vlm.py": f"--demos {{demos}} --total-timesteps 128 --batch-size 8 --num-envs 2 {SMALL_VLM} {SMALL_HEAD}",
    "ppo_frozen_vlm.py": f"--policy {{sft}} --critic-warmup-iterations 1 {SMALL_PPO}",
    "ppo_full_vlm.py": f"--policy {{sft}} --critic-warmup-iterations 1 --lora-rank 2 --init-std 3 {SMALL_PPO}",
    "ppo_replay_vlm.py": (
        f"--policy {{sft}} --demos {{demos}} --critic-warmup-iterations 1 --scope all --init-std 3 "
        f"{SL.format('replay')} {SMALL_PPO}"
    ),
    "filtered_bc_vlm.py": (
        f"--policy {{sft}} --demos {{demos}} --num-envs 4 --num-episodes 16 --init-std 3 {SL.format('sl')}"
    ),
    "sacfd_latent.py": (
        "--policy {sft} --num-envs 4 --num-steps 16 --total-timesteps 128 --num-demos 1 --critic-warmup-updates 2 "
        "--batch-size 16 --init-std 3"
    ),
    "ire_vla_metaworld.py": f"--policy {{sft}} {THREE_STAGES}",
    "ire_vla_franka_kitchen.py": f"--policy {{sft}} {THREE_STAGES}".replace(
        "--unseen-tasks reach-red:new", "--unseen-tasks"
    ),
}
"""Options with which a script that trains runs for 128 steps on the toy environment."""
CLEANRL_LOSSES = {
    "value_loss",
    "policy_loss",
    "entropy",
    "old_approx_kl",
    "approx_kl",
    "clipfrac",
    "explained_variance",
}


def run_script(monkeypatch: Any, folder: Path, name: str, options: str) -> dict[str, Any]:
    """Run a script in `folder` as `python name.py options` does; returns its module-level names at the end."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *options.split()])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def scalars(folder: Path, run: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """What a run told TensorBoard: (step, value) by tag."""
    events = EventAccumulator(str(folder / "runs" / run["run_name"]))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
