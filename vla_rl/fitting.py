"""Whether an environment fits what is to act and learn in it: a policy's actions, the demonstrations' steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:
    from vla_rl.data.store import EpisodeStore


def require_unit_box(space: gym.Space, action_dim: int | None = None) -> None:
    """Refuse an environment whose actions are not `action_dim` numbers in [-1, 1]; None takes any number of them.

    Raises:
        ValueError: with what to do.
    """
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(
            f"the env's action space is {space}; policies act in vectors of numbers in [-1, 1]: wrap the env in a "
            "gymnasium.ActionWrapper with such a Box"
        )
    if not (np.all(space.low == -1) and np.all(space.high == 1)):
        bounds = "" if space.is_bounded() else ", after bounds for all of it (gymnasium.wrappers.TransformAction)"
        raise ValueError(
            f"the env's action space is {space}; policies act in [-1, 1]: use gymnasium.wrappers.RescaleAction{bounds}"
        )
    if action_dim is not None and space.shape != (action_dim,):
        raise ValueError(
            f"the env's action space is {space}, the policy's head was built for {action_dim} entries; make them agree"
        )


def require_same_steps(
    stores: Sequence[EpisodeStore], *, observation: gym.Space, action: gym.Space, chunk: int
) -> None:
    """Refuse demonstrations whose cameras, state or actions are not those of an environment: stage 2 batches both.

    Args:
        stores: demonstrations; other observations in them do not count.
        observation: space of one environment.
        action: space of one environment.
        chunk: H of the policy's head; demonstrations in single actions fit an environment that takes H at once.

    Raises:
        ValueError: with what differs.
    """
    parts = observation.spaces if isinstance(observation, spaces.Dict) else {}
    given = _of_batches({key: part.shape or () for key, part in parts.items()} | {"actions": action.shape or ()})
    for store in stores:
        held = _of_batches({key: shape for key, (_, shape) in store.step_shapes.items()})
        if held and (held["actions"][0] * chunk,) == given["actions"]:
            held["actions"] = given["actions"]
        if held and held != given:
            demo, env = ({k: list(v) for k, v in a.items() if b.get(k) != v} for a, b in ((held, given), (given, held)))
            raise ValueError(
                f"the demonstrations in '{store.path}' hold {demo}, the env gives {env}; make them agree, by "
                "image_size, image_key and use_state of vla_rl.envs.VLAObservation, say, since stage 2 learns from both"
            )


def _of_batches(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Those of cameras, state and actions."""
    return {k: v for k, v in shapes.items() if k in ("image", "state", "actions") or k.startswith("image_")}
