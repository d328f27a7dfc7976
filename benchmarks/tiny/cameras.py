"""Where a camera stands and what it sees: poses, and the projection of points in the world to pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """A pinhole camera in MuJoCo's convention: it looks along -z, x is right and y is up in the picture.

    Attributes:
        eye: position in metres, float64 [3].
        axes: columns are the camera's x, y and z in the world, float64 [3, 3].
        fovy: vertical field of view in degrees.
    """

    eye: Array
    axes: Array
    fovy: float


def look_at(eye: Array, target: Array, *, roll: float = 0.0, fovy: float = 45.0) -> View:
    """The view from ``eye`` to ``target`` (both [3], metres) with the world's z upwards, turned by ``roll`` radians."""
    back = np.asarray(eye, dtype=float) - target
    back /= np.linalg.norm(back)
    right = np.cross((0.0, 0.0, 1.0), back)
    right /= np.linalg.norm(right)
    up = np.cross(back, right)
    cos, sin = np.cos(roll), np.sin(roll)
    axes = np.stack([cos * right + sin * up, cos * up - sin * right, back], axis=1)
    return View(np.asarray(eye, dtype=float), axes, fovy)


def orbit(target: Array, *, distance: float, azimuth: float, elevation: float, fovy: float = 45.0) -> View:
    """MuJoCo's free camera: ``target`` [3] seen from ``distance`` metres, with angles in degrees."""
    az, el = np.deg2rad(azimuth), np.deg2rad(elevation)
    forward = np.array([np.cos(el) * np.cos(az), np.cos(el) * np.sin(az), np.sin(el)])
    return look_at(target - distance * forward, target, fovy=fovy)


def project(points: Array, view: View) -> tuple[Array, Array]:
    """Where world points appear in a square picture.

    Args:
        points: metres, float64 [N, 3].
        view: the camera.

    Returns:
        Coordinates [N, 2]: column and row as fractions of the picture's side from its top left corner, outside [0, 1]
        for points outside; and depth [N] in metres along the line of sight, negative behind the camera.
    """
    local = (np.atleast_2d(points) - view.eye) @ view.axes
    depth = -local[:, 2]
    half = np.tan(np.deg2rad(view.fovy) / 2) * np.where(np.abs(depth) < 1e-9, 1e-9, depth)
    return np.stack([0.5 + local[:, 0] / half / 2, 0.5 - local[:, 1] / half / 2], axis=1), depth
