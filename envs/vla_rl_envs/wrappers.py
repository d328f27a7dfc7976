"""Gymnasium wrappers for environments that are not ours."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from vla_rl_envs.rendering import Quality, fixed_camera, import_mujoco, scene_renderer


class FastRender(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Fast ``render()`` for any MuJoCo environment made with ``render_mode="rgb_array"``.

    The environment must have MuJoCo's ``model`` and ``data`` on ``env.unwrapped``. The picture is that of its own
    camera (``camera_name``, ``camera_id`` or the free camera with ``default_camera_config``), at its own size, without
    shadows, reflections and multisampling, from decimated meshes. Simulation is untouched.

    Args:
        env: the environment.
        camera: a camera of the scene; None means the environment's own.
        height: image height in pixels; None means the environment's own.
        width: image width in pixels; None means the environment's own.
        quality: ``"fast"`` or ``"full"``.

    Raises:
        TypeError: if the environment has no MuJoCo model.
        ValueError: if it was not made with ``render_mode="rgb_array"``.
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        camera: str | None = None,
        height: int | None = None,
        width: int | None = None,
        quality: Quality = "fast",
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, camera=camera, height=height, width=width, quality=quality)
        gym.Wrapper.__init__(self, env)
        inner: Any = env.unwrapped
        if not hasattr(inner, "model") or not hasattr(inner, "data"):
            raise TypeError(f"{type(inner).__name__} has no MuJoCo model and data, which FastRender draws.")
        if env.render_mode != "rgb_array":
            raise ValueError(f"render_mode is {env.render_mode!r}: make the environment with render_mode='rgb_array'.")
        import_mujoco()
        own = _own_renderer(inner)
        self._height = height or getattr(inner, "height", None) or getattr(own, "height", 480)
        self._width = width or getattr(inner, "width", None) or getattr(own, "width", 480)
        self._quality: Quality = quality
        self._camera: Any = None if camera is None else fixed_camera(inner.model, camera)
        self._renderer: Any = None

    def render(self) -> NDArray[np.uint8]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The picture, uint8 [height, width, 3]."""
        inner: Any = self.env.unwrapped
        if hasattr(inner, "_render_callback"):  # Gymnasium-Robotics puts the marker of the goal in its place here
            inner._render_callback()
        if self._camera is None:
            self._camera = _own_camera(inner)
        if self._renderer is None:
            self._renderer = scene_renderer(
                inner.model, self._camera, height=self._height, width=self._width, quality=self._quality
            )
        return self._renderer.render(inner.model, inner.data, self._camera)


def _own_renderer(inner: Any) -> Any:
    """Gymnasium's ``MujocoRenderer`` of ``inner``, or of an environment that it keeps within, as the mazes do."""
    kept: list[Any] = [value for value in vars(inner).values() if isinstance(value, gym.Env)]
    return next((env.mujoco_renderer for env in (inner, *kept) if hasattr(env, "mujoco_renderer")), None)


def _own_camera(inner: Any) -> Any:
    """The camera that Gymnasium's ``MujocoRenderer`` would use for ``inner`` if it drew its first picture now."""
    mujoco = import_mujoco()
    own = _own_renderer(inner)
    camera = mujoco.MjvCamera()
    camera_id = getattr(own, "camera_id", -1)
    if camera_id >= 0:
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED.value, camera_id
        return camera
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE.value
    camera.lookat[:] = np.median(inner.data.geom_xpos, axis=0)
    camera.distance = inner.model.stat.extent
    for key, value in (getattr(own, "default_cam_config", None) or {}).items():
        if isinstance(value, np.ndarray):
            getattr(camera, key)[:] = value
        else:
            setattr(camera, key, value)
    return camera
