"""Reward beside the task's own, where success is rare or has never been seen: novelty, and a learned potential."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_rl.encoders.features import Features
from vla_rl.heads.pooling import PooledMLP
from vla_rl.rl.optimizers import load_optimizer, optimizer_state
from vla_rl.settings import check_least

Frames = tuple[Features, Tensor | None]
"""Features and normalised states of some frames."""

MAX_POSITIVES = 2048
"""Frames before success that are kept, the latest."""


@dataclass
class ExplorationConfig:
    """What helps stage 1 where the policy hardly ever succeeds; each part alone or with the others."""

    start_curriculum: bool = False
    """episodes of stage 1 begin close to what the task is about and, as the policy succeeds, ever farther away; wants
    an environment whose `reset` takes `options={"closeness": c}` and gives it back in its info, as VLA/MetaWorld-v0"""
    rnd_coef: float = 0.0
    """reward for frames unlike those seen so far (RND on cached features), in units of its own standard deviation"""
    shaping_coef: float = 0.0
    """potential of a frame that a classifier takes for one before success; needs some success, the curriculum's say"""
    learning_rate: float = 3e-4
    """Adam's learning rate of novelty's predictor and of the classifier"""
    success_window: int = 5
    """last frames of an episode that succeeded, which the classifier tells from all others"""

    def __post_init__(self) -> None:
        check_least(0, rnd_coef=self.rnd_coef, shaping_coef=self.shaping_coef)
        check_least(1, success_window=self.success_window)

    @property
    def adds_reward(self) -> bool:
        """Whether rewards are added to those of the env."""
        return self.rnd_coef > 0 or self.shaping_coef > 0


def potential_shaping(potential: Tensor, next_potential: Tensor, discounts: Tensor) -> Tensor:
    """`discount * phi(s') - phi(s)`, which leaves the best policy as it is (Ng, Harada & Russell 1999).

    Over n steps the inner potentials cancel, so the same formula serves n-step rewards.

    Args:
        potential: of the frames acted on, [B].
        next_potential: of the frames reached, [B].
        discounts: [B]: gamma^n, and 0 where the episode terminated, since a terminal state has no potential.
    """
    return discounts * next_potential - potential


class Novelty(nn.Module):
    """Random network distillation (Burda et al. 2019, arXiv 1810.12894) on VLM tokens and proprioception.

    A fixed random network makes a code of a frame and another learns to predict it; the error is small on frames like
    those that it has learned from.

    Args:
        feature_dim: D of the encoder's tokens.
        state_dim: S; 0 without proprioception.
        code_dim: size of the code.
    """

    def __init__(self, feature_dim: int, *, state_dim: int = 0, code_dim: int = 128) -> None:
        super().__init__()
        target, self.predictor = (
            PooledMLP(feature_dim, state_dim=state_dim, width=64, num_queries=8, hidden_dim=code_dim) for _ in range(2)
        )
        self.target = target.requires_grad_(False)
        self.output = nn.Linear(code_dim, code_dim)
        self.moments: Tensor
        self.register_buffer("moments", torch.zeros(3))  # number, mean and sum of squared deviations of the errors

    def error(self, features: Features, state: Tensor | None) -> Tensor:
        """Squared error of the prediction, [B]."""
        guess = self.output(self.predictor(features, state))
        return (guess - self.target(features, state)).square().mean(-1)

    @torch.no_grad()
    def bonus(self, features: Features, state: Tensor | None) -> Tensor:
        """Error over the standard deviation of the errors so far, [B]; 0 until they have one."""
        number, _, squares = self.moments
        error = self.error(features, state)
        return error / (squares / number).sqrt() if squares > 0 else torch.zeros_like(error)

    @torch.no_grad()
    def observe(self, features: Features, state: Tensor | None) -> None:
        """Count the errors of B new frames into the deviation that the bonus is divided by (Chan et al.'s update)."""
        errors = self.error(features, state)
        number, mean, squares = self.moments
        total = number + len(errors)
        shift = errors.mean() - mean
        squares = squares + (errors - errors.mean()).square().sum() + shift**2 * number * len(errors) / total
        self.moments.copy_(torch.stack([total, mean + shift * len(errors) / total, squares]))


class SuccessClassifier(nn.Module):
    """Tells frames just before success from all others; its probability serves as a potential (as in VICE, 1805.11686).

    Args:
        feature_dim: D of the encoder's tokens.
        state_dim: S; 0 without proprioception.
    """

    def __init__(self, feature_dim: int, *, state_dim: int = 0) -> None:
        super().__init__()
        self.body = PooledMLP(feature_dim, state_dim=state_dim, width=64, num_queries=8, hidden_dim=128)
        self.output = nn.Linear(128, 1)

    def forward(self, features: Features, state: Tensor | None) -> Tensor:
        """Logit of each of B frames, [B]."""
        return self.output(self.body(features, state)).squeeze(-1)

    @torch.no_grad()
    def potential(self, features: Features, state: Tensor | None) -> Tensor:
        """Probability in [0, 1], [B]."""
        return self(features, state).sigmoid()


