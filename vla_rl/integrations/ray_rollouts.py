"""`RayRolloutCollector`: the rows of many workers put together as one local collector would have collected them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from heapq import merge
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.data.episode import Episode
from vla_rl.encoders.features import Features
from vla_rl.integrations.ray_worker import Reply, Share, to_tensor
from vla_rl.integrations.ray_workers import Request, RolloutWorkers
from vla_rl.policy import VLAPolicy
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.timing import Stopwatch


class RayRolloutCollector(RolloutCollector):
    """Steps the environments of `RolloutWorkers` with a policy whose VLM stays frozen.

    The workers encode and act; log-probabilities, values and advantages are computed here, by the code of the local
    collector and in its batches, so that `ppo_update` finds what it expects. Environments, rows and episodes keep the
    order that they would have in one process. The rollout is that of a local collector with
    `draw_noise=NoiseByEnv(policy.head, seed=seed)` whose groups are the workers' (rows that share a batch share its
    rounding), for heads that hold their noise for an episode; with other heads it depends on the number of workers, but
    never on where they run.

    Args:
        policy: its head is sent to the workers whenever it has changed.
        env: the workers.
        task: label stored with every episode.
        on_episode: called with every finished episode, in the order of a local run.
        seed: of the first reset and the noise.
        policy_version: label stored with every episode.
        iteration: number stored with every episode.

    Attributes:
        num_env_steps: steps so far, without autoresets.
        watch: seconds in the encoder ("encode") and waiting for the environments ("simulate"), mean of the workers.
        recent_length: lengths of the latest 100 episodes.

    Raises:
        ValueError: a worker's VLM is another than the policy's.
    """

    def __init__(
        self,
        policy: VLAPolicy,
        env: RolloutWorkers,
        *,
        task: str,
        on_episode: Callable[[Episode], None] | None = None,
        seed: int = 0,
        policy_version: str = "",
        iteration: int = 0,
    ):
        self.policy, self.workers, self.task = policy, env, task
        self.on_episode, self.policy_version, self.iteration = on_episode, policy_version, iteration
        self.num_env_steps = 0
        self.watch = Stopwatch()
        self.recent_length: deque[int] = deque(maxlen=100)
        self._replies: list[Reply] = []
        share = Share(
            seed, first=0, num_envs=0, restarts=0, task=task, policy_version=policy_version, iteration=iteration
        )
        self._take_note(env.begin(policy, share))
        self.table = self._replies[0].table

    @property
    def running_lengths(self) -> list[int]:
        """Steps so far of the episode that each environment is in."""
        return [length for reply in self._replies for length in reply.running]

    @property
    def counters(self) -> dict[str, float]:
        """What has gone wrong since the workers were started, by tag of the log."""
        workers = self.workers
        return {
            "charts/replaced_workers": workers.num_restarts,
            "charts/dropped_episodes": workers.dropped_episodes,
            "charts/refused_rollouts": workers.refused_rollouts,
        }

    def forget_features(self) -> None:
        """Not possible: the workers have a frozen VLM of their own.

        Raises:
            ValueError: always.
        """
        raise ValueError('the workers keep the VLM that they began with; use stage1_scope="head" with Ray')

    def redraw_noise(self) -> None:
        """Draw the exploration noise of all environments anew."""
        self._take_note(self._run(("redraw_noise", ())))

    def ask(self, num_steps: int) -> None:
        """Let the workers begin with the next `num_steps`, without waiting for them.

        Worth it before something that leaves the head alone, such as an update of the critic; after a change of the
        head, `collect` refuses what they bring and asks again.
        """
        self.workers.broadcast(self.policy)
        self.workers.ask(("collect", (num_steps, False)))

    def steps(self, num_steps: int, *, keep_images: bool = False) -> Iterator[dict[str, Any]]:
        """Step every environment `num_steps` times.

        Yields:
            What `RolloutCollector.steps` yields, once all workers are done.
        """
        return self._rows(("collect", (num_steps, keep_images)))

    def episode_steps(self, num_episodes: int) -> Iterator[dict[str, Any]]:
        """The steps of `collect_episodes`; rows hold nothing but `envs` and `counted`."""
        quota = -(-num_episodes // self.workers.num_envs)
        return self._rows(("collect_episodes", (quota * self.workers.envs_per_worker,)))

    def collect_episodes(self, num_episodes: int) -> None:
        """Finish `num_episodes` or a few more: the same number in every env, so that short ones are not favoured."""
        for _ in self.episode_steps(num_episodes):
            pass

    def current(self) -> tuple[Features, Tensor | None]:
        """Features and normalised states of the current observations of all environments."""
        if any(reply.tokens is None for reply in self._replies):
            self._take_note(self._run(("look", ())))
        features = Features.cat(
            [self._features(reply.tokens, reply.mask, reply.fingerprint) for reply in self._replies]
        )
        states = [to_tensor(reply.state, self.policy.device) for reply in self._replies if reply.state is not None]
        return features, torch.cat(states) if states else None

    def _run(self, request: Request) -> list[Reply]:
        self.workers.broadcast(self.policy)
        return self.workers.run(request)

    def _take_note(self, replies: list[Reply]) -> None:
        """Keep where the workers stand, and count what their encoders and their clocks say."""
        self._replies = [replace(reply, rows=[]) for reply in replies]
        encoder = self.policy.encoder
        for reply in replies:
            encoder.num_forwards += reply.forwards
            encoder.num_frames += reply.frames
            for name, seconds in reply.seconds.items():
                self.watch.seconds[name] += seconds / len(replies)

    def _rows(self, request: Request) -> Iterator[dict[str, Any]]:
        """Rows of all workers by step and environment; the episodes that end in one are handed on just before."""
        replies = self._run(request)
        self._take_note(replies)
        parts = [self._numbered(index, reply) for index, reply in enumerate(replies)]
        for row in merge(*parts, key=lambda row: (row["step"], row["envs"].start)):
            for episode in row.pop("episodes"):
                self.recent_length.append(episode.total_steps)
                if self.on_episode is not None:
                    self.on_episode(_owned(episode))
            self.num_env_steps += int(row["counted"].sum())
            yield row

    def _numbered(self, index: int, reply: Reply) -> Iterator[dict[str, Any]]:
        """Rows of one worker, as tensors where they were, and with environments counted from the first of all."""
        first, device = index * self.workers.envs_per_worker, self.policy.device
        for packed in reply.rows:
            row: dict[str, Any] = dict(packed)
            row["envs"] = slice(first + row["envs"].start, first + row["envs"].stop)
            if "tokens" in row:
                row["features"] = self._features(row.pop("tokens"), row.pop("mask"), reply.fingerprint)
                row["state"] = None if row["state"] is None else to_tensor(row["state"], device)
                row["actions"] = to_tensor(row["actions"], device)
            yield row

    def _features(self, tokens: np.ndarray | None, mask: np.ndarray | None, fingerprint: str) -> Features:
        assert tokens is not None and mask is not None
        device, dtype = self.policy.device, self.policy.encoder.feature_dtype
        return Features(to_tensor(tokens, device, dtype), to_tensor(mask, device), fingerprint)


def _owned(episode: Episode) -> Episode:
    """A copy: views of the object store would keep the whole rollout that they came with in memory."""
    return replace(
        episode,
        observations={key: value.copy() for key, value in episode.observations.items()},
        actions=episode.actions.copy(),
        rewards=episode.rewards.copy(),
        terminations=episode.terminations.copy(),
        truncations=episode.truncations.copy(),
    )
