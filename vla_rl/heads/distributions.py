"""Action distributions: what an action head hands to RL."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn


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
        self.mean = mean.float()  # a head may run under autocast; densities need all their digits
        self.std = std.float().expand_as(mean)

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
        self.latent = latent.detach().float()
        self.scale = log_std.exp()
        variance = self.latent.square() @ self.scale.square()
        super().__init__(mean, (variance + 1e-8).sqrt())

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """`mean + latent @ (noise * exp(log_std))` with standard normal `noise` [B, L, A], the parts of W.

        Without any, each row has a W of its own, which need not be drawn: the marginal is sampled.
        """
        if noise is None:
            return super().sample()
        return self.mean + torch.einsum("bl,bla->ba", self.latent, noise * self.scale)


class SquashedGaussian:
    """`low + (high - low) * (1 + tanh(u)) / 2` of a Gaussian u: actions that never leave a box (SAC's policy).

    Args:
        base: Gaussian over u, batch [B], event [A].
        low: lower bounds, [A].
        high: upper bounds, [A].
    """

    def __init__(self, base: DiagonalGaussian, low: Tensor, high: Tensor):
        self.base = base
        self.centre, self.half = (high + low) / 2, (high - low) / 2

    @property
    def mode(self) -> Tensor:
        """The squashed mean, [B, A]: per dimension the median; the density itself may peak nearer to a bound."""
        return self._squash(self.base.mean)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """A squashed sample of the base, [B, A]."""
        return self._squash(self.base.sample(noise))

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-density of `actions` [B, A], [B]; those rounded onto a bound count as the number next to it."""
        nearest = 1 - torch.finfo(actions.dtype).eps
        unit = ((actions - self.centre) / self.half).clamp(-nearest, nearest)
        u = torch.atanh(unit)
        return self.base.log_prob(u) - self._log_slope(u).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy of the base plus the mean of the log-slope by Gauss-Hermite quadrature (32 nodes), [B].

        There is no closed form; for standard deviations of u up to 2 the error is below 1e-3 nats per dimension.
        """
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        u = self.base.mean[..., None] + self.base.std[..., None] * torch.as_tensor(nodes).to(self.base.mean)
        weight = torch.as_tensor(weights / weights.sum()).to(u)
        return self.base.entropy() + (self._log_slope(u.transpose(-1, -2)).transpose(-1, -2) @ weight).sum(-1)

    def kl(self, other: SquashedGaussian) -> Tensor:
        """KL(self || other), [B]: that of the Gaussians, as both are squashed by the same function."""
        return self.base.kl(other.base)

    def _squash(self, u: Tensor) -> Tensor:
        return self.centre + self.half * torch.tanh(u)

    def _log_slope(self, u: Tensor) -> Tensor:
        """Log of d action / d u; log(1 - tanh(u)^2) in the form that does not lose its digits for large u."""
        return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u)) + self.half.log()


class ChunkGaussian(DiagonalGaussian):
    """Gaussian over a chunk of H steps whose noise changes smoothly from step to step.

    Per action dimension the noise of steps g and h correlates by `smoothness ** abs(g - h)` (an autoregressive process
    of order 1). Independent noise would cancel out over a chunk: the sum of its H steps has a standard deviation of
    sqrt(H) steps, instead of up to H.

    Args:
        mean: [B, H * A], step after step.
        std: [B, H * A] or [H * A].
        chunk: H.
        smoothness: correlation of neighbouring steps, from 0 (independent) to below 1.
    """

    def __init__(self, mean: Tensor, std: Tensor, *, chunk: int, smoothness: float):
        super().__init__(mean, std)
        self.chunk = chunk
        steps = torch.arange(chunk).to(self.mean)
        self.factor = torch.linalg.cholesky(smoothness ** (steps[:, None] - steps).abs())
        self.log_det = self.factor.diagonal().log().sum()

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draw a chunk; `noise` [B, H * A] is standard normal, drawn here if None."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        with torch.autocast(self.mean.device.type, enabled=False):
            return self.mean + self.std * (self.factor @ self._steps(noise)).flatten(-2)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-density of whole chunks [B, H * A], [B]."""
        white = self._whiten((actions - self.mean) / self.std)
        return -(0.5 * white.square() + 0.5 * math.log(2 * math.pi)).sum((-2, -1)) - self._log_volume()

    def entropy(self) -> Tensor:
        """Entropy of whole chunks, [B]."""
        return self._log_volume() + 0.5 * math.log(2 * math.pi * math.e) * self.mean.shape[-1]

    def kl(self, other: ChunkGaussian) -> Tensor:
        """KL(self || other), [B]."""
        ratio = self._steps(self.std / other.std).transpose(-2, -1)[..., None] * self.factor  # [B, A, H, H]
        spread = torch.linalg.solve_triangular(other.factor, ratio, upper=False).square().sum((-3, -2, -1))
        shift = other._whiten((self.mean - other.mean) / other.std).square().sum((-2, -1))
        volumes = other._log_volume() - self._log_volume()
        return 0.5 * (spread + shift - self.mean.shape[-1]) + volumes

    def _steps(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.chunk, -1))

    def _whiten(self, z: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, self._steps(z), upper=False)

    def _log_volume(self) -> Tensor:
        return self.std.log().sum(-1) + self.log_det * (self.mean.shape[-1] // self.chunk)


class BinnedCategorical:
    """Independent categorical over equal bins of a box, per action dimension: actions as tokens (RT-2, OpenVLA).

    It is a discrete distribution: samples are bin centres, `log_prob` and `entropy` are of the bins, not densities.

    Args:
        logits: [B, A, bins].
        low: lower bounds, [A].
        high: upper bounds, [A].
    """

    def __init__(self, logits: Tensor, low: Tensor, high: Tensor):
        self.log_probs = logits.float().log_softmax(-1)
        self.low, self.high = low, high

    @property
    def mode(self) -> Tensor:
        """Centres of the most likely bins, [B, A]."""
        return self._centres(self.log_probs.argmax(-1))

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Centres of drawn bins, [B, A]; no gradient flows through them. `noise` is not used."""
        return self._centres(torch.distributions.Categorical(logits=self.log_probs).sample())

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability of the bins that `actions` [B, A] lie in, summed over dimensions, [B]."""
        return self.log_probs.gather(-1, self.bins(actions)[..., None]).squeeze(-1).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy of the bins, summed over dimensions, [B]."""
        return -(self.log_probs.exp() * self.log_probs).sum((-2, -1))

    def kl(self, other: BinnedCategorical) -> Tensor:
        """KL(self || other), summed over dimensions, [B]; both over the same bins."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum((-2, -1))

    def bins(self, actions: Tensor) -> Tensor:
        """Bins of `actions` [B, A], int64; beyond the box the outermost ones."""
        count = self.log_probs.shape[-1]
        return ((actions - self.low) / (self.high - self.low) * count).floor().long().clamp(0, count - 1)

    def _centres(self, bins: Tensor) -> Tensor:
        return self.low + (bins + 0.5) / self.log_probs.shape[-1] * (self.high - self.low)
