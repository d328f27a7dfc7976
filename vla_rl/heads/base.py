"""The contract that every action head fulfils."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.distributions import Distribution


class ActionHead(nn.Module):
    """Maps VLM tokens (and proprioception) to actions, in normalised action units.

    Subclasses give `config`, `supervised_loss` and either `distribution` (with `supports_rl = True`) or `predict`. A
    head from any package plugs in by its import path, `"my_pkg.heads:MyHead"`: its constructor must accept `config()`
    back.

    Attributes:
        supports_rl: whether `distribution` gives log-probabilities that RL can learn from.
        chunk: H, how many env steps one action covers; the head's action is then the flat [H * A].
    """

    supports_rl: bool = False
    chunk: int = 1

    def config(self) -> dict[str, Any]:
        """JSON-serialisable keyword arguments that rebuild this head.

        `action_dim` has to be among them, and `state_dim` where the head takes proprioception.
        """
        raise NotImplementedError(f"{type(self).__name__} must define config()")

    def distribution(self, features: Features, state: Tensor | None) -> Distribution:
        """Action distribution for features of B frames and state [B, S] (or None).

        Raises:
            TypeError: the head has no log-probabilities.
        """
        raise TypeError(
            f"head {type(self).__name__!r} has no log_prob, so RL cannot train it; use GaussianHead or "
            "set stage1_mode='none'"
        )

    def predict(self, features: Features, state: Tensor | None) -> Tensor:
        """Deterministic action, [B, A]."""
        return self.distribution(features, state).mode

    def supervised_loss(self, features: Features, state: Tensor | None, actions: Tensor) -> Tensor:
        """Scalar imitation loss against normalised `actions` [B, A] (the paper's J0 and J2)."""
        raise NotImplementedError(f"{type(self).__name__} must define supervised_loss()")

    def executed(self, actions: Tensor) -> Tensor:
        """What the env gets, [B, A], of a sample of the distribution; other than the sample where that carries more."""
        return actions

    def draw_noise(self, num_envs: int) -> Tensor | None:
        """Exploration noise to hold for one episode in each of `num_envs` envs; None means fresh noise every step."""
        return None

    def start_exploration(self, features: Features, state: Tensor | None) -> None:
        """Called before stage 1 with some features of the RL task, to set the size of the exploration noise."""
