"""``VLA/RoboHive-v0``: RoboHive's environments, run in the Python environment of their own that they need."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

from vla_rl_envs.actions import checked_action
from vla_rl_envs.subprocess_env import SubprocessEnv

KITCHEN_INSTRUCTIONS: dict[str, str] = {
    "Knob1On": "turn the lower right knob",
    "LightOn": "switch on the light",
    "MicroOpen": "open the microwave",
    "SdoorOpen": "slide the cabinet door open",
    "LdoorOpen": "open the left cabinet door",
    "Knob2On": "turn the lower left knob",
    "Knob3On": "turn the upper right knob",
    "Knob4On": "turn the upper left knob",
    "RdoorOpen": "open the right cabinet door",
    "Stove4Kettle": "move the kettle to the back burner",
    "Stove1Kettle": "move the kettle to the right burner",
    "Knob1Off": "turn the lower right knob back",
    "Knob2Off": "turn the lower left knob back",
    "Knob3Off": "turn the upper right knob back",
    "Knob4Off": "turn the upper left knob back",
    "LightOff": "switch off the light",
    "MicroClose": "close the microwave",
    "SdoorClose": "slide the cabinet door shut",
    "LdoorClose": "close the left cabinet door",
    "RdoorClose": "close the right cabinet door",
}
"""Sentence of RoboHive's kitchen tasks (``FK1_<task>Fixed-v4``, ``...Random-v4``, ``...Random_v2d-v4``), the same as
``VLA/FrankaKitchen-v0`` has where both have the task. The first five are the paper's."""

_CHILD = Path(__file__).with_name("_robohive_child.py")
_KITCHEN_ID = re.compile(r"FK1_(\w+?)(?:Fixed|Random|Random_v2d)-v4")
_DOCTOR = "`vla-rl doctor robohive` prints the commands that make the environment"


