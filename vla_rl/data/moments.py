"""Means, squared deviations and ranges of an episode's actions and states, packed into its index entry, and joined."""

from __future__ import annotations

import base64
import binascii

import numpy as np

ROWS = ("mean", "squares", "minimum", "maximum")


def array_moments(values: np.ndarray) -> np.ndarray:
    """Mean, sum of squared deviations from it, smallest and largest of ``[T, D]`` over ``T``, float64 ``[4, D]``."""
    values = values.astype(np.float64)
    mean = values.mean(axis=0)
    return np.stack([mean, ((values - mean) ** 2).sum(axis=0), values.min(axis=0), values.max(axis=0)])


def episode_moments(actions: np.ndarray, state: np.ndarray | None) -> np.ndarray:
    """Moments of actions ``[T, A]`` and of the ``T`` states ``[T+1, S]`` they were chosen from, ``[4, A + S]``."""
    parts = [actions] if state is None else [actions, state[: len(actions)]]
    return np.concatenate([array_moments(part) for part in parts], axis=1)


def merge_moments(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Joins the moments of episodes, ``[E, 4, D]`` over ``lengths`` ``[E]`` steps, into those of all steps ``[4, D]``.

    Source: Chan, Golub, LeVeque 1979.
    """
    means, squares = rows[:, 0], rows[:, 1]
    weights = lengths[:, None] / lengths.sum()
    mean = (weights * means).sum(axis=0)
    total = squares.sum(axis=0) + (lengths[:, None] * (means - mean) ** 2).sum(axis=0)
    return np.stack([mean, total, rows[:, 2].min(axis=0), rows[:, 3].max(axis=0)])


def pack_moments(moments: np.ndarray) -> str:
    """Moments ``[4, D]`` as text that keeps every bit."""
    return base64.b64encode(np.ascontiguousarray(moments, dtype="<f8").tobytes()).decode()


def moments_agree(text: str, other: str) -> bool:
    """Whether two packed moments are the same up to rounding, which differs between machines, or one is missing."""
    if "" in (text, other) or text == other:
        return True
    size = len(text) * 3 // 4 // (8 * len(ROWS))
    mine, theirs = unpack_moments(text, size), unpack_moments(other, size)
    return mine is not None and theirs is not None and bool(np.allclose(mine, theirs, rtol=1e-9, atol=1e-12))


def unpack_moments(text: str, size: int) -> np.ndarray | None:
    """Moments ``[4, size]``, or None if the text does not hold that."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return np.frombuffer(content, "<f8").reshape(len(ROWS), size) if len(content) == 8 * len(ROWS) * size else None
