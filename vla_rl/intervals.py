"""Confidence intervals of success rates."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def wilson_interval(successes: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927), which stays inside [0, 1] and has width at 0 and n.

    Raises:
        ValueError: unless ``0 <= successes <= n``, ``n > 0`` and ``0 < confidence < 1``.
    """
    if not (0 <= successes <= n and n > 0 and 0 < confidence < 1):
        raise ValueError(
            f"wilson_interval got {successes} successes of {n} at confidence {confidence}; "
            "give 0 <= successes <= n, n > 0 and a confidence between 0 and 1."
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (0.0 if successes == 0 else float(center - half), 1.0 if successes == n else float(center + half))
