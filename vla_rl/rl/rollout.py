"""Rollout collection: env steps in, cached features and whole episodes out, with one VLM forward per env step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from vla_rl.data.episode import Episode
from vla_rl.encoders.features import Features
from vla_rl.envs import instruction_table, instructions_for
from vla_rl.heads.value import ValueHead
from vla_rl.policy import VLAPolicy, stack_cameras
from vla_rl.rl.gae import gae
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


@dataclass
class _Running:
    """The episode that one environment is in."""

    observations: list[dict[str, np.ndarray]]
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    success: bool = False


class RolloutCollector:
    """Steps a vector env with a policy, in any of Gymnasium's three autoreset modes.

    Under NEXT_STEP the row after an episode's end is an autoreset: the env ignores its action. It is marked invalid and
    counts nowhere. Under SAME_STEP and DISABLED the last observation of a truncated episode is kept for its value, and
    all of a rollout's are encoded in one batch at its end.

    Args:
        policy: acts; its encoder runs once per env step.
        env: vector env in the observation convention.
        task: label stored with every episode.
        on_episode: called with every finished episode.
        seed: of the first reset.
        policy_version: label stored with every episode.
        iteration: number stored with every episode.
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
    ):
        self.policy, self.env, self.task = policy, env, task
        self.on_episode, self.policy_version, self.iteration = on_episode, policy_version, iteration
        self.mode = AutoresetMode(env.metadata["autoreset_mode"])
        self.table = instruction_table(env)
        self.num_env_steps = 0
        self.watch = Stopwatch()
        self.recent_length: deque[int] = deque(maxlen=100)
        _require_unit_box(env.single_action_space)
        self._obs, _ = env.reset(seed=seed)
        self._features: Features | None = None
        self._noise = policy.head.draw_noise(env.num_envs)
        self._after_done = np.zeros(env.num_envs, dtype=bool)
        self._running = [_Running([self._row(self._obs, i)]) for i in range(env.num_envs)]

    def num_running_longer(self, steps: int) -> int:
        """How many environments are in an episode of more than `steps` steps."""
        return sum(len(running.actions) > steps for running in self._running)

    def forget_features(self) -> None:
        """Encode the current observations again at the next step: the VLM has changed."""
        self._features = None

    def start_exploration(self) -> None:
        """Let the head set the size of its exploration noise on the current observations, and draw it."""
        state = self.policy.normalize_state(self._obs.get("state"))
        self.policy.head.start_exploration(self._current_features(), state)
        self._noise = self.policy.head.draw_noise(self.env.num_envs)

    def collect(
        self, num_steps: int, critic: ValueHead, *, gamma: float, gae_lambda: float, keep_images: bool = False
    ) -> Rollout:
        """Step every environment `num_steps` times and return the rows with advantages and returns."""
        rows = []
        final: list[tuple[int, dict[str, np.ndarray]]] = []
        for step in self._steps(num_steps):
            truncated = step["truncated"] & ~step["terminated"] & step["valid"]
            if self.mode is not AutoresetMode.NEXT_STEP:
                final += [
                    (len(rows) * self.env.num_envs + i, self._row(step["next_obs"], i)) for i in truncated.nonzero()[0]
                ]
            if not keep_images:
                step.pop("images")
            step.pop("next_obs")
            rows.append(step)
        rollout = _stack(rows)
        self._bootstrap(rollout, final, critic, gamma, gae_lambda)
        return rollout

    def collect_episodes(self, num_episodes: int) -> None:
        """Finish `num_episodes` or a few more: the same number in every env, so that short ones are not favoured."""
        quota = np.full(self.env.num_envs, -(-num_episodes // self.env.num_envs))
        for step in self._steps(None, quota):
            quota -= (step["terminated"] | step["truncated"]) & step["valid"]
            if (quota <= 0).all():
                return

    def _steps(self, num_steps: int | None, quota: np.ndarray | None = None) -> Iterator[dict[str, Any]]:
        """One vector step after another, each as a dictionary of batched arrays; envs without quota count nowhere."""
        taken = 0
        while num_steps is None or taken < num_steps:
            taken += 1
            obs = self._obs
            features = self._current_features()
            state = self.policy.normalize_state(obs.get("state"))
            with torch.no_grad():
                action = self.policy.head.distribution(features, state).sample(self._noise)
            env_action = np.clip(self.policy.env_action(action), -1.0, 1.0)
            valid = (
                ~self._after_done if self.mode is AutoresetMode.NEXT_STEP else np.ones(self.env.num_envs, dtype=bool)
            )
            counted = valid if quota is None else valid & (quota > 0)
            with self.watch("simulate"):
                next_obs, reward, terminated, truncated, info = self.env.step(env_action)
            done = terminated | truncated
            success = self._success(info, done)
            self._obs, final_obs = self._after_step(next_obs, info, done)
            self._features = None
            self.num_env_steps += int(counted.sum())
            for i in range(self.env.num_envs):
                self._record(
                    i,
                    env_action[i],
                    float(reward[i]),
                    bool(terminated[i]),
                    bool(truncated[i]),
                    success=bool(success[i]),
                    final_obs=final_obs,
                    valid=bool(valid[i]),
                    counted=bool(counted[i]),
                )
            self._after_done = done
            yield {
                "features": features,
                "state": state,
                "actions": action,
                "rewards": reward,
                "terminated": terminated,
                "truncated": truncated,
                "valid": valid,
                "task_id": obs["task_id"],
                "images": stack_cameras(obs).copy(),
                "next_obs": final_obs,
            }

    def _current_features(self) -> Features:
        if self._features is None:
            instructions = instructions_for(self.table, self._obs["task_id"])
            with self.watch("encode"):
                self._features = self.policy.encode(self._obs, instructions)
        return self._features

    def _after_step(
        self, next_obs: dict[str, np.ndarray], info: dict[str, Any], done: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The observation to act on next, and the one that the step itself led to."""
        if not done.any() or self.mode is AutoresetMode.NEXT_STEP:
            return next_obs, next_obs
        reached = {key: np.array(value) for key, value in next_obs.items()}
        if self.mode is AutoresetMode.SAME_STEP:
            for i in done.nonzero()[0]:
                for key in reached:
                    reached[key][i] = _final_obs(info, i)[key]
            return next_obs, reached
        return self.env.reset(options={"reset_mask": done})[0], reached

    def _success(self, info: dict[str, Any], done: np.ndarray) -> np.ndarray:
        """`info["success"]` of the step, also where SAME_STEP has put it into `final_info`."""
        success = np.zeros(self.env.num_envs, dtype=bool)
        found = "success" in info
        if found:
            success |= np.asarray(info["success"], dtype=bool)
        if self.mode is AutoresetMode.SAME_STEP and done.any():
            final = info.get("final_info", {})
            if "success" in final:
                success[done] = np.asarray(final["success"], dtype=bool)[done]
                found = True
        if not found and not self._after_done.all():
            raise KeyError(
                f"the env's step info has no 'success', only {sorted(k for k in info if not k.startswith('_'))}; "
                "wrap it in vla_rl.envs.VLAObservation(env, success_key=...)"
            )
        return success

    def _record(
        self,
        i: int,
        action: np.ndarray,
        reward: float,
        terminated: bool,
        truncated: bool,
        *,
        success: bool,
        final_obs: dict[str, np.ndarray],
        valid: bool,
        counted: bool,
    ) -> None:
        running = self._running[i]
        if not valid:
            self._running[i] = _Running([self._row(self._obs, i)])
            return
        running.actions.append(action.copy())
        running.rewards.append(reward)
        running.success |= success
        running.observations.append(self._row(final_obs, i))
        if not (terminated or truncated):
            return
        if counted:
            self.recent_length.append(len(running.actions))
            if self.on_episode is not None:
                self.on_episode(self._episode(running, terminated, truncated))
        self._running[i] = _Running([self._row(self._obs, i)])
        if self._noise is not None:
            fresh = self.policy.head.draw_noise(1)
            assert fresh is not None
            self._noise[i] = fresh[0]

    def _episode(self, running: _Running, terminated: bool, truncated: bool) -> Episode:
        steps = len(running.actions)
        ends = np.arange(steps) == steps - 1
        return Episode(
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

    @staticmethod
    def _row(obs: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
        return {key: np.array(value[i]) for key, value in obs.items()}

    @torch.no_grad()
    def _bootstrap(
        self,
        rollout: Rollout,
        final: list[tuple[int, dict[str, np.ndarray]]],
        critic: ValueHead,
        gamma: float,
        gae_lambda: float,
    ) -> None:
        """Old log-probs and values from the cached features, on the same path as the update; then GAE."""
        shape = rollout.rewards.shape
        log_probs, values = [], []
        for rows in torch.arange(shape.numel()).split(ROWS_PER_BATCH):
            features, state = rollout.features(rows), rollout.states(rows)
            log_probs.append(self.policy.head.distribution(features, state).log_prob(rollout.flat_actions[rows]))
            values.append(critic(features, state))
        rollout.log_probs, rollout.values = torch.cat(log_probs).view(shape), torch.cat(values).view(shape)
        last = critic(self._current_features(), self.policy.normalize_state(self._obs.get("state")))
        next_values = torch.cat([rollout.values[1:], last[None]])
        for start in range(0, len(final), ROWS_PER_BATCH):
            rows, obs = zip(*final[start : start + ROWS_PER_BATCH], strict=True)
            batch = {key: np.stack([o[key] for o in obs]) for key in obs[0]}
            features = self.policy.encode(batch, instructions_for(self.table, batch["task_id"]))
            next_values.view(-1)[list(rows)] = critic(features, self.policy.normalize_state(batch.get("state")))
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


def _require_unit_box(space: gym.Space) -> None:
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    if low is None or high is None or not (np.all(low == -1) and np.all(high == 1)):
        raise ValueError(
            f"the env's action space is {space}; policies act in [-1, 1]: use gymnasium.wrappers.RescaleAction"
        )


def _final_obs(info: dict[str, Any], i: int | np.intp) -> dict[str, np.ndarray]:
    """The last observation of sub-env i under SAME_STEP, whether stored as an array of dicts or a dict of arrays."""
    final = info["final_obs"]
    return {key: value[i] for key, value in final.items()} if isinstance(final, dict) else final[i]


def _stack(rows: list[dict[str, Any]]) -> Rollout:
    """Rows of one vector step each, as one Rollout."""
    features = Features.cat([row["features"] for row in rows])
    device = features.tokens.device

    def tensor(key: str, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.stack([row[key] for row in rows]), dtype=dtype, device=device)

    terminated = tensor("terminated", torch.bool)
    return Rollout(
        tokens=features.tokens,
        mask=features.mask,
        fingerprint=features.fingerprint,
        state=None if rows[0]["state"] is None else torch.cat([row["state"] for row in rows]),
        actions=torch.stack([row["actions"] for row in rows]),
        rewards=tensor("rewards", torch.float32),
        terminated=terminated,
        done=terminated | tensor("truncated", torch.bool),
        valid=tensor("valid", torch.bool),
        task_id=np.concatenate([row["task_id"] for row in rows]),
        images=np.concatenate([row["images"] for row in rows]) if "images" in rows[0] else None,
    )
