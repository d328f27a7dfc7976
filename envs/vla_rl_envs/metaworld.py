"""``VLA/MetaWorld-v0``: Meta-World's 50 tasks as image + state + language environments."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from vla_rl_envs.actions import checked_action
from vla_rl_envs.meshes import mesh_fingerprint
from vla_rl_envs.names import known_name
from vla_rl_envs.rendering import fixed_camera, import_mujoco, scene_renderer
from vla_rl_envs.tasks import INSTRUCTIONS, TASKS, VARIANTS, Variant

mujoco = import_mujoco()
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # all that the next step depends on

try:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('VLA/MetaWorld-v0 needs Meta-World: pip install "vla-rl[metaworld]"') from error

_compiled: dict[str, tuple[Any, str]] = {}
_simulators: dict[str, type] = {}

_LEROBOT_CORNER2 = (0.75, 0.075, 0.7)
_NEAR = 0.06  # metres from the object to which an episode's start brings the hand at most
_UNFINISHED = 0.9  # of the least way of a part that counts as success: how far a start moves it at most
_UPSIDE_DOWN_CAMERAS = ("corner", "corner2", "corner3", "corner4")


class _Part(NamedTuple):
    """The one joint whose way to an end of its range solves a task: its indices, that end, the least way in [0, 1]."""

    position: int
    velocity: int
    end: float
    way: float


class _Simulator:
    """Mix-in before a Meta-World class: compiled models are shared, and a reset draws from a given generator."""

    _dry = False
    _part: _Part | None = None

    def _initialize_simulation(self) -> tuple[Any, Any]:
        path = self.fullpath  # pyright: ignore[reportAttributeAccessIssue]
        if path not in _compiled:
            compiled = mujoco.MjModel.from_xml_path(path)
            compiled.camera("corner2").pos = _LEROBOT_CORNER2
            _compiled[path] = (compiled, mesh_fingerprint(compiled))
        model = copy.copy(_compiled[path][0])
        return model, mujoco.MjData(model)

    def do_simulation(self, ctrl: Any, n_frames: int) -> None:
        if not self._dry:
            super().do_simulation(ctrl, n_frames)  # pyright: ignore[reportAttributeAccessIssue]

    def start_episode(self: Any, rng: np.random.Generator, *, closeness: float) -> NDArray[np.float64]:
        """Meta-World's ``reset`` with positions drawn from ``rng``, then an approach; returns the 39-d observation.

        Meta-World runs ``reset_model`` twice per reset, the second time from cleared data. Only the drawn position and
        what it changes in the model survive the first, so its 250 physics steps are skipped.
        """
        self.np_random = rng
        self.curr_path_length = 0
        self._freeze_rand_vec, self._dry = False, True
        try:
            mujoco.mj_resetData(self.model, self.data)
            mujoco.mj_forward(self.model, self.data)
            self.reset_model()
        finally:
            self._freeze_rand_vec, self._dry = True, False
        mujoco.mj_resetData(self.model, self.data)
        observation = self.reset_model()
        if closeness > 0:
            if "_part" not in type(self).__dict__:
                type(self)._part = self._find_part()
            self._approach(closeness)
            observation = self._get_obs()
        self._prev_obs = observation[:18].copy()
        observation[18:36] = self._prev_obs
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        return observation.astype(np.float64)

    def _approach(self: Any, closeness: float) -> None:
        """Move the task's part, if it has one, and the open hand towards the (first) object, as actions would."""
        part, place = self._part, 0.0
        if part is not None:
            usual = float(self.data.qpos[part.position])
            place = usual + max(2 * closeness - 1, 0.0) * _UNFINISHED * part.way * (part.end - usual)
            self._move_part(place)
            closeness = min(2 * closeness, 1.0)
        hand, thing = self.get_endeff_pos(), self._get_pos_objects()[:3]
        gap = thing - hand
        distance = np.linalg.norm(gap)
        goal = hand + gap / distance * closeness * max(distance - _NEAR, 0.0)
        for _ in range(int(distance / self.action_scale) + 10):
            self.set_xyz_action(np.clip((goal - self.data.mocap_pos[0]) / self.action_scale, -1, 1))
            self.do_simulation([-1, 1], self.frame_skip)
        if part is not None:
            self._move_part(place)  # once more, as the hand may have touched it

    def _move_part(self: Any, position: float) -> None:
        self.data.qpos[self._part.position] = position
        self.data.qvel[self._part.velocity] = 0.0
        mujoco.mj_forward(self.model, self.data)

    def _find_part(self: Any) -> _Part | None:
        """The only joint of the scene beside the robot's, if it has no spring and an end of it is success."""
        model, robot = self.model, self.model.body("right_hand").rootid
        joints = [joint for joint in range(model.njnt) if model.body_rootid[model.jnt_bodyid[joint]] != robot]
        kinds = (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE)
        if len(joints) != 1 or model.jnt_type[joints[0]] not in kinds or model.jnt_stiffness[joints[0]] > 0:
            return None
        position, velocity = model.jnt_qposadr[joints[0]], model.jnt_dofadr[joints[0]]
        before = self.data.qpos[position]
        kept, everything = np.empty(mujoco.mj_stateSize(model, _STATE)), (model, self.data)
        mujoco.mj_getState(*everything, kept, _STATE)

        def solved(end: float, way: float) -> bool:
            self.data.qpos[position] = before + way * (end - before)
            mujoco.mj_forward(self.model, self.data)
            return bool(self.evaluate_state(self._get_obs(), np.zeros(4, np.float32))[1]["success"])

        ways = np.linspace(0, 1, 21)
        found = [(end, way) for end in model.jnt_range[joints[0]] for way in ways if solved(end, way)]
        mujoco.mj_setState(*everything, kept, _STATE)
        mujoco.mj_forward(*everything)
        mujoco.mj_setState(*everything, kept, _STATE)  # with the solver's last forces, which mj_forward replaces
        if not found or found[0][1] == 0:
            return None
        end, way = found[0]
        return _Part(int(position), int(velocity), float(end), float(way))


