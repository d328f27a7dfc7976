"""What ``VLAObservation`` needs to know of Gymnasium spaces: their parts, and which are images or make a state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


def told_success(info: Mapping[str, Any]) -> bool:
    """``info["success"]`` of one step.

    Raises:
        KeyError: there is none.
    """
    if "success" not in info:
        raise KeyError(
            f"the env's step info has no 'success', only {sorted(info)}; wrap it in "
            "vla_rl.envs.VLAObservation(env, success_key=...)"
        )
    return bool(info["success"])


def whole_numbers(indices: Any) -> list[int] | None:
    """Indices as ints; None stays.

    Raises:
        ValueError: they are a mask, or no whole numbers.
    """
    if indices is None:
        return None
    found = np.asarray(indices)
    if found.ndim != 1 or not (np.issubdtype(found.dtype, np.integer) or not found.size):
        raise ValueError(
            f"state_indices={indices!r}; expected a list of whole numbers (np.flatnonzero(mask) of a mask, "
            "range(2) for slice(2))"
        )
    return found.astype(int).tolist()


def height_and_width(size: Any) -> tuple[int, int] | None:
    """The size of an image in pixels from one side, both, or None.

    Raises:
        ValueError: if a side is no whole number above 0.
    """
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in sides):
        raise ValueError(f"image_size={size!r}; give a side in whole pixels, 1 or more, or (height, width).")
    return int(sides[0]), int(sides[1])


def first_and_last(space: gym.Space) -> list[int]:
    """The least and the largest number of a Discrete space; nothing of another, whose ids are seen only later."""
    return [int(space.start), int(space.start + space.n) - 1] if isinstance(space, spaces.Discrete) else []


def rgb_image(image: Any, *, low: float = 0.0, high: float = 255.0) -> np.ndarray:
    """A new uint8 image [H, W, 3] from one of another kind.

    Args:
        image: uint8, or float that runs from ``low`` (black) to ``high`` (white); [H, W], [H, W, C] or [C, H, W] with
            C = 1 (grey), 3 (RGB) or, as the last axis, 4 (RGBA, whose A is dropped).
        low: value of black in a float image.
        high: value of white in a float image.
    """
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[:, :, None]
    elif image.shape[2] not in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    if image.dtype != np.uint8:
        image = np.rint((image.astype(np.float32) - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
    return np.array(image.repeat(3, axis=2) if image.shape[2] == 1 else image[:, :, :3], order="C")


def check_range(image: np.ndarray, low: float, high: float) -> None:
    """Refuse a float image that its space does not hold, and warn of one in 0..1 where the space goes to 255.

    Raises:
        ValueError: it goes beyond ``low`` or ``high`` by more than a hundredth of what lies between.
    """
    least, most, slack = float(image.min()), float(image.max()), 0.01 * (high - low)
    if not low - slack <= least <= most <= high + slack:
        raise ValueError(
            f"an image holds values from {least:g} to {most:g}, its space {low:g} to {high:g}; correct one of them"
        )
    if high == 255 and 0 < most <= 1:
        warnings.warn(
            f"an image holds values from {least:g} to {most:g}, its space goes to 255: all but black; if "
            "1 is white, correct the space",
            stacklevel=2,
        )


def state_space(parts: Sequence[gym.Space], indices: list[int] | None) -> spaces.Box:
    """The space of ``parts`` flattened and concatenated, float32 [S], or of the numbers at ``indices`` of it.

    Raises:
        ValueError: if a part does not flatten into a Box, or an index is not one of the state.
    """
    flat = [spaces.flatten_space(part) for part in parts]
    boxes = [box for box in flat if isinstance(box, spaces.Box)]
    if len(boxes) < len(flat):
        raise ValueError(f"the state {parts} cannot be flattened into a Box; give state_key without the odd part.")
    low, high = (np.concatenate([getattr(box, side).ravel() for box in boxes]) for side in ("low", "high"))
    if indices is not None:
        if not indices or min(indices) < 0 or max(indices) >= len(low):
            raise ValueError(f"state_indices={indices} must be indices into the state of {len(low)} numbers.")
        low, high = low[indices], high[indices]
    return spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)


def parts_of(space: gym.Space, above: str = "") -> dict[str, gym.Space]:
    """Path -> space of everything in a Dict, the Dicts within it included; empty for other spaces."""
    parts: dict[str, gym.Space] = {}
    for key, part in space.spaces.items() if isinstance(space, spaces.Dict) else ():
        parts[f"{above}{key}"] = part
        parts.update(parts_of(part, f"{above}{key}/"))
    return parts


def part_at(nested: Any, path: str) -> Any:
    """What lies at ``path`` in a nested dictionary or Dict space; "" is the whole."""
    if not path:
        return nested
    if path in nested.keys():  # noqa: SIM118 - a Dict space asks ``in`` of samples
        return nested[path]
    key, _, rest = path.partition("/")
    return part_at(nested[key], rest)


def is_image(space: gym.Space) -> bool:
    """Whether ``rgb_image`` can convert the members of a space."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        return False
    channels = len(space.shape) == 2 or space.shape[2] in (1, 3, 4) or space.shape[0] in (1, 3)
    return channels and (space.dtype == np.uint8 or (np.issubdtype(space.dtype, np.floating) and space.is_bounded()))


def is_picture(space: gym.Space) -> bool:
    """Whether a space is one of images beyond doubt."""
    return is_image(space) and (space.dtype == np.uint8 or len(space.shape or ()) == 3)
