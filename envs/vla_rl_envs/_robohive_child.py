"""What ``VLA/RoboHive-v0`` runs in RoboHive's own Python: one of its environments in the observation convention."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np

_KITCHEN_ASSETS = ("franka_sim", "furniture_sim", "scene_sim")


class RoboHiveChild:
    """A RoboHive environment with pictures, proprioception and an honest seed, in the API of Gymnasium."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012

    def __init__(
        self,
        env_id: str,
        *,
        instructions: list[str],
        task_id: int,
        image_size: int,
        camera: str,
        horizon: int | None,
        reward: str,
        render_quality: str,
        terminate_on_success: bool,
        render_mode: str | None = None,
    ) -> None:
        _check_assets(env_id)
        import gymnasium
        import robohive  # noqa: F401  # registers the ids
        from gymnasium import spaces

        kwargs: dict[str, Any] = {} if horizon is None else {"max_episode_steps": horizon}
        if "visual_keys" in gymnasium.spec(env_id).kwargs:
            kwargs["visual_keys"] = None  # with them RoboHive imports torch; the picture is drawn here instead
        try:
            self.env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
        except ValueError as error:
            if "resource not found" not in str(error):
                raise
            raise FileNotFoundError(f"a part of RoboHive's assets (SimHive) is missing: {error}") from error
        self.base: Any = self.env.unwrapped
        self.instructions, self.task_id = instructions, task_id
        self.image_size, self.camera = image_size, camera
        self.reward, self.terminate_on_success = reward, terminate_on_success
        self.render_quality, self.render_mode = render_quality, render_mode
        self.solved_before = False
        self._prepare_camera()
        size = (image_size, image_size, 3)
        self.image = np.zeros(size, dtype=np.uint8)
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, size, np.uint8),
                "state": spaces.Box(-np.inf, np.inf, self._state(None).shape, np.float32),
                "task_id": spaces.Discrete(len(instructions)),
            }
        )
        self.action_space = self.env.action_space

    def reset(self, *, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed is not None:
            self.base.seed(seed)  # reset(seed=) does not reach the generator that places robot and kitchen
            self.base.robot.np_random = self.base.np_random
        observation, _ = self.env.reset()
        self.solved_before = False
        return self._observe(observation), {
            "success": False,
            "solved": False,
            "instruction": self.instructions[self.task_id],
        }

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        observation, dense, terminated, truncated, info = self.env.step(action)
        solved = bool(info["solved"])
        first_success = solved and not self.solved_before
        self.solved_before = self.solved_before or solved
        reward = float(dense) if self.reward == "dense" else float(first_success)
        terminated = bool(terminated) or (self.solved_before and self.terminate_on_success)
        return (
            self._observe(observation),
            reward,
            terminated,
            bool(truncated),
            {
                "success": self.solved_before,
                "solved": solved,
            },
        )

    def render(self) -> Any:
        return self.image

    def close(self) -> None:
        renderer = self.base.sim.renderer._renderer
        if renderer is not None:
            renderer.close()
        self.env.close()

    def physics(self) -> dict[str, Any]:
        """``qpos``, ``qvel`` and the place of the robot's base: what the tests compare pictures and states with."""
        data = self.base.sim.data
        base = self.base.sim.model.body_pos[self.base.robot_base_bid]
        return {"qpos": np.array(data.qpos), "qvel": np.array(data.qvel), "base": np.array(base)}

    def exteroception(self) -> Any:
        """The picture that RoboHive's own ``get_exteroception`` gives for this camera and size."""
        key = f"rgb:{self.camera}:{self.image_size}x{self.image_size}:2d"
        self.base.visual_keys = [key]
        try:
            return self.base.get_exteroception()[key]
        finally:
            self.base.visual_keys = None

    def _prepare_camera(self) -> None:
        model = self.base.sim.model
        cameras = [model.id2name(i, "camera") for i in range(model.ncam)]
        if self.camera not in cameras:
            raise ValueError(f"there is no camera {self.camera!r}; its cameras are {', '.join(cameras)}.")
        if self.render_quality == "fast" and self.image_size:
            model.ptr.vis.quality.shadowsize = 0
            model.ptr.vis.quality.offsamples = 0
            model.ptr.mat_reflectance[:] = 0

    def _state(self, observation: Any) -> Any:
        keys = self.base.proprio_keys
        if keys:
            return np.concatenate([np.ravel(self.base.proprio_dict[key]) for key in keys]).astype(np.float32)
        if observation is None:
            return np.zeros(self.env.observation_space.shape or (), np.float32)
        return np.asarray(observation, dtype=np.float32)

    def _observe(self, observation: Any) -> dict[str, Any]:
        if self.render_quality != "none":
            size = self.image_size
            renderer = self.base.sim_obsd.renderer
            self.image = renderer.render_offscreen(width=size, height=size, camera_id=self.camera)
        return {"image": self.image, "state": self._state(observation), "task_id": self.task_id}


def _check_assets(env_id: str) -> None:
    spec = importlib.util.find_spec("robohive")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("robohive is not installed", name="robohive")
    simhive = os.path.join(os.path.dirname(spec.origin), "simhive")
    wanted = _KITCHEN_ASSETS if env_id.startswith("FK1_") else ("",)
    missing = [name for name in wanted if not os.path.isdir(os.path.join(simhive, name))]
    if missing:
        what = ", ".join(missing).strip() or "everything"
        raise FileNotFoundError(f"RoboHive's assets (SimHive) are missing in {simhive}: {what}")