def _make_simulator(task: str) -> Any:
    if task not in _simulators:
        base = ALL_V3_ENVIRONMENTS[f"{task}-v3"]
        _simulators[task] = type(base.__name__, (_Simulator, base), {})
    simulator = _simulators[task]()
    simulator._set_task_called = True
    simulator.seeded_rand_vec = True
    # The 39-d observation of the scripted experts includes the goal; its cached space was made without.
    simulator._partially_observable = False
    simulator.__dict__.pop("sawyer_observation_space", None)
    return simulator


class MetaWorldEnv(gym.Env[dict[str, Any], NDArray[np.float32]]):
    """A Meta-World task (Sawyer arm, end-effector control) seen through a camera and told in a sentence.

    ## Observation
    ``image`` uint8 [image_size, image_size, 3]; ``state`` float32 [4]: hand x, y, z in metres and gripper opening
    in [0, 1] (the first four numbers of Meta-World's observation, as in LeRobot); ``task_id`` int64, the index into
    ``instructions``, which is the same for all 50 tasks.

    ## Action
    float32 [4] in [-1, 1]: hand displacement x, y, z in centimetres per step, gripper effort (1 closes).

    ## Reward
    ``"sparse"``: 1 at the step at which the episode first succeeds, else 0. ``"dense"``: Meta-World's own, 0 to 10.

    ## Episode end
    Terminated at success (unless ``terminate_on_success=False``), truncated after ``horizon`` steps.
    ``info["success"]``: whether the episode has succeeded so far, the official rule (Meta-World itself uses 500 steps).

    ## Reset
    Object and goal positions are drawn from the environment's own generator: ``reset(seed=)`` fixes them, a reset
    without a seed draws the next. ``info["instruction"]`` is the sentence. ``options={"closeness": c}``, c in [0, 1],
    begins nearer to success, and the info says so. The hand comes as near as 6 cm to the object, and where the task is
    to move one joint without a spring (door, drawer, window, faucet, lock, dial, handle), c above .5 moves that too, up
    to nine tenths of the way. Not all of these stay there, and the hand may touch them, so that some starts solve
    themselves: at c = 1, seeds 0 to 19 and 30 actions of zero, 12 of handle-press-side, 7 of dial-turn, 5 of door-lock
    and of door-unlock, 2 of handle-press and 1 of coffee-button.

    Args:
        task: a task name without its version, for example ``"drawer-open"``.
        variant: ``"original"`` or a name in ``vla_rl_envs.tasks.VARIANTS[task]``.
        image_size: height and width of the image in pixels.
        horizon: most steps in an episode.
        reward: ``"sparse"`` or ``"dense"``.
        camera: a camera of the scene; ``"corner2"`` is moved to where LeRobot has it.
        render_quality: ``"fast"``, ``"full"`` (MuJoCo's own) or ``"none"`` (black images, for work on states only).
        terminate_on_success: end the episode at success.
        render_mode: ``"rgb_array"`` or None; ``render()`` returns the observation's image.

    Raises:
        ValueError: for an unknown task, variant, camera, reward or quality, naming the nearest known one.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(
        self,
        task: str = "drawer-open",
        variant: str = "original",
        *,
        image_size: int = 64,
        horizon: int = 150,
        reward: Literal["sparse", "dense"] = "sparse",
        camera: str = "corner2",
        render_quality: Literal["fast", "full", "none"] = "fast",
        terminate_on_success: bool = True,
        render_mode: str | None = None,
    ) -> None:
        self.task = known_name(task, TASKS, "Meta-World task")
        variants = VARIANTS.get(task, {})
        self.variant = known_name(variant, ("original", *variants), f"variant of {task!r}")
        known_name(reward, ("sparse", "dense"), "reward")
        self.render_quality = known_name(render_quality, ("fast", "full", "none"), "render_quality")
        if image_size < 1 or horizon < 1:
            raise ValueError(f"image_size={image_size} and horizon={horizon} must both be at least 1.")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r} is not supported: use 'rgb_array' or None.")
        self.image_size, self.horizon, self.reward = image_size, horizon, reward
        self.terminate_on_success, self.render_mode = terminate_on_success, render_mode
        self.instructions = INSTRUCTIONS
        self.task_id = TASKS.index(task)

        self.simulator = _make_simulator(task)
        self.simulator.max_path_length = horizon + 1
        self._apply(variants.get(variant, Variant()))
        self._camera = fixed_camera(self.model, camera)
        self._rotate = camera in _UPSIDE_DOWN_CAMERAS

        hand = self.simulator._HAND_SPACE
        self._state_low = np.append(hand.low, -1.0).astype(np.float32)
        self._state_high = np.append(hand.high, 1.0).astype(np.float32)
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "state": spaces.Box(self._state_low, self._state_high, dtype=np.float32),
                "task_id": spaces.Discrete(len(INSTRUCTIONS)),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        self._renderer: Any = None
        self._observation: NDArray[np.float64] = np.zeros(39)
        self._image = np.zeros((image_size, image_size, 3), dtype=np.uint8)
        self._steps, self._success = 0, False

    @property
    def model(self) -> Any:
        """MuJoCo's ``MjModel`` of this environment alone."""
        return self.simulator.model

    @property
    def data(self) -> Any:
        """MuJoCo's ``MjData``."""
        return self.simulator.data

    def expert_observation(self) -> NDArray[np.float64]:
        """Meta-World's 39-d observation with the goal, as its scripted experts expect it."""
        observation = self._observation.copy()
        observation[36:39] = self.simulator._get_pos_goal()
        return observation

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode with positions drawn from the environment's generator.

        Raises:
            ValueError: for a closeness outside [0, 1].
        """
        super().reset(seed=seed, options=options)
        closeness = float((options or {}).get("closeness", 0.0))
        if not 0 <= closeness <= 1:
            raise ValueError(f"reset got closeness={closeness}; give 0 (the usual start) to 1 (nearly solved).")
        self._observation = self.simulator.start_episode(self.np_random, closeness=closeness)
        self._steps, self._success = 0, False
        info = {"success": False, "instruction": INSTRUCTIONS[self.task_id]}
        return self._observe(), info | ({"closeness": closeness} if "closeness" in (options or {}) else {})

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move the hand by ``action`` (clipped to [-1, 1]) and let five physics steps pass (12.5 ms).

        Raises:
            ValueError: for an action of another shape, or with numbers that are not finite.
        """
        action = np.clip(checked_action(action, self.action_space).astype(np.float32), -1.0, 1.0)
        self._observation, dense, _, _, metrics = self.simulator.step(action)
        self._steps += 1
        first_success = not self._success and bool(metrics["success"])
        self._success = self._success or first_success
        reward = float(dense) if self.reward == "dense" else float(first_success)
        terminated = self._success and self.terminate_on_success
        return self._observe(), reward, terminated, self._steps >= self.horizon, {"success": self._success}

    def render(self) -> NDArray[np.uint8]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The current picture, uint8 [image_size, image_size, 3]."""
        return self._image.copy()

    def _apply(self, variant: Variant) -> None:
        for material, rgba in variant.colours.items():
            self.model.material(material).rgba = rgba
        if variant.low is not None and variant.high is not None:
            low, high = np.array(variant.low), np.array(variant.high)
            self.simulator._random_reset_space = spaces.Box(low, high, dtype=np.float64)

    def _observe(self) -> dict[str, Any]:
        if self.render_quality != "none":
            if self._renderer is None:
                compiled, fingerprint = _compiled[self.simulator.fullpath]
                self._renderer = scene_renderer(
                    compiled,
                    self._camera,
                    height=self.image_size,
                    width=self.image_size,
                    quality=self.render_quality,  # pyright: ignore[reportArgumentType]
                    fingerprint=fingerprint,
                )
            self._image = self._renderer.render(self.model, self.data, self._camera, rotate=self._rotate)
        else:
            self._image = np.zeros_like(self._image)
        state = np.clip(self._observation[:4].astype(np.float32), self._state_low, self._state_high)
        return {"image": self._image, "state": state, "task_id": np.int64(self.task_id)}
