"""Flow matching as in pi0: actions by integrating a learned velocity from noise; for RL, a noisy version of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vla_rl.encoders.features import Features
from vla_rl.heads.base import ActionHead
from vla_rl.heads.chunked import check_chunk
from vla_rl.heads.pooling import PooledMLP, Pooler, sinusoidal
from vla_rl.settings import check_least, check_positive

DRAWS = 8  # (noise, time) pairs per row of a supervised batch: the VLM's part of a row is paid for once
TIME_DIM = 32  # size of the embedding of t


class FlowChain:
    """A flow integrated by K Euler steps with Gaussian noise after each (ReinFlow, arXiv 2505.22094, section 4).

    ``x_0 ~ N(0, 1)``, ``x_{k+1} ~ N(x_k + v(x_k, k / K) / K, std_k^2)``. The density of the action x_K alone is out of
    reach, that of the whole chain is a product of Gaussians; so the event is the chain, flat [(K + 1) * A], with x_K at
    its end.

    Args:
        velocity: (x [B, K, A], time [K, 1]) -> [B, K, A], for any number K of times.
        std: [K, A].
        batch: B.
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor], std: Tensor, *, batch: int):
        self.velocity, self.std, self.batch = velocity, std, batch
        self.steps = len(std)
        self.times = torch.arange(self.steps).to(std)[:, None] / self.steps

    @property
    def mode(self) -> Tensor:
        """The most likely chain, without any noise: from x_0 = 0 along the flow, [B, (K + 1) * A]."""
        return self._integrate(self.std.new_zeros(self.batch, *self._shape))

    @torch.no_grad()
    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draw a chain, [B, (K + 1) * A], without gradient; `noise` [B, K + 1, A] is standard normal."""
        noise = torch.randn_like(self.std.new_empty(self.batch, *self._shape)) if noise is None else noise
        return self._integrate(noise)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-density of whole chains [B, (K + 1) * A], [B]."""
        chain = actions.unflatten(-1, self._shape)
        z = (chain[:, 1:] - self._means(chain)) / self.std
        normals = 0.5 * chain[:, 0].square().sum(-1) + 0.5 * z.square().sum((-2, -1))
        return -normals - self.std.log().sum() - 0.5 * math.log(2 * math.pi) * actions.shape[-1]

    def entropy(self) -> Tensor:
        """Entropy of the chain, [B]; exact, as the noise does not depend on x. It is no bound on that of the action."""
        constant = 0.5 * math.log(2 * math.pi * math.e) * math.prod(self._shape)
        return (self.std.log().sum() + constant).expand(self.batch)

    def kl(self, other: FlowChain) -> Tensor:
        """KL(self || other) between chains, [B], without bias from one chain of `self`, each step in closed form.

        It is an upper bound on the KL between the actions (data processing).
        """
        chain = self.sample().unflatten(-1, self._shape)
        ratio = (self.std / other.std).square()
        shift = ((self._means(chain) - other._means(chain)) / other.std).square()
        return 0.5 * (ratio + shift - 1 - ratio.log()).sum((-2, -1))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.steps + 1, self.std.shape[-1]

    def _means(self, chain: Tensor) -> Tensor:
        """Where each step leads without noise, [B, K, A]."""
        return chain[:, :-1] + self.velocity(chain[:, :-1], self.times) / self.steps

    def _integrate(self, noise: Tensor) -> Tensor:
        chain = [noise[:, 0]]
        for k in range(self.steps):
            velocity = self.velocity(chain[-1][:, None], self.times[k : k + 1])[:, 0]
            chain.append(chain[-1] + velocity / self.steps + self.std[k] * noise[:, k + 1])
        return torch.stack(chain, dim=1).flatten(1)


