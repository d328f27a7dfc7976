"""Success seen by a classifier over the frozen encoder's features, learned from recorded episodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.data import Episode
from vla_rl.encoders.features import Features
from vla_rl.policy import VLAPolicy
from vla_rl.rl.exploration import SuccessClassifier

FRAMES_PER_FORWARD = 64


class SuccessDetector:
    """A judge for `SuccessSignal`: the task counts as solved when so many frames in a row look like it.

    A classifier that is wrong is the reward that the policy learns to exploit: a single frame above the threshold is
    therefore not enough, and `false_alarms` on episodes that it has not learned from should be 0. It looks at images
    alone, and costs one more forward of the VLM per step.

    Args:
        policy: its encoder looks at the frames.
        classifier: from `fit`.
        instruction: of the task.
        threshold: probability above which a frame counts.
        frames: how many in a row.
    """

    def __init__(
        self,
        policy: VLAPolicy,
        classifier: SuccessClassifier,
        *,
        instruction: str,
        threshold: float = 0.9,
        frames: int = 2,
    ) -> None:
        self.policy, self.classifier, self.instruction = policy, classifier, instruction
        self.threshold, self.frames = threshold, frames
        self._in_a_row = 0

    def __call__(self, observation: Mapping[str, Any], ended: bool) -> bool:
        """Whether the task is solved now."""
        batch = {key: np.asarray(value)[None] for key, value in observation.items()}
        features = self.policy.encode(batch, [self.instruction])
        seen = float(self.classifier.potential(features, None)) > self.threshold
        self._in_a_row = self._in_a_row + 1 if seen else 0
        return self._in_a_row >= self.frames

    def begin(self) -> None:
        """Count anew; `SuccessSignal` calls it with every reset."""
        self._in_a_row = 0

    def false_alarms(self, episodes: Iterable[Episode]) -> tuple[int, int]:
        """Of failed episodes, how many it would have called a success, and how many there are."""
        wrong = total = 0
        for episode in (episode for episode in episodes if not episode.success):
            total += 1
            self.begin()
            reached = range(1, episode.total_steps + 1)  # what a step has led to, as `SuccessSignal` asks
            wrong += any(self({key: value[t] for key, value in episode.observations.items()}, False) for t in reached)
        self.begin()
        return wrong, total

    @classmethod
    def fit(
        cls,
        policy: VLAPolicy,
        episodes: Iterable[Episode],
        *,
        instruction: str,
        last_frames: int = 1,
        steps: int = 300,
        learning_rate: float = 1e-3,
        seed: int = 0,
        **kwargs: Any,
    ) -> SuccessDetector:
        """Learn the classifier: the last frames of successes against all other frames.

        Half of every batch are frames of either kind, so that rare successes count as much as the rest.

        Args:
            policy: its encoder makes the features.
            episodes: recorded, some of them successes; teleoperated ones will do.
            instruction: of the task.
            last_frames: how many frames at the end of a success show it.
            steps: of Adam, on batches of 64.
            learning_rate: Adam's.
            seed: of weights and batches.
            kwargs: of the constructor.

        Raises:
            ValueError: one kind of frame is missing.
        """
        parts: list[Features] = []
        labels: list[Tensor] = []
        for episode in episodes:
            length = episode.total_steps + 1
            for start in range(0, length, FRAMES_PER_FORWARD):
                rows = slice(start, min(start + FRAMES_PER_FORWARD, length))
                obs = {key: value[rows] for key, value in episode.observations.items()}
                parts.append(policy.encode(obs, [instruction] * len(obs["task_id"])))
            labels.append(torch.arange(length) >= length - last_frames if episode.success else torch.zeros(length) > 1)
        solved = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.bool)
        kinds = [solved.nonzero().squeeze(-1), (~solved).nonzero().squeeze(-1)]
        if not all(map(len, kinds)):
            raise ValueError(
                f"the episodes hold {len(kinds[0])} frames of success and {len(kinds[1])} others; record some of both"
            )
        features = Features.cat(parts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = SuccessClassifier(policy.encoder.feature_dim).to(policy.device)
            optimizer = torch.optim.Adam(classifier.parameters(), lr=learning_rate)
            target = (torch.arange(64) < 32).float().to(policy.device)
            for _ in range(steps):
                rows = torch.cat([kind[torch.randint(len(kind), (32,))] for kind in kinds])
                loss = nn.functional.binary_cross_entropy_with_logits(classifier(features[rows], None), target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        return cls(policy, classifier.requires_grad_(False), instruction=instruction, **kwargs)
