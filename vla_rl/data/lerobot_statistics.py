"""Statistics of features per episode and of all episodes, as LeRobot keeps them in ``meta/stats.json``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}

FeatureStats = dict[str, np.ndarray]
"""``min``, ``max``, ``mean``, ``std``, ``q01`` .. ``q99`` of one feature, and ``count [1]``."""


def array_stats(array: np.ndarray) -> FeatureStats:
    """Statistics over the steps of an array ``[T, ...]``, each of one step's shape, or ``[1]`` for numbers."""
    rows = array.reshape(len(array), -1).astype(np.float64)
    shape = array.shape[1:] or (1,)
    found = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    found |= dict(zip(QUANTILES, np.quantile(rows, list(QUANTILES.values()), axis=0), strict=True))
    return {key: value.reshape(shape) for key, value in found.items()} | {"count": np.array([len(array)])}


def image_stats(images: np.ndarray) -> FeatureStats:
    """Statistics of pictures, uint8 ``[T, H, W, 3]``, by colour, scaled to [0, 1]: each ``[3, 1, 1]``."""
    counts = np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(3)])
    values, total = np.arange(256) / 255, counts[0].sum()
    mean = counts @ values / total
    std = np.sqrt(np.maximum(0, counts @ values**2 / total - mean**2))
    cumulative = counts.cumsum(axis=1) / total

    def level(share: float) -> np.ndarray:
        return values[(cumulative < share).sum(axis=1)]

    found = {"min": values[(counts > 0).argmax(axis=1)], "max": values[255 - (counts[:, ::-1] > 0).argmax(axis=1)]}
    found |= {"mean": mean, "std": std, **{key: level(share) for key, share in QUANTILES.items()}}
    return {key: value.reshape(3, 1, 1) for key, value in found.items()} | {"count": np.array([len(images)])}


def merge_stats(parts: Sequence[FeatureStats]) -> FeatureStats:
    """Statistics of all episodes: exact but for the quantiles, which are means weighted by length, as in LeRobot."""
    counts = np.concatenate([part["count"] for part in parts]).astype(np.float64)
    weights = counts / counts.sum()

    def average(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.tensordot(weights, np.stack(arrays), axes=1)

    mean = average([part["mean"] for part in parts])
    variance = average([part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": np.array([int(counts.sum())]),
        **{key: average([part[key] for part in parts]) for key in QUANTILES},
    }
