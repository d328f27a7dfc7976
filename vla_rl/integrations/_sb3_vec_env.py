"""Encoded vector environments as stable-baselines3's VecEnv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv


class EncodedVecEnv(VecEnv):
    """A Gymnasium vector environment, `EncodeObservation` above all, with stable-baselines3's interface.

    At an episode's end the info holds `terminal_observation`, `TimeLimit.truncated` and `is_success` (whether
    `info["success"]` was true at any step of the episode, which stable-baselines3 logs as `rollout/success_rate`).
    `VecMonitor(EncodedVecEnv(...))` adds lengths and returns.

    Args:
        env: vector environment in Gymnasium's `AutoresetMode.SAME_STEP`, which is how stable-baselines3 resets.

    Raises:
        ValueError: the environment resets in another mode.
    """

    def __init__(self, env: VectorEnv):
        mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the vector environment resets in {mode}, stable-baselines3 within the step that ends an episode; "
                "build it with autoreset_mode=AutoresetMode.SAME_STEP"
            )
        self.env: Any = env
        self._actions: np.ndarray | None = None
        self._succeeded = np.zeros(env.num_envs, dtype=np.bool_)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Any:
        """Reset all environments, with the seeds that `seed()` set."""
        options = self._options[0] if any(self._options) else None
        observations, infos = self.env.reset(seed=self._seeds, options=options)
        self.reset_infos = _by_env(infos, self.num_envs)
        self._succeeded[:] = False
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step every environment once."""
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        dones = terminated | truncated
        rows = _by_env(infos, self.num_envs)
        for i, row in enumerate(rows):
            if dones[i]:
                final_observation, final_info = row.pop("final_obs"), row.pop("final_info")
                self.reset_infos[i] = row
                rows[i] = row = dict(final_info)
                row["terminal_observation"] = final_observation
                row["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            self._succeeded[i] |= bool(row.get("success", False))
            if dones[i]:
                row["is_success"] = bool(self._succeeded[i])
                self._succeeded[i] = False
        return observations, np.asarray(rewards, dtype=np.float32), dones, rows

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of some of the environments."""
        base: Any = self.env.unwrapped
        values = base.get_attr(attr_name)
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of all environments.

        Raises:
            ValueError: `indices` are not all of them; Gymnasium's vector environments know no other way.
        """
        self._require_all(indices)
        base: Any = self.env.unwrapped
        base.set_attr(attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of all environments.

        Raises:
            ValueError: `indices` are not all of them; Gymnasium's vector environments know no other way.
        """
        self._require_all(indices)
        base: Any = self.env.unwrapped
        return list(base.call(method_name, *method_args, **method_kwargs))

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """False for each: the environments may lie in other processes; use stable-baselines3's VecEnv wrappers."""
        return [False for _ in self._get_indices(indices)]

    def _require_all(self, indices: Any) -> None:
        if sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ValueError(f"indices={indices}, expected None: a Gymnasium vector environment reaches all or none")


def _by_env(infos: Mapping[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Gymnasium's dict of arrays with `_key` masks as one dict per environment."""
    rows: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for key, values in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        present = infos.get(f"_{key}", np.ones(num_envs, dtype=np.bool_))
        items = _by_env(values, num_envs) if isinstance(values, Mapping) else values
        for i in np.flatnonzero(present):
            rows[i][key] = items[i]
    return rows
