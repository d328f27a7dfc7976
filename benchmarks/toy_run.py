"""The smallest run of the iterative trainer that has every stage: what the promises are measured on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from toy_env import toy_env

from vla_rl.collect import run_expert
from vla_rl.config import IterativeConfig
from vla_rl.data import EpisodeStore
from vla_rl.encoders import LoRASettings, small_vlm
from vla_rl.guards import GuardConfig
from vla_rl.heads import GaussianHead
from vla_rl.policy import VLAPolicy
from vla_rl.rl.ppo import PPOConfig
from vla_rl.sl.supervised import SLConfig
from vla_rl.trainer import IterativeTrainer

INSTRUCTIONS = ("reach the red square", "reach the blue square", "reach the green square")
EXPERT_TASK, RL_TASK = "reach-red", "reach-red:new"

_SL = SLConfig(steps=6, batch_size=16, scope="all", random_shift=0)
CONFIG = IterativeConfig(
    stage0=_SL,
    stage1=PPOConfig(
        total_timesteps=300, num_envs=4, rollout_steps=25, minibatch_size=50, update_epochs=1, critic_warmup_updates=1
    ),
    stage2=replace(_SL, scope="lora"),
    eval_episodes=2,
    rl_eval_episodes=2,
    eval_envs=2,
    num_workers=0,
    video_episodes=0,
    stop_at_zero=False,
)


def toy_policy(*, seed: int = 0, init_std: float = 1.0) -> VLAPolicy:
    """A random policy whose VLM has one layer; noisy enough to stumble on the square now and then."""
    encoder = small_vlm(
        INSTRUCTIONS, image_size=32, patch_size=16, width=32, vision_layers=1, text_layers=1, heads=2, seed=seed,
        dtype=torch.float32,
    )  # fmt: skip
    torch.manual_seed(seed)
    head = GaussianHead(encoder.feature_dim, 2, state_dim=2, width=16, num_queries=2, hidden_dim=16, init_std=init_std)
    return VLAPolicy(encoder, head)


def toy_expert(path: Path, *, episodes: int = 4) -> Path:
    """Write expert episodes to a new store at `path`."""
    from vla_rl_envs import make_expert

    with EpisodeStore(path, mode="w-") as store:
        env = toy_env()
        for seed in range(episodes):
            store.append(run_expert(env, make_expert(env), task=EXPERT_TASK, seed=seed, noise=0.1))
    return path


def toy_trainer(
    workdir: Path, expert: Path, *, config: IterativeConfig = CONFIG, guards: GuardConfig | None = None, seed: int = 0
) -> IterativeTrainer:
    """A trainer that starts the run in `workdir`, or resumes what is there."""
    arguments: dict[str, Any] = {
        "expert": EpisodeStore(expert, mode="r"),
        "rl_tasks": [RL_TASK],
        "make_envs": partial(toy_env),
        "eval_tasks": {"expert": [EXPERT_TASK], "rl": [RL_TASK]},
        "config": replace(config, seed=seed),
        "lora": LoRASettings(r=2, alpha=4),
        "guards": guards,
        "console": Console(quiet=True),
    }
    start = IterativeTrainer.resume if (workdir / "state.json").exists() else IterativeTrainer
    return start(policy=toy_policy(seed=seed), workdir=workdir, **arguments)


def outcome(workdir: Path) -> dict[str, Any]:
    """What two runs must share: checksums of every checkpoint's weights, tables, and every stored episode.

    The JSON files that transformers writes beside the weights name the folder that a model was loaded from.
    """
    state = json.loads((workdir / "state.json").read_text())
    results = json.loads((workdir / "results.json").read_text())
    data = sorted((workdir / "rl_data").iterdir()) if (workdir / "rl_data").is_dir() else []
    return {
        "done": state["done"],
        "checkpoints": {
            checkpoint: {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
            for checkpoint, files in state["files"].items()
        },
        "results": {key: value for key, value in results.items() if key != "seconds"},
        "episodes": {path.name: _episodes(path) for path in data},
    }


def _episodes(path: Path) -> list[str]:
    digests = []
    for episode in EpisodeStore(path, mode="r"):
        arrays = {**episode.observations, "actions": episode.actions, "rewards": episode.rewards}
        digest = hashlib.blake2b(digest_size=16)
        for name, array in sorted(arrays.items()):
            digest.update(f"{name}{array.shape}{array.dtype}".encode() + array.tobytes())
        digests.append(digest.hexdigest())
    return digests


def settings() -> dict[str, Any]:
    """The configuration that a figure was measured with."""
    return asdict(CONFIG)