class ExtraReward:
    """Novelty and success classifier of one stage 1, which learn from its frames as they come.

    Args:
        feature_dim: D of the encoder's tokens.
        state_dim: S; 0 without proprioception.
        config: weights; a part of weight 0 is neither made nor trained.
        device: of the features.

    Attributes:
        num_positives: frames before success that the classifier has.
    """

    def __init__(
        self,
        feature_dim: int,
        *,
        state_dim: int,
        config: ExplorationConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self._device = config, device
        self.novelty = Novelty(feature_dim, state_dim=state_dim).to(device) if config.rnd_coef > 0 else None
        self.classifier = (
            SuccessClassifier(feature_dim, state_dim=state_dim).to(device) if config.shaping_coef else None
        )
        modules = [module for module in (self.novelty, self.classifier) if module is not None]
        self._optimizer = torch.optim.Adam(
            [weight for module in modules for weight in module.parameters() if weight.requires_grad],
            lr=config.learning_rate,
        )
        self._positives: Frames | None = None
        self._fresh: list[Frames] = []
        self._latest: dict[int, deque[Frames]] = {}

    @property
    def num_positives(self) -> int:
        """Frames before success at hand."""
        return 0 if self._positives is None else len(self._positives[0])

    def state_dict(self) -> dict[str, Any]:
        """What was learned and is remembered, without the latest frames of episodes that are running."""
        return {
            "novelty": None if self.novelty is None else self.novelty.state_dict(),
            "classifier": None if self.classifier is None else self.classifier.state_dict(),
            "optimizer": optimizer_state(self._optimizer),
            "frames": [_plain(frames) for frames in (*([self._positives] if self._positives else []), *self._fresh)],
            "num_positives": self.num_positives,
        }

    def load_state_dict(self, state: dict[str, Any], *, fingerprint: str) -> None:
        """Go on from where `state_dict` was taken, with features of the encoder named."""
        for module, weights in ((self.novelty, state["novelty"]), (self.classifier, state["classifier"])):
            if module is not None:
                module.load_state_dict(weights)
        load_optimizer(self._optimizer, state["optimizer"])
        frames = [_frames(part, fingerprint, self._device) for part in state["frames"]]
        self._positives = frames.pop(0) if state["num_positives"] else None
        self._fresh = frames

    def bonus(self, features: Features, state: Tensor | None) -> Tensor:
        """Weighted novelty of frames that were reached, [B]."""
        if self.novelty is None:
            return torch.zeros(len(features), device=features.tokens.device)
        return self.config.rnd_coef * self.novelty.bonus(features, state)

    def potential(self, features: Features, state: Tensor | None) -> Tensor:
        """Weighted potential of frames, [B]; 0 until there has been a success."""
        if self.classifier is None or not self.num_positives:
            return torch.zeros(len(features), device=features.tokens.device)
        return self.config.shaping_coef * self.classifier.potential(features, state)

    def add_row(self, row: dict[str, Any]) -> None:
        """Take in one step of one group of environments, as `RolloutCollector.steps` yields it."""
        features, state, first = row["features"], row["state"], row["envs"].start
        if not row["valid"].any():  # there is no mean over no frames
            return
        valid = torch.as_tensor(row["valid"], device=features.tokens.device)
        self._fresh.append((features[valid], None if state is None else state[valid]))
        for i in row["valid"].nonzero()[0]:
            latest = self._latest.setdefault(first + int(i), deque(maxlen=self.config.success_window))
            latest.append((features[int(i)], None if state is None else state[int(i)][None]))
            if row["success"][i]:
                self._positives = _tail(
                    _join([*([self._positives] if self._positives else []), *latest]), MAX_POSITIVES
                )
            if row["terminated"][i] or row["truncated"][i] or row["success"][i]:
                latest.clear()

    def learn(self, *, batch_size: int = 256) -> dict[str, float]:
        """One pass over the frames since the last call; returns losses by name.

        Frames before success are among them. As in VICE they count as negatives there and as positives from the memory,
        which leaves their probability high as long as they are rare.
        """
        if not self._fresh:
            return {}
        features, state = _join(self._fresh)
        self._fresh = []
        if self.novelty is not None:
            self.novelty.observe(features, state)
        losses: dict[str, list[float]] = {}
        for rows in torch.randperm(len(features)).split(batch_size):
            parts = self._losses(features[rows], None if state is None else state[rows])
            if not parts:
                break
            self._optimizer.zero_grad(set_to_none=True)
            torch.stack(list(parts.values())).sum().backward()
            self._optimizer.step()
            for name, loss in parts.items():
                losses.setdefault(name, []).append(loss.item())
        return {name: sum(values) / len(values) for name, values in losses.items()}

    def _losses(self, features: Features, state: Tensor | None) -> dict[str, Tensor]:
        parts = {}
        if self.novelty is not None:
            parts["rnd_loss"] = self.novelty.error(features, state).mean()
        if self.classifier is not None and self._positives is not None:
            known, known_state = self._positives
            drawn = torch.randint(len(known), (len(features),))
            good = self.classifier(known[drawn], None if known_state is None else known_state[drawn])
            others = self.classifier(features, state)
            parts["classifier_loss"] = (F.softplus(-good).mean() + F.softplus(others).mean()) / 2
        return parts


def _join(frames: Sequence[Frames]) -> Frames:
    states = [state for _, state in frames if state is not None]
    return Features.cat([features for features, _ in frames]), torch.cat(states) if states else None


def _plain(frames: Frames) -> dict[str, Tensor | None]:
    features, state = frames
    return {"tokens": features.tokens, "mask": features.mask, "state": state}


def _frames(plain: dict[str, Any], fingerprint: str, device: torch.device | str) -> Frames:
    features = Features(plain["tokens"], plain["mask"], fingerprint).to(device)
    return features, None if plain["state"] is None else plain["state"].to(device)


def _tail(frames: Frames, count: int) -> Frames:
    features, state = frames
    return features[slice(-count, None)], None if state is None else state[-count:]
