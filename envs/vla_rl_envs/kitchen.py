"""``VLA/FrankaKitchen-v0``: single tasks of Franka Kitchen as image + state + language environments."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from vla_rl_envs.actions import checked_action
from vla_rl_envs.kitchen_tasks import INSTRUCTIONS, TASK_TABLE, TASKS, VARIANTS
from vla_rl_envs.meshes import mesh_fingerprint
from vla_rl_envs.names import known_name
from vla_rl_envs.rendering import import_mujoco, scene_renderer

mujoco = import_mujoco()

try:
    from gymnasium_robotics.envs.franka_kitchen.franka_env import FrankaRobot
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('VLA/FrankaKitchen-v0 needs Gymnasium-Robotics: pip install "vla-rl[kitchen]"') from error

START_QPOS: NDArray[np.float64] = np.array(
    [0.148388023, -1.76848573, 1.84390296, -2.4768576, 0.260252026, 0.712533105, 1.59515394, 0.0479267505]
    + [0.0371350919, -2.6627985e-4, -5.18043486e-5, 3.1287722e-5, -4.51199853e-5, -3.90842156e-6, -4.22629655e-5]
    + [6.28065475e-5, 4.04984708e-5, 4.62730939e-4, -2.26906415e-4, -4.65501369e-4, -6.44129196e-3, -1.77048263e-3]
    + [1.08009684e-3, -0.269397440, 0.350383255, 1.61944683, 1.00618764, 4.06395120e-3, -6.62095997e-3]
    + [-2.68278933e-4]
)
"""FrankaKitchen-v1's one start: 9 robot joints, 14 kitchen joints, the kettle's position and quaternion."""

ARM_SPREAD = 0.1
"""Largest change of an arm joint at reset, in radians, at ``variation=1``."""

KITCHEN_SPREAD = 0.05
"""Largest shift of the kitchen along x and along y at reset, in metres, at ``variation=1``."""

_SCENE = "../assets/kitchen_franka/kitchen_assets/kitchen_env_model.xml"
_KETTLE = slice(23, 26)
_STATE_LOW = np.array([-np.pi] * 7 + [-0.02] * 2, dtype=np.float32)
_STATE_HIGH = np.array([np.pi] * 7 + [0.06] * 2, dtype=np.float32)

_compiled: dict[str, tuple[Any, str]] = {}


class _Simulator(FrankaRobot):
    """The robot in the kitchen; compiled models are shared, and a reset draws from a given generator."""

    def _initialize_simulation(self) -> tuple[Any, Any]:
        if self.fullpath not in _compiled:
            compiled = mujoco.MjModel.from_xml_path(self.fullpath)
            _compiled[self.fullpath] = (compiled, mesh_fingerprint(compiled))
        model = copy.copy(_compiled[self.fullpath][0])
        return model, mujoco.MjData(model)

    def start_episode(self, rng: np.random.Generator, *, variation: float) -> NDArray[np.float64]:
        """Begin at a varied start; returns the shift of the kitchen in metres, float64 [3].

        The same numbers are drawn whatever ``variation`` is, so that a seed means the same directions.
        """
        self.np_random = rng
        qpos = START_QPOS.copy()
        qpos[:7] += variation * rng.uniform(-ARM_SPREAD, ARM_SPREAD, 7)
        shift = variation * np.append(rng.uniform(-KITCHEN_SPREAD, KITCHEN_SPREAD, 2), 0.0)
        qpos[_KETTLE] += shift
        mujoco.mj_resetData(self.model, self.data)
        self.model.body("desk").pos = _compiled[self.fullpath][0].body("desk").pos + shift
        self.set_state(qpos, np.zeros(self.model.nv))
        self._get_obs()
        return shift

    def observed_joints(self) -> NDArray[np.float64]:
        """The nine joint positions with the sensors' noise, as the controller sees them, float64 [9]."""
        return self._last_robot_qpos.copy()


