"""The check of an action before it reaches a simulator."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray


def checked_action(action: Any, space: gym.Space[Any]) -> NDArray[Any]:
    """``action`` as an array of the shape of ``space``; its numbers may lie outside the bounds.

    Raises:
        ValueError: for another shape, which numpy might spread over all joints, and for NaN or infinity, at which
            MuJoCo resets the scene in the middle of an episode.
    """
    array = np.asarray(action)
    if array.shape != space.shape or not np.isfinite(array).all():
        raise ValueError(f"step got the action {action!r}; give {space.shape} finite numbers, as action_space says.")
    return array