class RoboHiveEnv(SubprocessEnv):
    """An environment of RoboHive 0.7.0, such as the kitchen tasks ``FK1_*``, in a process of its own Python.

    RoboHive pins versions that exclude Meta-World 3, so it lives in an environment of its own, which
    ``vla-rl doctor robohive`` explains; ``python`` names its interpreter.

    ## Observation
    ``image`` uint8 [image_size, image_size, 3]; ``state`` float32 [S]: RoboHive's proprioception, for the kitchen
    S = 24: nine joint positions (radians; the two fingers in metres), the same joints' velocity times the time step
    of 0.08 s, and the pose of the hand relative to the robot's base (x, y, z in metres, Euler angles in radians);
    ``task_id`` int64, the index into ``instructions``. Nothing about the kitchen's objects is in ``state``, whichever
    variant is chosen.

    ## Action
    RoboHive's own; for the kitchen float32 [9] in [-1, 1]: joint velocities relative to their limits.

    ## Reward
    ``"sparse"``: 1 at the step at which the episode is first solved, else 0. ``"dense"``: RoboHive's own.

    ## Episode end
    Terminated at success (unless ``terminate_on_success=False``; RoboHive itself never terminates the kitchen),
    truncated after ``horizon`` steps. ``info["success"]``: whether the episode has been solved so far;
    ``info["solved"]``: RoboHive's flag at this step (its own success rate counts episodes with more than five).

    ## Reset
    ``...Random...`` ids draw the robot's pose and its place in the kitchen: ``reset(seed=)`` fixes them, a reset
    without a seed draws the next. ``info["instruction"]`` is the sentence.

    Args:
        env_id: RoboHive's id, such as ``"FK1_SdoorOpenRandom_v2d-v4"``.
        python: interpreter of RoboHive's environment; None takes ``$VLA_RL_ROBOHIVE_PYTHON``.
        image_size: height and width of the image in pixels.
        camera: a camera of the scene; the kitchen has ``top_cam``, ``left_cam``, ``right_cam``, ``Franka_wrist_cam``.
        horizon: most steps in an episode; None is RoboHive's own (50 for the kitchen tasks).
        reward: ``"sparse"`` or ``"dense"``.
        render_quality: ``"fast"`` (no shadows, reflections or multisampling), ``"full"`` (MuJoCo's own) or ``"none"``
            (black images, for work on states only).
        terminate_on_success: end the episode at success.
        instruction: the sentence, for environments other than the kitchen's.
        render_mode: ``"rgb_array"`` or None; ``render()`` returns the observation's image.
        timeout: most seconds for a step or a reset.
        make_timeout: most seconds for the construction.

    Raises:
        FileNotFoundError: if there is no such interpreter, or the assets are missing.
        ModuleNotFoundError: if the interpreter lacks one of RoboHive's packages.
        ValueError: for an unknown camera, reward or quality, or if ``instruction`` is needed and not given.
        gymnasium.error.UnregisteredEnv: if RoboHive has no such id.
        SubprocessEnvError: for anything else that goes wrong in the child.
    """

    def __init__(
        self,
        env_id: str = "FK1_SdoorOpenRandom_v2d-v4",
        python: str | None = None,
        *,
        image_size: int = 64,
        camera: str = "top_cam",
        horizon: int | None = None,
        reward: Literal["sparse", "dense"] = "sparse",
        render_quality: Literal["fast", "full", "none"] = "fast",
        terminate_on_success: bool = True,
        instruction: str | None = None,
        render_mode: str | None = None,
        timeout: float = 60.0,
        make_timeout: float = 300.0,
    ) -> None:
        for given, known in ((reward, ("sparse", "dense")), (render_quality, ("fast", "full", "none"))):
            if given not in known:
                raise ValueError(f"{given!r} is not known to VLA/RoboHive-v0: choose one of {', '.join(known)}.")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r} is not supported: use 'rgb_array' or None.")
        if image_size < 1 or (horizon is not None and horizon < 1):
            raise ValueError(f"image_size={image_size} and horizon={horizon} must both be at least 1.")
        instructions, task_id = _instructions(env_id, instruction)
        python = python or os.environ.get("VLA_RL_ROBOHIVE_PYTHON")
        if python is None:
            raise FileNotFoundError(
                "VLA/RoboHive-v0 needs the Python of an environment with RoboHive: give python= or set "
                f"VLA_RL_ROBOHIVE_PYTHON; {_DOCTOR}."
            )
        try:
            super().__init__(
                env_id,
                python,
                kwargs={
                    "instructions": list(instructions),
                    "task_id": task_id,
                    "image_size": image_size,
                    "camera": camera,
                    "horizon": horizon,
                    "reward": reward,
                    "render_quality": render_quality,
                    "terminate_on_success": terminate_on_success,
                },
                make_fn=f"{_CHILD}:RoboHiveChild",
                render_mode=render_mode,
                timeout=timeout,
                make_timeout=make_timeout,
                environ=_surroundings(),
            )
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{str(error).partition('; install')[0]}; {_DOCTOR}.", name=error.name) from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{str(error).rstrip('.')}; {_DOCTOR}.") from error
        self.task_id, self.image_size, self.camera, self.horizon = task_id, image_size, camera, horizon

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step RoboHive's environment.

        Raises:
            ValueError: for an action of another shape, or with numbers that are not finite.
        """
        return super().step(checked_action(action, self.action_space))


def _surroundings() -> dict[str, str]:
    environ = {"GIT_PYTHON_REFRESH": "quiet"}  # RoboHive imports git, also where there is none
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        environ["MUJOCO_GL"] = "egl"  # MuJoCo's own choice needs a screen
    return environ


def _instructions(env_id: str, instruction: str | None) -> tuple[tuple[str, ...], int]:
    match = _KITCHEN_ID.fullmatch(env_id)
    if instruction is None and match and match[1] in KITCHEN_INSTRUCTIONS:
        return tuple(KITCHEN_INSTRUCTIONS.values()), list(KITCHEN_INSTRUCTIONS).index(match[1])
    if instruction is None:
        raise ValueError(
            f"VLA/RoboHive-v0 knows no sentence for {env_id!r}: give instruction=, or a kitchen id "
            f"FK1_<task>Random_v2d-v4 with one of the tasks {', '.join(KITCHEN_INSTRUCTIONS)}."
        )
    return (instruction,), 0