class FrankaKitchenEnv(gym.Env[dict[str, Any], NDArray[np.float32]]):
    """A task in Franka Kitchen (Franka arm, joint velocity control) seen through a camera and told in a sentence.

    The robot, the scene and the controller are those of Gymnasium-Robotics' ``FrankaKitchen-v1``. That environment
    always starts in one state, knows seven elements and counts one as done when it is within .3 of its goal; here the
    start varies, the paper's left door and first knob have goals too, and the rules are strict.

    ## Observation
    ``image`` uint8 [image_size, image_size, 3], from a free camera that shows all tasks; ``state`` float32 [9]: the
    robot's seven arm joints in radians and two fingers in metres (0 closed, .04 open), with the simulator's own
    sensor noise of up to .001, not normalised; ``task_id`` int64, the index into ``instructions``, which is the same
    for all tasks.

    ## Action
    float32 [9] in [-1, 1]: velocity of the seven arm joints and the two fingers; 1 sets the joint's target .16 rad
    (or m: the full stroke is .04) beyond the joint's observed position.

    ## Reward
    1 at the step at which the episode first succeeds, else 0.

    ## Episode end
    Terminated at success (unless ``terminate_on_success=False``), truncated after ``horizon`` steps.
    ``info["success"]``: whether the episode has succeeded so far, by the rule in ``kitchen_tasks.TASK_TABLE``.

    ## Reset
    Arm joints change by up to .1 rad and the kitchen (kettle included) moves by up to 5 cm along x and y, times
    ``variation``. All of it, and the sensor noise, is drawn from the environment's own generator: ``reset(seed=)``
    fixes the episode. ``info["instruction"]`` is the sentence.

    Args:
        task: one of ``kitchen_tasks.TASKS``, for example ``"slide-door-open"``.
        variant: ``"original"`` or a name in ``kitchen_tasks.VARIANTS[task]``: ``"red"``, ``"yellow"`` slide door.
        image_size: height and width of the image in pixels.
        horizon: most steps in an episode.
        variation: how much a reset varies; 0 is the simulator's one start, 1 as described above.
        render_quality: ``"fast"``, ``"full"`` (MuJoCo's own) or ``"none"`` (black images, for work on states only).
        terminate_on_success: end the episode at success.
        render_mode: ``"rgb_array"`` or None; ``render()`` returns the observation's image.

    Raises:
        ValueError: for an unknown task, variant or quality, naming the nearest known one, and for numbers out of range.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 12}

    def __init__(
        self,
        task: str = "slide-door-open",
        variant: str = "original",
        *,
        image_size: int = 128,
        horizon: int = 280,
        variation: float = 1.0,
        render_quality: Literal["fast", "full", "none"] = "fast",
        terminate_on_success: bool = True,
        render_mode: str | None = None,
    ) -> None:
        self.task = known_name(task, TASKS, "Franka Kitchen task")
        variants = VARIANTS.get(task, {})
        self.variant = known_name(variant, ("original", *variants), f"variant of {task!r}")
        self.render_quality = known_name(render_quality, ("fast", "full", "none"), "render_quality")
        if image_size < 1 or horizon < 1 or not 0 <= variation < np.inf:
            raise ValueError(
                f"image_size={image_size} and horizon={horizon} must be at least 1, variation={variation} a finite "
                "number from 0 up."
            )
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r} is not supported: use 'rgb_array' or None.")
        self.image_size, self.horizon, self.variation = image_size, horizon, variation
        self.terminate_on_success, self.render_mode = terminate_on_success, render_mode
        self.instructions = INSTRUCTIONS
        self.task_id = TASKS.index(task)

        self.simulator = _Simulator(_SCENE)
        for material, rgba in variants.get(variant, {}).items():
            self.model.material(material).rgba = rgba
        self._camera = mujoco.MjvCamera()
        self._camera.lookat[:] = (-0.3, 0.5, 2.15)
        self._camera.distance, self._camera.azimuth, self._camera.elevation = 1.9, 60.0, -20.0

        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "state": spaces.Box(_STATE_LOW, _STATE_HIGH, dtype=np.float32),
                "task_id": spaces.Discrete(len(INSTRUCTIONS)),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (9,), np.float32)
        self._renderer: Any = None
        self._image = np.zeros((image_size, image_size, 3), dtype=np.uint8)
        self._shift = np.zeros(3)
        self.resets, self.steps, self._success = 0, 0, False

    @property
    def model(self) -> Any:
        """MuJoCo's ``MjModel`` of this environment alone."""
        return self.simulator.model

    @property
    def data(self) -> Any:
        """MuJoCo's ``MjData``."""
        return self.simulator.data

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; robot and kitchen pose are drawn from the environment's generator."""
        super().reset(seed=seed, options=options)
        self._shift = self.simulator.start_episode(self.np_random, variation=self.variation)
        self.resets, self.steps, self._success = self.resets + 1, 0, False
        return self._observe(), {"success": False, "instruction": INSTRUCTIONS[self.task_id]}

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move the joints by ``action`` (clipped to [-1, 1]) and let 40 physics steps pass (80 ms).

        Raises:
            ValueError: for an action of another shape, or with numbers that are not finite.
        """
        self.simulator.step(checked_action(action, self.action_space).astype(np.float32))
        self.steps += 1
        solved = TASK_TABLE[self.task].solved(self.data.qpos, self._shift)
        first_success = solved and not self._success
        self._success = self._success or solved
        terminated = self._success and self.terminate_on_success
        truncated = self.steps >= self.horizon
        return self._observe(), float(first_success), terminated, truncated, {"success": self._success}

    def render(self) -> NDArray[np.uint8]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The current picture, uint8 [image_size, image_size, 3]."""
        return self._image.copy()

    def draw(self, observation: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Picture of an observation of ``FrankaKitchen-v1``, for datasets of states such as Minari's ``D4RL/kitchen``.

        Args:
            observation: float64 [59]: positions and velocities of the robot (9, 9), then of the kitchen (21, 20).

        Returns:
            uint8 [image_size, image_size, 3]; the environment itself stays where it is.

        Raises:
            ValueError: for another shape.
        """
        if np.shape(observation) != (59,):
            raise ValueError(f"an observation of FrankaKitchen-v1 has shape (59,), not {np.shape(observation)}.")
        compiled = _compiled[self.simulator.fullpath][0]
        data = mujoco.MjData(compiled)
        data.qpos[:] = np.concatenate([observation[:9], observation[18:39]])
        mujoco.mj_forward(compiled, data)
        return self._scene_renderer().render(self.model, data, self._camera)

    def _scene_renderer(self) -> Any:
        if self._renderer is None:
            compiled, fingerprint = _compiled[self.simulator.fullpath]
            self._renderer = scene_renderer(
                compiled,
                self._camera,
                height=self.image_size,
                width=self.image_size,
                quality="full" if self.render_quality == "full" else "fast",
                fingerprint=fingerprint,
            )
        return self._renderer

    def _observe(self) -> dict[str, Any]:
        if self.render_quality != "none":
            self._image = self._scene_renderer().render(self.model, self.data, self._camera)
        else:
            self._image = np.zeros_like(self._image)
        state = np.clip(self.simulator.observed_joints().astype(np.float32), _STATE_LOW, _STATE_HIGH)
        return {"image": self._image, "state": state, "task_id": np.int64(self.task_id)}
