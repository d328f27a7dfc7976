"""One trajectory in memory: the unit that rollouts produce, stores keep and samplers cut into steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Episode:
    """A finished episode of ``T`` steps in one task.

    Observation ``t`` is what action ``t`` was chosen from; observation ``T`` is the one after the last action.

    Attributes:
        observations: ``"image"`` (or several ``"image_<camera>"``) uint8 ``[T+1, H, W, 3]``, ``"task_id"`` int64
            ``[T+1]`` and, where the environment has one, ``"state"`` float32 ``[T+1, S]``. Other keys are kept as they
            are, ``[T+1, ...]``.
        actions: float32 ``[T, A]``, as the environment received them.
        rewards: float64 ``[T]``.
        terminations: bool ``[T]``.
        truncations: bool ``[T]``.
        success: whether the task was solved at some step.
        source: who acted, such as ``"expert"`` or ``"rl"``.
        task: name of the task, such as ``"drawer-open"``; samplers balance over it.
        instruction: the sentence the policy was given.
        seed: seed of the reset, if known.
        iteration: round of the iterative schedule that made the episode; 0 before the first.
        policy_version: name of the weights that acted; empty for experts.
        infos: numeric or bool arrays ``[T+1, ...]``.

    Raises:
        ValueError: if a length, shape, dtype or value breaks the above.
    """

    observations: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    success: bool
    source: str
    task: str
    instruction: str
    seed: int | None = None
    iteration: int = 0
    policy_version: str = ""
    infos: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_array("actions", self.actions, np.float32, "[T, A]")
        steps = len(self.actions)
        if steps == 0:
            raise ValueError("an episode needs at least one step, got actions of length 0; drop empty episodes")
        for name, dtype in (("rewards", np.float64), ("terminations", np.bool_), ("truncations", np.bool_)):
            _check_array(name, getattr(self, name), dtype, "[T]")
            _check_length(name, getattr(self, name), steps, f"T = {steps}, one per action")
        if not self.image_keys:
            raise ValueError(
                f'observations need "image" or "image_<camera>", got the keys {sorted(self.observations)}; '
                "wrap the environment so that it renders one"
            )
        if "task_id" not in self.observations:
            raise ValueError(
                f'observations need "task_id", got the keys {sorted(self.observations)}; '
                "add an int64 array [T+1], of zeros if there is one task"
            )
        check_names("observations", self.observations)
        check_names("infos", self.infos)
        for key, value in self.observations.items():
            name = f'observations["{key}"]'
            if key in self.image_keys:
                _check_array(name, value, np.uint8, "[T+1, H, W, 3]")
                if not value.size:
                    raise ValueError(f"{name} is {list(value.shape)}, without a pixel; record pictures of some size")
            elif key == "task_id":
                _check_array(name, value, np.int64, "[T+1]")
            elif key == "state":
                _check_array(name, value, np.float32, "[T+1, S]")
            _check_storable(name, value)
            _check_length(name, value, steps + 1, f"T + 1 = {steps + 1}, one more than the actions")
        for key, value in self.infos.items():
            _check_storable(f'infos["{key}"]', value)
            _check_length(f'infos["{key}"]', value, steps + 1, f"T + 1 = {steps + 1}, one more than the actions")
        if (self.observations["task_id"] < 0).any():
            raise ValueError('observations["task_id"] has negative values; it must index the table of instructions')
        for name in ("source", "task", "instruction", "policy_version"):
            value = getattr(self, name)
            if not isinstance(value, str) or (not value and name in ("source", "task")):
                raise ValueError(f"{name} must be a text, for source and task not an empty one; got {value!r}")

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Names of the camera images among the observations, sorted."""
        return tuple(sorted(key for key in self.observations if key == "image" or key.startswith("image_")))

    @property
    def total_steps(self) -> int:
        """Number of actions ``T``."""
        return len(self.actions)

    @property
    def return_(self) -> float:
        """Undiscounted sum of the rewards."""
        return float(self.rewards.sum())


def check_names(where: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse names that HDF5 does not take for those of arrays.

    Raises:
        ValueError: a name is no text, empty, ".", or holds a slash.
    """
    for key in arrays:
        if not isinstance(key, str) or key in ("", ".", "..") or "/" in key:
            raise ValueError(f"{where} have the name {key!r}; expected a text without a slash, so rename it")


def _check_array(name: str, value: np.ndarray, dtype: type[np.generic], shape: str) -> None:
    given = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != shape.count(",") + 1:
        kind = np.dtype(dtype).name
        raise ValueError(
            f"{name} must be {kind} {shape}, got {given}; convert it with np.asarray(..., dtype=np.{kind})"
        )
    if shape.endswith("3]") and value.shape[-1] != 3:
        raise ValueError(f"{name} must be {shape} with three colours last, got {given}; move the channels last")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or infinite values; drop the episode or clip them where they arise")


def _check_storable(name: str, value: np.ndarray) -> None:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or value.ndim == 0:
        given = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name} must be an array [T+1, ...] of numbers or bools, got {given}; convert or drop it")


def _check_length(name: str, value: np.ndarray, length: int, expected: str) -> None:
    if len(value) != length:
        raise ValueError(f"{name} has length {len(value)}, expected {expected}; cut or pad it to match")
