"""Stage 1 of one RL task by SAC from demonstrations in latent space; successes come back as episodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from vla_rl.data.episode import Episode
from vla_rl.encoders.features import Features
from vla_rl.envs import instructions_for
from vla_rl.policy import VLAPolicy
from vla_rl.rl.exploration import ExplorationConfig, ExtraReward, potential_shaping
from vla_rl.rl.latent_buffer import LatentBatch, LatentBuffer
from vla_rl.rl.practice import EpisodeRecord, Practice, Stage1Result, go_on
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.rl.sac import SACfDConfig, executed_action
from vla_rl.rl.sac_learner import SACLearner
from vla_rl.rl.snapshots import PIECE_BYTES, StageSnapshots, State
from vla_rl.rl.stage1 import (
    Log,
    NoSuccessError,
    extra_reward,
    require_log_probs,
    success_rate,
    tags,
    torch_threads,
)

FRAMES_PER_FORWARD = 64  # of demonstrations


def run_sac(
    policy: VLAPolicy,
    env: gym.vector.VectorEnv,
    *,
    task: str,
    config: SACfDConfig,
    demos: Iterable[Episode] = (),
    replay: Iterable[Episode] = (),
    exploration: ExplorationConfig | None = None,
    max_successes: int = 256,
    stop_at_zero: bool = False,
    seed: int = 0,
    iteration: int = 0,
    update_threads: int = 1,
    log: Log | None = None,
    snapshots: StageSnapshots | None = None,
) -> Stage1Result:
    """SACfD on the head over cached features (section "real-world experiments" of the paper), VLM frozen.

    First the policy acts as it comes until it has `config.num_demos` successes; these, and `demos`, are the
    demonstrations. Then it learns after every few steps, half of each batch from them. Each frame passes through the
    VLM once, whatever the number of updates.

    Args:
        policy: learns, in place.
        env: vector env of the RL task.
        task: its label.
        config: hyperparameters.
        demos: successful episodes of this task whose actions are those that the env executed, such as successes of an
            earlier round. (An expert's episodes with action noise hold what the expert meant instead, which misleads
            critics.)
        replay: episodes of this task to begin with in the online buffer, such as the failures of an earlier session on
            a robot.
        exploration: rewards to add to the env's whenever a step is replayed, so that they never are out of date.
        max_successes: how many successful episodes to return: the latest.
        stop_at_zero: raise if no episode succeeds before learning starts.
        seed: of resets and batches.
        iteration: number stored with the episodes.
        update_threads: torch threads of an update.
        log: called with CleanRL's tags and the number of env steps whenever as many episodes have ended as there are
            environments.
        snapshots: where to go on from and, inside its `on_sigterm`, to write where it stopped.

    Raises:
        PreemptedError: after SIGTERM.
        TypeError: the head has no log-probabilities, or its samples no gradient.
        NoSuccessError: `stop_at_zero`, and no episode succeeded.
        UpdateError: an update went wrong.
    """
    require_log_probs(policy)
    policy.train(False)
    snapshots = snapshots or StageSnapshots()
    before, curriculum = go_on(snapshots, env, exploration)
    record = EpisodeRecord(max_successes)
    frames = policy.encoder.num_frames
    collector = RolloutCollector(
        policy,
        env,
        task=task,
        on_episode=record,
        seed=snapshots.seed(seed),
        policy_version=policy.encoder.fingerprint,
        iteration=iteration,
    )
    collector.start_exploration()
    learner = SACLearner(policy, config=config)
    memory = LatentMemory(policy, num_envs=env.num_envs, table=collector.table, config=config, seed=seed)
    extra = extra_reward(policy, exploration)
    practice = Practice(policy, env, collector=collector, record=record, frames=frames, curriculum=curriculum)
    watch, rates = practice.watch, practice.rates
    stats: dict[str, list[float]] = {}
    learning, seen, owed = False, 0, 0.0
    if before is None:
        for episode in demos:
            memory.add_demo(episode)
        for episode in replay:
            memory.add_replay(episode)
    else:
        learner.load_state_dict(before["learner"])
        memory.load_state_dict(before["memory"], before["pieces"])
        if extra is not None:
            extra.load_state_dict(before["extra"], fingerprint=policy.encoder.fingerprint)
        stats, learning, seen, owed = (before[name] for name in ("stats", "learning", "seen", "owed"))
        practice.load_state_dict(before)

    def state() -> State:
        learned = {
            "learner": learner.state_dict(),
            "memory": memory.state_dict(),
            "extra": None if extra is None else extra.state_dict(),
        }
        now = practice.state_dict() | learned | {"stats": stats, "learning": learning, "seen": seen, "owed": owed}
        held = memory.pieces()
        pieces = {"demos": held["demos"], **now["pieces"], "online": held["online"]}
        return now | {"pieces": pieces, "dropped": practice.dropped(now)}

    def pay_updates() -> None:
        nonlocal owed
        while owed >= 1:
            snapshots.stop_if_asked()
            with snapshots.changing():
                batch, num_demos = memory.sample()
                if extra is not None:
                    batch = with_extra_reward(batch, extra)
                for key, value in learner.update(batch, num_demos=num_demos).items():
                    stats.setdefault(key, []).append(value)
                owed -= 1

    snapshots.keep(state)
    collector.stopping = snapshots.asked
    with watch("update"), torch_threads(update_threads):
        pay_updates()  # those that SIGTERM left
    while collector.num_env_steps < config.total_timesteps and not practice.converged:
        snapshots.stop_if_asked()
        practice.look()
        steps_before = collector.num_env_steps
        with watch("rollout"), torch_threads(1):
            whole = config.learn_between_episodes
            for row in collector.episode_steps(env.num_envs) if whole else collector.steps(config.rollout_steps):
                with snapshots.changing():
                    memory.add(row)
                    if extra is not None:
                        extra.add_row(row)
        if learning:
            owed += config.utd_ratio * (collector.num_env_steps - steps_before)
        elif memory.ready(collector.num_env_steps, len(record.outcomes)):
            learning, owed = True, float(config.critic_warmup_updates)
            if config.num_demos and memory.num_demos == 0:
                _explain_no_demonstrations(record, memory, task=task, stop_at_zero=stop_at_zero)
        with watch("update"), torch_threads(update_threads):
            with snapshots.changing():
                for key, value in ({} if extra is None else extra.learn()).items():
                    stats.setdefault(key, []).append(value)
            pay_updates()
        ended = len(record.outcomes)
        if ended - seen < env.num_envs and collector.num_env_steps < config.total_timesteps:
            continue
        window = record.outcomes[min(seen, max(0, ended - env.num_envs)) :]  # the last one overlaps the one before
        seen = ended
        rates.append(success_rate(window, collector))
        if log is not None:
            means = {key: float(np.mean(values)) for key, values in stats.items()}
            figures = tags(means, collector, rates[-1], watch, learner.actor_optimizer)
            log(figures | {"charts/demonstrations": memory.num_demos}, collector.num_env_steps)
        stats.clear()
        acts_anew = learner.num_updates > config.critic_warmup_updates
        practice.converged = (
            acts_anew and len(rates) > 1 and all(rate >= config.converged_success for rate in rates[-2:])
        )
    policy.zero_grad(set_to_none=True)
    return practice.result(num_actor_updates=learner.num_actor_updates)


def _explain_no_demonstrations(record: EpisodeRecord, memory: LatentMemory, *, task: str, stop_at_zero: bool) -> None:
    """Raise where the wait for demonstrations was in vain."""
    lengths = [length for success, length in record.outcomes if success]
    if lengths:
        raise ValueError(
            f"{len(lengths)} of the first {len(record.outcomes)} noisy episodes on {task!r} succeeded, the shortest in "
            f"{min(lengths)} steps, but the replay memory has room for {memory.online.capacity} frames, and had lost "
            "their beginnings: raise buffer_gb or buffer_size, or lower num_envs"
        )
    if stop_at_zero:
        raise NoSuccessError(
            f"none of the first {len(record.outcomes)} noisy episodes on {task!r} succeeded, so there are no "
            "demonstrations and a sparse reward cannot teach: train stage 0 longer, choose an easier variant, or set "
            "stop_at_zero=False"
        )


@torch.no_grad()
def with_extra_reward(batch: LatentBatch, extra: ExtraReward) -> LatentBatch:
    """The batch with the novelty of the frame n steps ahead, once, and with shaping over these steps as rewards."""
    shaping = potential_shaping(
        extra.potential(batch.features, batch.state),
        extra.potential(batch.next_features, batch.next_state),
        batch.discounts,
    )
    rewards = batch.rewards + extra.bonus(batch.next_features, batch.next_state) + shaping
    return replace(batch, rewards=rewards)


@dataclass
class _Pending:
    """The latest row of a group, whose next frames are not known yet."""

    ids: Tensor
    row: dict[str, Any]
    final_ids: dict[int, int] = field(default_factory=dict)


class LatentMemory:
    """The online buffer and the demonstrations, filled from the rows of a `RolloutCollector` in any autoreset mode.

    A step is complete once the frame after it has come in, one row later: under NEXT_STEP that is the final frame of an
    episode too, and the autoreset's own row (junk action, no transition) is left out. In the other modes the final
    frame of a truncated episode is encoded by itself; that of a terminated one is not needed.

    Args:
        policy: its encoder makes the features.
        num_envs: of all groups.
        table: instructions by task id.
        config: sizes, discount, and share of the demonstrations.
        seed: of the draws.
    """

    def __init__(self, policy: VLAPolicy, *, num_envs: int, table: tuple[str, ...], config: SACfDConfig, seed: int):
        self.policy, self.table, self.config = policy, table, config
        self.generator = torch.Generator().manual_seed(seed)
        self.online, self.demos = (
            LatentBuffer(
                config.buffer_size,
                action_dim=len(policy.action_mean),
                fingerprint=policy.encoder.fingerprint,
                max_bytes=int(config.buffer_gb * 1e9),
                device=policy.device if config.buffer_device == "policy" else "cpu",
            )
            for _ in range(2)
        )
        self.num_demos = 0
        self._pending: dict[int, _Pending] = {}
        self._episodes: list[list[int]] = [[] for _ in range(num_envs)]
        self._success = np.zeros(num_envs, dtype=bool)

    def state_dict(self) -> State:
        """The draws, and all of both buffers but what `pieces` gives; running episodes count as broken off."""
        return {
            "online": self.online.state_dict(),
            "demos": self.demos.state_dict(),
            "num_demos": self.num_demos,
            "generator": self.generator.get_state(),
        }

    def pieces(self) -> dict[str, list[State]]:
        """What the buffers hold, as `pieces` of a state."""
        return {name: getattr(self, name).pieces(PIECE_BYTES) for name in ("demos", "online")}

    def load_state_dict(self, state: State, pieces: Mapping[str, Iterable[State]]) -> None:
        """Go on from where `state_dict` and `pieces` were taken, in an empty memory."""
        self.online.load_state_dict(state["online"], pieces["online"])
        self.demos.load_state_dict(state["demos"], pieces["demos"])
        self.num_demos = state["num_demos"]
        self.generator.set_state(state["generator"].clone())

    def ready(self, num_env_steps: int, num_episodes: int) -> bool:
        """Whether learning may begin: the demonstrations are there, or were waited for, and there are steps to draw."""
        waited = num_env_steps >= self.config.learning_starts and num_episodes >= len(self._episodes)
        return (self.num_demos >= self.config.num_demos or waited) and len(self.online) > 0

    def add(self, row: dict[str, Any]) -> None:
        """Take in one row of one group."""
        first = row["envs"].start
        ids = self.online.add_frames(row["features"], row["state"])
        if first in self._pending:
            self._complete(self._pending.pop(first), ids)
        pending = _Pending(ids, row)
        if final := [(i, obs) for i, obs in row["final"] if not row["terminated"][i]]:
            envs, obs = zip(*final, strict=True)
            batch = {key: np.stack([o[key] for o in obs]) for key in obs[0]}
            features = self.policy.encode(batch, instructions_for(self.table, batch["task_id"]))
            final_ids = self.online.add_frames(features, self.policy.normalize_state(batch.get("state")))
            pending.final_ids = dict(zip(envs, final_ids.tolist(), strict=True))
        self._pending[first] = pending

    def add_demo(self, episode: Episode) -> None:
        """Encode an episode and store it among the demonstrations."""
        self._add_demo(*self._encode(episode), terminated=bool(episode.terminations[-1]))

    def add_replay(self, episode: Episode) -> None:
        """Encode an episode and store it in the online buffer, as if it had been collected."""
        features, state, actions, rewards = self._encode(episode)
        self.online.add_episode(
            features, state, actions=actions, rewards=rewards, terminated=bool(episode.terminations[-1])
        )

    def _encode(self, episode: Episode) -> tuple[Features, Tensor | None, Tensor, Tensor]:
        """Features and states of T + 1 frames, actions [T, A], rewards [T]."""
        parts = []
        length = episode.total_steps + 1
        for start in range(0, length, FRAMES_PER_FORWARD):
            rows = slice(start, min(start + FRAMES_PER_FORWARD, length))
            obs = {key: value[rows] for key, value in episode.observations.items()}
            parts.append(self.policy.encode(obs, [episode.instruction] * len(obs["task_id"])))
        state = self.policy.normalize_state(episode.observations.get("state"))
        return Features.cat(parts), state, torch.from_numpy(episode.actions), torch.from_numpy(episode.rewards)

    def sample(self) -> tuple[LatentBatch, int]:
        """A batch, demonstrations first, and how many they are."""
        config = self.config
        num_demos = round(config.demo_fraction * config.batch_size) if len(self.demos) else 0
        sizes = ((self.demos, num_demos), (self.online, config.batch_size - num_demos))
        parts = [
            buffer.sample(size, gamma=config.gamma, n_step=config.n_step, generator=self.generator)
            for buffer, size in sizes
            if size
        ]
        return LatentBatch.cat(parts).to(self.policy.device), num_demos

    def _complete(self, pending: _Pending, next_ids: Tensor) -> None:
        row, first = pending.row, pending.row["envs"].start
        next_ids = next_ids.clone()
        for i, _ in row["final"]:  # the next row is of another episode
            next_ids[i] = pending.final_ids.get(i, pending.ids[i])
        valid = torch.from_numpy(row["valid"])
        self.online.add_steps(
            pending.ids[valid],
            actions=executed_action(self.policy, row["actions"])[valid],
            rewards=torch.as_tensor(row["rewards"])[valid],
            bootstrap=~torch.from_numpy(row["terminated"])[valid],
            next_ids=next_ids[valid],
        )
        done = row["terminated"] | row["truncated"]
        for i in row["valid"].nonzero()[0]:
            n = first + i
            self._episodes[n].append(int(pending.ids[i]))
            self._success[n] |= row["success"][i]
            if done[i]:
                if self._success[n]:
                    self._keep(self._episodes[n], int(next_ids[i]), bool(row["terminated"][i]))
                self._episodes[n], self._success[n] = [], False

    def _keep(self, ids: list[int], final_id: int, terminated: bool) -> None:
        """Copy a successful episode to the demonstrations, unless the ring has lost its beginning already."""
        if self.num_demos >= self.config.num_demos and not self.config.keep_successes:
            return
        numbers = torch.tensor([*ids, final_id])
        if self.online.alive(numbers).all():
            actions, rewards = self.online.steps(numbers[:-1])
            self._add_demo(*self.online.frames(numbers), actions, rewards, terminated=terminated)

    def _add_demo(
        self, features: Features, state: Tensor | None, actions: Tensor, rewards: Tensor, *, terminated: bool
    ) -> None:
        self.demos.add_episode(features, state, actions=actions, rewards=rewards, terminated=terminated)
        self.num_demos += 1
