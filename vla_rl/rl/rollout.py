"""Rollout collection: env steps in, cached features and whole episodes out, with one VLM forward per env step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from vla_rl.data.episode import Episode
from vla_rl.encoders.features import Features
from vla_rl.envs import instruction_table, instructions_for
from vla_rl.fitting import require_unit_box
from vla_rl.heads.value import ValueHead
from vla_rl.policy import VLAPolicy
from vla_rl.rl.exploration import ExtraReward, potential_shaping
from vla_rl.rl.gae import gae
from vla_rl.rl.stepping import DrawNoise, GroupStepper, RunningEpisode, env_groups
from vla_rl.timing import Stopwatch

ROWS_PER_BATCH = 1024  # rows per forward of head and critic over a rollout


@dataclass
class Rollout:
    """T env steps of N environments; row t * N + n is step t of environment n. `valid` is False on autoreset rows."""

    tokens: Tensor  # float16 [T * N, M, D]
    mask: Tensor  # bool [T * N, M]
    fingerprint: str
    state: Tensor | None  # normalised, [T * N, S]
    actions: Tensor  # normalised, not clipped, [T, N, A]
    rewards: Tensor  # [T, N]
    terminated: Tensor  # bool [T, N]
    done: Tensor  # bool [T, N]
    valid: Tensor  # bool [T, N]
    task_id: np.ndarray  # int64 [T * N]
    images: np.ndarray | None  # uint8 [T * N, ...], kept for PPO on the whole model
    log_probs: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, N]
    values: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, N]
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, N]
    returns: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, N]

    @property
    def valid_rows(self) -> Tensor:
        """Indices of the rows that hold a real env step."""
        return self.valid.flatten().nonzero().squeeze(-1)

    @property
    def flat_actions(self) -> Tensor:
        """Actions as [T * N, A]."""
        return self.actions.flatten(0, 1)

    def features(self, rows: Tensor) -> Features:
        """Cached features of some rows."""
        return Features(self.tokens[rows], self.mask[rows], self.fingerprint)

    def states(self, rows: Tensor) -> Tensor | None:
        """Normalised states of some rows, or None."""
        return None if self.state is None else self.state[rows]


class RolloutCollector:
    """Steps a vector env with a policy, in any of Gymnasium's three autoreset modes.

    The halves of a `WorkerVectorEnv` take turns: while the workers simulate and render one, the policy encodes and acts
    on the other. Both the halves and their order are fixed, so the data depend neither on the speed of either side nor
    on the number of workers.

    Under NEXT_STEP the row after an episode's end is an autoreset: the env ignores its action. It is marked invalid and
    counts nowhere. Under SAME_STEP and DISABLED the last observation of a truncated episode is kept for its value (that
    of a terminated one only for its novelty), and all of a rollout's are encoded in one batch at its end.

    Args:
        policy: acts, in eval mode; its encoder runs once per env step.
        env: vector env in the observation convention.
        task: label stored with every episode.
        on_episode: called with every finished episode.
        seed: of the first reset.
        policy_version: label stored with every episode.
        iteration: number stored with every episode.
        draw_noise: gives environments the exploration noise of their next episode; by default `policy.head.draw_noise`.

    Attributes:
        num_env_steps: steps so far, without autoresets.
        watch: seconds in the encoder ("encode") and waiting for the environments ("simulate").
        recent_length: lengths of the latest 100 episodes.
        stopping: asked before every step; once it says so, no further one is started.
    """

    def __init__(
        self,
        policy: VLAPolicy,
        env: gym.vector.VectorEnv,
        *,
        task: str,
        on_episode: Callable[[Episode], None] | None = None,
        seed: int = 0,
        policy_version: str = "",
        iteration: int = 0,
        draw_noise: DrawNoise | None = None,
    ):
        self.policy, self.env, self.task = policy, env, task
        self.on_episode, self.policy_version, self.iteration = on_episode, policy_version, iteration
        self.table = instruction_table(env)
        self.num_env_steps = 0
        self.watch = Stopwatch()
        self.recent_length: deque[int] = deque(maxlen=100)
        self.stopping: Callable[[], bool] = lambda: False
        require_unit_box(env.single_action_space, len(policy.action_mean))
        policy.head.eval()
        obs, _ = env.reset(seed=seed)
        self._draw_noise = draw_noise or (lambda envs: policy.head.draw_noise(len(envs)))
        noise = self._draw_noise(range(env.num_envs))
        self._steppers = [
            GroupStepper(
                group,
                policy,
                table=self.table,
                obs={key: value[group.rows] for key, value in obs.items()},
                noise=None if noise is None else noise[group.rows],
                draw_noise=self._draw_noise,
                watch=self.watch,
                on_end=self._end_episode,
            )
            for group in env_groups(env)
        ]

    @property
    def running_lengths(self) -> list[int]:
        """Steps so far of the episode that each environment is in."""
        return [len(running.actions) for stepper in self._steppers for running in stepper.running]

    @property
    def left(self) -> np.ndarray:
        """Episodes that each environment still has to give while `episode_steps` runs, int [N]."""
        return np.concatenate([stepper.quota for stepper in self._steppers if stepper.quota is not None])

    @property
    def counters(self) -> dict[str, float]:
        """Figures of this collector's own for the log, by tag; here none."""
        return {}

    def num_running_longer(self, steps: int) -> int:
        """How many environments are in an episode of more than `steps` steps."""
        return sum(length > steps for length in self.running_lengths)

    def state_dict(self) -> dict[str, Any]:
        """Counters and clocks; the environments and the episodes that they are in are not among them."""
        return {
            "num_env_steps": self.num_env_steps,
            "recent_length": list(self.recent_length),
            "seconds": dict(self.watch.seconds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from where `state_dict` was taken."""
        self.num_env_steps = state["num_env_steps"]
        self.recent_length.extend(state["recent_length"])
        self.watch.seconds.update(state["seconds"])

    def forget_features(self) -> None:
        """Encode the current observations again at the next step: the VLM has changed."""
        for stepper in self._steppers:
            stepper.forget_features()

    def start_exploration(self) -> None:
        """Let the head set the size of its exploration noise on the current observations, and draw it."""
        self.policy.head.start_exploration(*self.current())
        self.redraw_noise()

    def redraw_noise(self) -> None:
        """Draw the exploration noise of all environments anew."""
        for stepper in self._steppers:
            rows = stepper.group.rows
            stepper.noise = self._draw_noise(range(rows.start, rows.stop))

    def collect(
        self,
        num_steps: int,
        critic: ValueHead,
        *,
        gamma: float,
        gae_lambda: float,
        keep_images: bool = False,
        extra: ExtraReward | None = None,
    ) -> Rollout:
        """Step every environment `num_steps` times and return the rows with advantages and returns.

        `extra` is shown every row, and what it says of the frames is added to the rewards.
        """
        rows, novel = [], extra is not None and extra.novelty is not None
        final: list[tuple[int, dict[str, np.ndarray]]] = []
        first = 0
        for row in self.steps(num_steps, keep_images=keep_images):
            final += [(first + i, obs) for i, obs in row.pop("final") if novel or not row["terminated"][i]]
            first += len(row["rewards"])
            rows.append(row)
            if extra is not None:
                extra.add_row(row)
        rollout = _stack(rows, num_steps)
        self._bootstrap(rollout, final, critic, gamma, gae_lambda, extra)
        return rollout

    def steps(self, num_steps: int, *, keep_images: bool = False) -> Iterator[dict[str, Any]]:
        """Step every environment `num_steps` times.

        Yields:
            What `GroupStepper.finish` gives of one step of one group, and the group's `envs`, in a fixed order.
        """
        started = dict.fromkeys(self._steppers, 0)

        def start(stepper: GroupStepper) -> bool:
            if started[stepper] == num_steps:
                return False
            started[stepper] += 1
            stepper.act(keep_images=keep_images)
            return True

        return self._take_turns(start)

    def collect_episodes(self, num_episodes: int) -> None:
        """Finish `num_episodes` or a few more: the same number in every env, so that short ones are not favoured."""
        for _ in self.episode_steps(num_episodes):
            pass

    def episode_steps(self, num_episodes: int, *, left: np.ndarray | None = None) -> Iterator[dict[str, Any]]:
        """The steps of `collect_episodes`, each yielded as by `steps`.

        With `left`, int [N], each environment gives as many episodes as that says, whatever `num_episodes`.
        """
        if left is None:
            left = np.full(self.env.num_envs, -(-num_episodes // self.env.num_envs))
        for stepper in self._steppers:
            stepper.quota = left[stepper.group.rows].copy()

        def start(stepper: GroupStepper) -> bool:
            if stepper.quota is not None and (stepper.quota <= 0).all():
                return False
            stepper.act()
            return True

        yield from self._take_turns(start)
        for stepper in self._steppers:
            stepper.quota = None

    def _take_turns(self, start: Callable[[GroupStepper], bool]) -> Iterator[dict[str, Any]]:
        """Keep every group's step in flight while the others are looked after, until `start` starts no more.

        Yields:
            What the groups' steps gave, group after group in a fixed order, whichever is done first.
        """
        in_flight = deque(stepper for stepper in self._steppers if not self.stopping() and start(stepper))
        while in_flight:
            stepper = in_flight.popleft()
            row = stepper.finish()
            self.num_env_steps += int(row["counted"].sum())
            if not self.stopping() and start(stepper):
                in_flight.append(stepper)
            yield row | {"envs": stepper.group.rows}

    def current(self) -> tuple[Features, Tensor | None]:
        """Features and normalised states of the current observations of all environments."""
        features = Features.cat([stepper.features() for stepper in self._steppers])
        states = [stepper.state() for stepper in self._steppers]
        return features, _cat(states)

    def _end_episode(self, running: RunningEpisode, terminated: bool, truncated: bool) -> None:
        steps = len(running.actions)
        self.recent_length.append(steps)
        if self.on_episode is None:
            return
        ends = np.arange(steps) == steps - 1
        episode = Episode(
            observations={key: np.stack([o[key] for o in running.observations]) for key in running.observations[0]},
            actions=np.stack(running.actions).astype(np.float32),
            rewards=np.asarray(running.rewards, dtype=np.float64),
            terminations=ends & terminated,
            truncations=ends & truncated,
            success=running.success,
            source="rl",
            task=self.task,
            instruction=self.table[int(running.observations[0]["task_id"])],
            seed=None,
            iteration=self.iteration,
            policy_version=self.policy_version,
        )
        self.on_episode(episode)

    @torch.no_grad()
    def _bootstrap(
        self,
        rollout: Rollout,
        final: list[tuple[int, dict[str, np.ndarray]]],
        critic: ValueHead,
        gamma: float,
        gae_lambda: float,
        extra: ExtraReward | None,
    ) -> None:
        """Old log-probs and values from the cached features, on the same path as the update; then GAE."""
        shape = rollout.rewards.shape
        log_probs = [
            self.policy.head.distribution(rollout.features(rows), rollout.states(rows)).log_prob(
                rollout.flat_actions[rows]
            )
            for rows in torch.arange(shape.numel()).split(ROWS_PER_BATCH)
        ]
        rollout.log_probs = torch.cat(log_probs).view(shape)
        last: list[tuple[list[int], Features, Tensor | None]] = []
        for start in range(0, len(final), ROWS_PER_BATCH):
            rows, obs = zip(*final[start : start + ROWS_PER_BATCH], strict=True)
            batch = {key: np.stack([o[key] for o in obs]) for key in obs[0]}
            features = self.policy.encode(batch, instructions_for(self.table, batch["task_id"]))
            last.append((list(rows), features, self.policy.normalize_state(batch.get("state"))))
        rollout.values, next_values = self._along(rollout, critic, last)
        if extra is not None:
            potential, next_potential = self._along(rollout, extra.potential, last)
            discounts = gamma * (~rollout.terminated).float()
            _, bonus = self._along(rollout, extra.bonus, last)
            rollout.rewards = rollout.rewards + bonus + potential_shaping(potential, next_potential, discounts)
        rollout.advantages, rollout.returns = gae(
            rollout.rewards,
            rollout.values,
            next_values,
            rollout.terminated,
            rollout.done,
            rollout.valid,
            gamma=gamma,
            gae_lambda=gae_lambda,
        )

    def _along(
        self,
        rollout: Rollout,
        of_frames: Callable[[Features, Tensor | None], Tensor],
        final: list[tuple[list[int], Features, Tensor | None]],
    ) -> tuple[Tensor, Tensor]:
        """What `of_frames` says of the frame that each row acted on, and of the one that it led to, both [T, N]."""
        values = torch.cat(
            [
                of_frames(rollout.features(rows), rollout.states(rows))
                for rows in torch.arange(rollout.rewards.numel()).split(ROWS_PER_BATCH)
            ]
        ).view(rollout.rewards.shape)
        next_values = torch.cat([values[1:], of_frames(*self.current())[None]])
        for rows, features, state in final:
            next_values.view(-1)[rows] = of_frames(features, state)
        return values, next_values


def _stack(rows: list[dict[str, Any]], num_steps: int) -> Rollout:
    """Rows of one step of one group each, in the order of step and group, as one Rollout."""
    features = Features.cat([row["features"] for row in rows])
    device = features.tokens.device

    def tensor(key: str, dtype: torch.dtype) -> Tensor:
        flat = np.concatenate([row[key] for row in rows])
        return torch.as_tensor(flat, dtype=dtype, device=device).view(num_steps, -1)

    terminated = tensor("terminated", torch.bool)
    return Rollout(
        tokens=features.tokens,
        mask=features.mask,
        fingerprint=features.fingerprint,
        state=_cat([row["state"] for row in rows]),
        actions=torch.cat([row["actions"] for row in rows]).unflatten(0, (num_steps, -1)),
        rewards=tensor("rewards", torch.float32),
        terminated=terminated,
        done=terminated | tensor("truncated", torch.bool),
        valid=tensor("valid", torch.bool),
        task_id=np.concatenate([row["task_id"] for row in rows]),
        images=None if rows[0]["images"] is None else np.concatenate([row["images"] for row in rows]),
    )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
