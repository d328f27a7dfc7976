"""A base policy that needs pictures, made part of the environment, so that RL learns to correct it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from vla_rl.envs import instruction_table, instructions_for


class BasePolicy(Protocol):
    """What is corrected; `vla_rl.integrations.lerobot.LeRobotBase` is one."""

    def actions(
        self,
        obs: Mapping[str, np.ndarray],
        instructions: Sequence[str],
        *,
        started: np.ndarray | None = None,
        active: np.ndarray | None = None,
    ) -> np.ndarray:
        """The next action [B, A] of the environments that are `active`, some of which have just `started`."""
        ...

    def plan(self, obs: Mapping[str, np.ndarray], instructions: Sequence[str]) -> np.ndarray:
        """What it would do from here, [B, H, A], without any effect on `actions`."""
        ...


class ResidualActions(VectorWrapper):
    """RL corrects a base policy: `clip(base + scale * action)` is executed (PLD 2511.00091, ResFiT 2509.19301).

    The base's next action is appended to `state`, so that any head, and any RL library, can learn the correction; with
    an action of zero the base acts alone. Wrap it before `EncodeObservation`. Where the base is a head of ours, prefer
    `vla_rl.heads.ResidualHead`, which needs no wrapper.
    """

    def __init__(self, env: VectorEnv, base: BasePolicy, *, scale: float = 0.2):
        """Wrap a vector environment of the observation convention.

        Args:
            env: vector environment with actions in [-1, 1].
            base: gives the actions to be corrected.
            scale: most that the correction changes, in env units.

        Raises:
            ValueError: the observation does not follow the convention, or actions are no vector.
        """
        super().__init__(env)
        single: Any = env.single_observation_space
        action: Any = env.single_action_space
        if not isinstance(single, spaces.Dict) or "task_id" not in single.spaces or len(action.shape) != 1:
            raise ValueError(
                f"ResidualActions got observations {single} and actions {action}; it needs the observation convention, "
                "as VLAObservation gives it, and actions [A]"
            )
        self.base, self.scale = base, scale
        self.instructions = instruction_table(env)
        state = single.spaces.get("state")
        low, high = (
            [] if state is None else [bound] for bound in (getattr(state, "low", 0), getattr(state, "high", 0))
        )
        box = spaces.Box(
            np.concatenate([*low, np.full(action.shape, -np.inf)]).astype(np.float32),
            np.concatenate([*high, np.full(action.shape, np.inf)]).astype(np.float32),
        )
        self.single_observation_space = spaces.Dict({**single.spaces, "state": box})
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self._base_actions = np.zeros((env.num_envs, *action.shape), np.float32)
        self._ended = np.zeros(env.num_envs, dtype=np.bool_)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[dict, dict[str, Any]]:
        """Reset, wholly or by `options["reset_mask"]`; the base begins anew in the rows that were reset.

        Raises:
            ValueError: the base gives actions of another size.
        """
        rows = np.ones(self.num_envs, dtype=np.bool_)
        if options is not None and "reset_mask" in options:
            rows = np.array(options["reset_mask"])
        observations, infos = self.env.reset(seed=seed, options=options)
        if rows.any():
            sentences = instructions_for(self.instructions, observations["task_id"])
            chosen = self._checked(self.base.actions(observations, sentences, started=rows, active=rows))
            self._base_actions = np.where(rows[:, None], chosen, self._base_actions)
        self._ended &= ~rows
        return self._extend(observations, self._base_actions), infos

    def step(self, actions: Any) -> tuple[dict, Any, Any, Any, dict[str, Any]]:
        """Execute base plus correction.

        Raises:
            ValueError: the base gives actions of another size.
        """
        space: Any = self.env.action_space
        total = np.clip(self._base_actions + self.scale * np.asarray(actions), space.low, space.high)
        observations, rewards, terminations, truncations, infos = self.env.step(total.astype(np.float32))
        done, mode = terminations | truncations, AutoresetMode(self.metadata["autoreset_mode"])
        started = {AutoresetMode.SAME_STEP: done, AutoresetMode.NEXT_STEP: self._ended}.get(mode, np.zeros_like(done))
        if mode is AutoresetMode.SAME_STEP and done.any() and "final_obs" in infos:
            infos = {**infos, "final_obs": self._extend_final(infos["final_obs"], done)}
        sentences = instructions_for(self.instructions, observations["task_id"])
        self._base_actions = self._checked(self.base.actions(observations, sentences, started=started))
        self._ended = done
        return self._extend(observations, self._base_actions), rewards, terminations, truncations, infos

    def _checked(self, chosen: np.ndarray) -> np.ndarray:
        """The base's actions, if they fit: numpy would spread a single entry over all."""
        if chosen.shape != self._base_actions.shape:
            raise ValueError(
                f"the base gave actions {list(chosen.shape)}, the environments take {list(self._base_actions.shape)}; "
                "give a base, and its postprocess, for their action space"
            )
        return chosen

    def _extend_final(self, final: np.ndarray, done: np.ndarray) -> np.ndarray:
        """Final observations with the action that the base would have taken from there."""
        extended = final.copy()
        for i in np.flatnonzero(done):
            obs = {key: np.asarray(value)[None] for key, value in final[i].items()}
            action = self.base.plan(obs, instructions_for(self.instructions, obs["task_id"]))[:, 0]
            extended[i] = {key: value[0] for key, value in self._extend(obs, action).items()}
        return extended

    def _extend(self, observations: dict[str, Any], base: np.ndarray) -> dict[str, Any]:
        parts = [np.asarray(observations["state"], np.float32)] if "state" in observations else []
        return {**observations, "state": np.concatenate([*parts, base], axis=1, dtype=np.float32)}
