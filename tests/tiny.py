"""The smallest encoder, policy and episodes that the tests of the learning half share; and `toy_env`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from toy import toy_env

from vla_rl.collect import run_expert
from vla_rl.data import EpisodeStore, Statistics
from vla_rl.encoders import FrozenVLMEncoder, small_vlm
from vla_rl.encoders.features import Features
from vla_rl.heads import GaussianHead
from vla_rl.policy import VLAPolicy

INSTRUCTIONS = ("reach the red square", "reach the blue square", "reach the green square")
HEAD = {"width": 16, "num_queries": 2, "hidden_dim": 16}


def tiny_encoder(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> FrozenVLMEncoder:
    size: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": 32, "vision_layers": 1, "text_layers": 1}
    return small_vlm(INSTRUCTIONS, **size, heads=2, seed=seed, dtype=dtype)


def tiny_policy(*, seed: int = 0, statistics: Statistics | None = None, **head: Any) -> VLAPolicy:
    encoder = tiny_encoder(seed=seed)
    torch.manual_seed(seed)
    kwargs = {"state_dim": 2, **HEAD, **head}
    return VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 2, **kwargs), statistics=statistics)


class DropoutHead(GaussianHead):
    """With dropout before its last layer, as a head from outside may have it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mean = torch.nn.Sequential(torch.nn.Dropout(0.5), self.mean)


def toy_store(path: Path, tasks: Sequence[str] = ("reach-red",), *, episodes: int = 3, noise: float = 0.1) -> Path:
    """Write expert episodes of the toy env to `path`."""
    from vla_rl_envs import make_expert

    with EpisodeStore(path, mode="w-") as store:
        for task in tasks:
            env = toy_env(task)
            for seed in range(episodes):
                store.append(run_expert(env, make_expert(env), task=task, seed=seed, noise=noise))
    return path


def random_features(batch: int, *, tokens: int = 6, dim: int = 32, seed: int = 0) -> Features:
    """Random tokens; the last of every second row are padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[::2, -2:] = False
    return Features(torch.randn(batch, tokens, dim, generator=generator), mask, "random")


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every weight."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that are not bit-equal."""
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}