class FlowHead(ActionHead):
    """Token learner -> latent; a small network gives the velocity of x at time t (pi0, arXiv 2410.24164, section IV).

    Supervised: conditional flow matching, ``E || v(t a + (1 - t) x_0, t) - (a - x_0) ||^2`` with x_0 ~ N(0, 1) and t
    uniform. Acting: Euler steps from x_0 = 0 (deterministic), or the noisy chain, which PPO trains: the distribution's
    event is the chain, and `executed` reads the action off its end. Entropy and KL are of the chain.

    Args:
        feature_dim: D of the encoder's tokens.
        action_dim: A, or chunk * A.
        integration_steps: K, Euler steps from noise to action.
        chunk: H, how many env steps an action covers.
        state_dim: S; 0 without proprioception.
        width: width of the token learner.
        num_queries: learned queries of the token learner.
        hidden_dim: size of the hidden layers.
        init_std: standard deviation of the noise of each step of the chain at the start of stage 1. The flow contracts
            what the earlier steps add, so the action's is little more than that.
        pooler: from tokens to one vector; see `vla_rl.heads.pooling`.

    Raises:
        ValueError: `action_dim` is no multiple of `chunk`, or another number is out of range.
    """

    supports_rl = True

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        *,
        integration_steps: int = 4,
        chunk: int = 1,
        state_dim: int = 0,
        width: int = 128,
        num_queries: int = 8,
        hidden_dim: int = 256,
        init_std: float = 0.2,
        pooler: Pooler = "token_learner",
    ):
        super().__init__()
        check_chunk(action_dim, chunk)
        check_least(1, integration_steps=integration_steps)
        check_positive(init_std=init_std)
        self._config = {
            "feature_dim": feature_dim,
            "action_dim": action_dim,
            "integration_steps": integration_steps,
            "chunk": chunk,
            "state_dim": state_dim,
            "width": width,
            "num_queries": num_queries,
            "hidden_dim": hidden_dim,
            "init_std": init_std,
            "pooler": pooler,
        }
        self.action_dim, self.chunk, self.init_std = action_dim, chunk, init_std
        self.body = PooledMLP(
            feature_dim,
            state_dim=state_dim,
            width=width,
            num_queries=num_queries,
            hidden_dim=hidden_dim,
            pooler=pooler,
        )
        self.from_latent = nn.Linear(hidden_dim, hidden_dim)
        self.from_action = nn.Linear(action_dim, hidden_dim)
        self.from_time = nn.Linear(TIME_DIM, hidden_dim)
        self.velocity = nn.Sequential(
            nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, action_dim)
        )
        self.log_std = nn.Parameter(torch.full((integration_steps, action_dim), math.log(init_std)))

    def config(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this head."""
        return dict(self._config)

    def distribution(self, features: Features, state: Tensor | None) -> FlowChain:
        """The noisy chain, batch [B], event [(K + 1) * A]."""
        return FlowChain(self._field(features, state), self.log_std.exp(), batch=len(features))

    def executed(self, actions: Tensor) -> Tensor:
        """The end of the chain, [B, A]."""
        return actions[..., -self.action_dim :]

    def predict(self, features: Features, state: Tensor | None) -> Tensor:
        """The end of the noiseless chain from x_0 = 0, [B, A]."""
        return self.executed(self.distribution(features, state).mode)

    def supervised_loss(self, features: Features, state: Tensor | None, actions: Tensor) -> Tensor:
        """The flow-matching loss, a mean over `DRAWS` pairs of noise and time per row."""
        noise = torch.randn(len(actions), DRAWS, self.action_dim, device=actions.device)
        time = torch.rand(len(actions), DRAWS, 1, device=actions.device)
        target = actions[:, None] - noise
        velocity = self._field(features, state)(noise + time * target, time)
        return nn.functional.mse_loss(velocity, target) + self.body.auxiliary_loss(features)

    @torch.no_grad()
    def start_exploration(self, features: Features, state: Tensor | None) -> None:
        """Reset the noise of every step to `init_std`."""
        self.log_std.fill_(math.log(self.init_std))

    def _field(self, features: Features, state: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity at (x [B, K, A], time [K, 1] or [B, K, 1]) given the features."""
        latent = self.from_latent(self.body(features, state))[:, None]

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            clock = self.from_time(sinusoidal(100 * time.squeeze(-1), TIME_DIM))
            return self.velocity(latent + self.from_action(x) + clock).float()

        return velocity
