"""Action distributions: what an action head hands to RL."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class Distribution(Protocol):
    """What PPO needs from a head: batch shape [B], event shape [A], in normalised action units."""

    @property
    def mode(self) -> Tensor:
        """Most likely action, [B, A]."""
        ...

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draw an action, [B, A]; `noise` is what the head's `draw_noise` returned."""
        ...

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-density of `actions` [B, A], as [B]."""
        ...

    def entropy(self) -> Tensor:
        """Differential entropy in nats, [B]."""
        ...

    def kl(self, other: Distribution) -> Tensor:
        """KL(self || other) in nats, [B]."""
        ...


class DiagonalGaussian:
    """Independent Gaussian per action dimension.

    Args:
        mean: [B, A].
        std: [B, A] or [A].
    """

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean = mean
        self.std = std.expand_as(mean)

    @property
    def mode(self) -> Tensor:
        """The mean, [B, A]."""
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """`mean + std * noise`; `noise` [B, A] is standard normal, drawn here if None."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + self.std * noise

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-density summed over action dimensions, [B]."""
        z = (actions - self.mean) / self.std
        return -(0.5 * z.square() + self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy summed over action dimensions, [B]."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: DiagonalGaussian) -> Tensor:
        """KL(self || other), [B]."""
        ratio = (self.std / other.std).square()
        shift = ((self.mean - other.mean) / other.std).square()
        return 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1)


class StateDependentGaussian(DiagonalGaussian):
    """Gaussian whose noise is a random linear function of the latent (gSDE, Raffin et al. 2021, arXiv 2005.05719).

    With a matrix W [L, A], W_ij ~ N(0, exp(log_std_ij)^2), kept for a whole episode, the exploration `latent @ W` is
    smooth in time; marginally over W the action is Gaussian with variance `latent^2 @ exp(log_std)^2`.

    Args:
        mean: [B, A].
        latent: last hidden layer, [B, L]; its gradient is stopped, as in the paper's reference code.
        log_std: [L, A].
    """

    def __init__(self, mean: Tensor, latent: Tensor, log_std: Tensor):
        self.latent = latent.detach()
        self.scale = log_std.exp()
        variance = self.latent.square() @ self.scale.square()
        super().__init__(mean, (variance + 1e-8).sqrt())

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """`mean + latent @ (noise * exp(log_std))`; `noise` [B, L, A] is standard normal, drawn here if None."""
        if noise is None:
            noise = torch.randn(*self.latent.shape, self.mean.shape[-1], device=self.mean.device)
        return self.mean + torch.einsum("bl,bla->ba", self.latent, noise * self.scale)
