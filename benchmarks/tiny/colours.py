"""Colours with names: drawing one of a name, and naming one that is seen."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

NAMES: tuple[str, ...] = (
    "red",
    "orange",
    "yellow",
    "green",
    "cyan",
    "blue",
    "purple",
    "pink",
    "brown",
    "white",
    "grey",
    "black",
)

# Hue in degrees, saturation and value in [0, 1]; gaps between the ranges are nobody's.
_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-9, 7), (0.75, 1.0), (0.55, 0.9)),
    "orange": ((22, 33), (0.85, 1.0), (0.8, 1.0)),
    "yellow": ((50, 60), (0.75, 1.0), (0.8, 1.0)),
    "green": ((95, 145), (0.55, 1.0), (0.35, 0.8)),
    "cyan": ((176, 192), (0.65, 1.0), (0.65, 0.95)),
    "blue": ((212, 238), (0.65, 1.0), (0.5, 0.95)),
    "purple": ((268, 284), (0.55, 0.95), (0.4, 0.75)),
    "pink": ((318, 338), (0.4, 0.7), (0.85, 1.0)),
    "brown": ((16, 28), (0.6, 0.8), (0.25, 0.4)),
    "white": ((0, 360), (0.0, 0.04), (0.95, 1.0)),
    "grey": ((0, 360), (0.0, 0.06), (0.35, 0.5)),
    "black": ((0, 360), (0.0, 0.3), (0.02, 0.08)),
}


def draw(name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """A colour called ``name``, RGB in [0, 1], float64 [3].

    Raises:
        KeyError: for a name that is not in ``NAMES``.
    """
    hue, saturation, value = (rng.uniform(low, high) for low, high in _RANGES[name])
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1.0, saturation, value))


def looks_like(name: str, rgb: NDArray[np.floating]) -> bool:
    """Whether a colour as seen under some light, RGB in [0, 1], may be called ``name``.

    Light changes how bright a surface is more than its hue, so the test is loose in brightness.
    """
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(x) for x in rgb))
    low, high = _RANGES[name][0]
    if name in ("white", "grey", "black"):
        bounds = {"white": (0.7, 1.0), "grey": (0.2, 0.66), "black": (0.0, 0.17)}[name]
        return bounds[0] <= value <= bounds[1] and (saturation < 0.2 or name == "black")
    if saturation < 0.25 or value < 0.1 or (name in ("red", "orange", "yellow") and value < 0.4):
        return False
    if name == "brown" and value > 0.62:
        return False
    return abs((hue * 360 - (low + high) / 2 + 180) % 360 - 180) <= (high - low) / 2 + 8


def name_of(rgb: NDArray[np.floating]) -> str | None:
    """The one name for a surface's own colour, RGB in [0, 1]; None where it is between names."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(x) for x in rgb))
    for name, (hues, saturations, values) in _RANGES.items():
        middle, half = (hues[0] + hues[1]) / 2, (hues[1] - hues[0]) / 2
        near = abs((hue * 360 - middle + 180) % 360 - 180) <= half
        if near and saturations[0] <= saturation <= saturations[1] and values[0] <= value <= values[1]:
            return name
    return None
