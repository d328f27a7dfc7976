"""What a worker checks of everything that its environments return, so that rubbish is named where it comes from."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class WorkerError(RuntimeError):
    """A sub-environment raised in its worker, or the worker died or hung; the text carries the worker's traceback."""


class LostWorkerError(WorkerError):
    """A worker died, or did not answer in time and was ended."""


class EnvOutputError(WorkerError):
    """A sub-environment returned what its spaces or Gymnasium's API exclude: another shape, NaN, no bool."""


class CheckedEnv(gym.Wrapper):
    """Refuses what an environment must not return.

    Args:
        env: the environment.
        number: of the sub-environment, for messages.
    """

    def __init__(self, env: gym.Env, *, number: int) -> None:
        if not isinstance(env, gym.Env):
            raise EnvOutputError(
                f"the env_fn of sub-environment {number} returned {type(env).__name__}, expected a gymnasium.Env; "
                "return gym.make(...) or your env"
            )
        super().__init__(env)
        self._name = f"sub-environment {number}"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, and check what comes back.

        Raises:
            EnvOutputError: see the class.
        """
        result: Any = self.env.reset(seed=seed, options=options)
        if not isinstance(result, tuple) or len(result) != 2:
            raise EnvOutputError(
                f"reset of {self._name} returned {_kind(result)}, expected (observation, info); update the env to "
                "Gymnasium's API"
            )
        problem = _observation_problem(self.observation_space, result[0], "observation")
        self._refuse(problem or _info_problem(result[1]), "reset")
        return result

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step, and check what comes back.

        Raises:
            EnvOutputError: see the class.
        """
        result: Any = self.env.step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise EnvOutputError(
                f"step of {self._name} returned {_kind(result)}, expected (observation, reward, terminated, truncated, "
                "info); update the env to Gymnasium's API"
            )
        observation, reward, terminated, truncated, info = result
        self._refuse(
            _observation_problem(self.observation_space, observation, "observation")
            or _reward_problem(reward)
            or _flag_problem("terminated", terminated)
            or _flag_problem("truncated", truncated)
            or _info_problem(info),
            "step",
        )
        return result

    def _refuse(self, problem: str | None, what: str) -> None:
        if problem is not None:
            raise EnvOutputError(f"{what} of {self._name} returned {problem}; correct the env or wrap it")


def _observation_problem(space: gym.Space, value: Any, name: str) -> str | None:
    """What is wrong with an observation, or None."""
    if isinstance(space, spaces.Dict):
        if not isinstance(value, dict) or value.keys() != space.spaces.keys():
            given = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            return f"an {name} of {given}, expected a dict with {sorted(space.spaces)}"
        parts = ((space[key], value[key], f"{name} {key!r}") for key in space.spaces)
    elif isinstance(space, spaces.Tuple):
        if not isinstance(value, tuple) or len(value) != len(space.spaces):
            return f"an {name} of {_kind(value)}, expected a tuple of {len(space.spaces)}"
        parts = ((part, value[k], f"{name} {k}") for k, part in enumerate(space.spaces))
    else:
        return _array_problem(space, value, name)
    return next((problem for part in parts if (problem := _observation_problem(*part))), None)


def _array_problem(space: gym.Space, value: Any, name: str) -> str | None:
    if space.shape is None or space.dtype is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError:
        return f"an {name} that is no array ({_kind(value)}), expected {space.dtype} {list(space.shape)}"
    if array.shape != space.shape or not np.can_cast(array.dtype, space.dtype, "same_kind"):
        return f"an {name} of {array.dtype} {list(array.shape)}, expected {space.dtype} {list(space.shape)}"
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return f"an {name} with {int((~np.isfinite(array)).sum())} entries that are NaN or infinite"
    if isinstance(space, spaces.Discrete) and not space.start <= array < space.start + space.n:
        return f"an {name} of {array}, expected {space.start}..{space.start + space.n - 1}"
    return None


def _reward_problem(reward: Any) -> str | None:
    try:
        value = float(reward)
    except (TypeError, ValueError):
        return f"the reward {_kind(reward)}, expected a number"
    return None if np.isfinite(value) else f"the reward {value}, expected a finite number"


def _flag_problem(name: str, flag: Any) -> str | None:
    if isinstance(flag, (bool, np.bool_)) or (np.ndim(flag) == 0 and flag in (0, 1)):
        return None
    return f"{name}={_kind(flag)}, expected a bool"


def _info_problem(info: Any) -> str | None:
    return None if isinstance(info, dict) else f"an info of {type(info).__name__}, expected a dict"


def _kind(value: Any) -> str:
    """A value in few words, however large it is."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__
