"""One group of environments under a policy: choosing actions, stepping, and the episodes that they are in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from vla_rl.encoders.features import Features
from vla_rl.envs import instructions_for
from vla_rl.policy import VLAPolicy, stack_cameras
from vla_rl.timing import Stopwatch
from vla_rl.vector import EnvGroup, WorkerVectorEnv

DrawNoise = Callable[[Sequence[int]], Tensor | None]
"""Numbers of n environments -> exploration noise [n, ...] to hold for an episode in each, or None."""


@dataclass
class RunningEpisode:
    """The episode that one environment is in."""

    observations: list[dict[str, np.ndarray]]
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    success: bool = False


class GroupStepper:
    """Steps one group of environments with a policy, in any of Gymnasium's three autoreset modes.

    `act` encodes the latest observations (once per env step), chooses actions and starts the step; `finish` waits for
    its end. Between the two, another group can be looked after.

    Args:
        group: the environments; see `env_groups`.
        policy: acts.
        table: instructions by task id.
        obs: the observations of the group's reset.
        noise: exploration noise of the group from `draw_noise`.
        draw_noise: called with the number of an environment whose next episode begins.
        watch: "encode" gets the seconds in the encoder, "simulate" those spent waiting for the environments.
        on_end: called with an episode that ended in a step that counts: (episode, terminated, truncated).

    Attributes:
        quota: int [n], episodes that each environment still has to give; beyond them its steps count nowhere. None
            means without end.
    """

    def __init__(
        self,
        group: EnvGroup | SimpleGroup,
        policy: VLAPolicy,
        *,
        table: tuple[str, ...],
        obs: dict[str, np.ndarray],
        noise: Tensor | None,
        draw_noise: DrawNoise,
        watch: Stopwatch,
        on_end: Callable[[RunningEpisode, bool, bool], None],
    ):
        self.group, self.policy, self.table, self.watch, self.on_end = group, policy, table, watch, on_end
        self.mode = AutoresetMode(group.metadata["autoreset_mode"])
        self.num_envs = group.num_envs
        self.noise = noise
        self.draw_noise = draw_noise
        self.quota: np.ndarray | None = None
        self._obs = obs
        self._features: Features | None = None
        self._after_done = np.zeros(self.num_envs, dtype=bool)
        self._action = np.zeros(0)
        self._row: dict[str, Any] = {}
        self.running = [RunningEpisode([_row(obs, i)]) for i in range(self.num_envs)]

    def features(self) -> Features:
        """Features of the latest observations, encoded at the first call."""
        if self._features is None:
            with self.watch("encode"):
                self._features = self.policy.encode(self._obs, instructions_for(self.table, self._obs["task_id"]))
        return self._features

    def forget_features(self) -> None:
        """Encode the latest observations again: the VLM has changed."""
        self._features = None

    def state(self) -> Tensor | None:
        """Normalised proprioception of the latest observations, or None."""
        return self.policy.normalize_state(self._obs.get("state"))

    def act(self, *, keep_images: bool = False) -> None:
        """Choose an action for every environment and start the step."""
        features, state = self.features(), self.state()
        with torch.no_grad():
            distribution = self.policy.head.distribution(features, state)
            if isinstance(distribution, torch.distributions.Distribution):
                raise TypeError(
                    f"distribution() of {type(self.policy.head).__name__} gave torch's {type(distribution).__name__}; "
                    "it has to follow vla_rl.heads.distributions.Distribution, as DiagonalGaussian(mean, std) does"
                )
            action = distribution.sample(self.noise)
        self._action = np.clip(self.policy.env_action(action), -1.0, 1.0)
        # The observations may be views that the step overwrites: whatever is wanted of them is copied before it starts.
        self._row = {
            "features": features,
            "state": state,
            "actions": action,
            "task_id": self._obs["task_id"].copy(),
            "images": stack_cameras(self._obs).copy() if keep_images else None,
        }
        with self.watch("simulate"):
            self.group.step_async(self._action)

    def finish(self) -> dict[str, Any]:
        """Wait for the step that `act` started.

        Returns:
            Batched arrays of the step, among them `valid` (False on the autoreset rows of NEXT_STEP), `counted` (valid,
            and within the quota), `success` (as told at this step), and `final`: (environment, observation) for every
            episode that ended and whose last observation is in no row.

        Raises:
            KeyError: the env tells no success.
        """
        with self.watch("simulate"):
            next_obs, reward, terminated, truncated, info = self.group.step_wait()
        next_step = self.mode is AutoresetMode.NEXT_STEP
        valid = ~self._after_done if next_step else np.ones(self.num_envs, dtype=bool)
        counted = valid if self.quota is None else valid & (self.quota > 0)
        done = terminated | truncated
        success = self._success(info, done)
        self._obs, reached = self._after_step(next_obs, info, done)
        self._features = None
        for i in range(self.num_envs):
            if not valid[i]:
                self.running[i] = RunningEpisode([_row(self._obs, i)])
                continue
            running = self.running[i]
            running.actions.append(self._action[i].copy())
            running.rewards.append(float(reward[i]))
            running.success |= bool(success[i])
            running.observations.append(_row(reached, i))
            if done[i]:
                if counted[i]:
                    self.on_end(running, bool(terminated[i]), bool(truncated[i]))
                self._start_episode(i)
        if self.quota is not None:
            self.quota -= done & valid
        self._after_done = done
        ended = [] if next_step else done.nonzero()[0]
        return self._row | {
            "rewards": reward,
            "terminated": terminated,
            "truncated": truncated,
            "valid": valid,
            "counted": counted,
            "success": success,
            "final": [(int(i), _row(reached, i)) for i in ended],
        }

    def _start_episode(self, i: int) -> None:
        self.running[i] = RunningEpisode([_row(self._obs, i)])
        if self.noise is not None:
            fresh = self.draw_noise([self.group.rows.start + i])
            assert fresh is not None
            self.noise[i] = fresh[0]

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
        return self.group.reset(options={"reset_mask": done})[0], reached

    def _success(self, info: dict[str, Any], done: np.ndarray) -> np.ndarray:
        """`info["success"]` of the step, also where SAME_STEP has put it into `final_info`."""
        success = np.zeros(self.num_envs, dtype=bool)
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


class SimpleGroup:
    """Any vector env as the only group: `step_async` remembers the actions, `step_wait` steps."""

    def __init__(self, env: gym.vector.VectorEnv):
        self.env, self.metadata, self.num_envs, self.rows = env, env.metadata, env.num_envs, slice(0, env.num_envs)
        self.reset = env.reset
        self._actions: Any = None

    def step_async(self, actions: Any) -> None:
        """Remember the actions."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step."""
        return self.env.step(self._actions)


def env_groups(env: gym.vector.VectorEnv) -> list[EnvGroup | SimpleGroup]:
    """The groups to take turns with: the halves of a `WorkerVectorEnv`, or any other vector env as one group."""
    return list(env.groups) if isinstance(env, WorkerVectorEnv) else [SimpleGroup(env)]


def _row(obs: dict[str, np.ndarray], i: int | np.intp) -> dict[str, np.ndarray]:
    return {key: np.array(value[i]) for key, value in obs.items()}


def _final_obs(info: dict[str, Any], i: int | np.intp) -> dict[str, np.ndarray]:
    """The last observation of sub-env i under SAME_STEP, whether stored as an array of dicts or a dict of arrays."""
    final = info["final_obs"]
    return {key: value[i] for key, value in final.items()} if isinstance(final, dict) else final[i]
