"""The Franka Kitchen task table: instructions, success rules, looks of variants, the experiments' task lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vla_rl_envs.tasks import Rgba


@dataclass(frozen=True)
class JointTask:
    """A joint of the kitchen that has to be moved past a threshold.

    Attributes:
        instruction: the sentence.
        joint: MuJoCo's name of the joint.
        index: its address in ``data.qpos``.
        threshold: the task is solved when the joint is beyond this value, in radians (metres for the slide door);
            the sign tells the direction, as every joint starts at 0.
        end: the joint's limit on that side.
        source: where the rule comes from.
    """

    instruction: str
    joint: str
    index: int
    threshold: float
    end: float
    source: str

    def solved(self, qpos: NDArray[np.float64], shift: NDArray[np.float64]) -> bool:
        """Whether ``qpos`` [30] fulfils the task; ``shift`` is not needed."""
        return bool(np.sign(self.threshold) * qpos[self.index] > abs(self.threshold))


@dataclass(frozen=True)
class KettleTask:
    """The kettle has to stand at another place, upright.

    Attributes:
        instruction: the sentence.
        index: first of its seven addresses (position, quaternion) in ``data.qpos``.
        goal: where it has to stand (x, y, z) in metres while the kitchen is at its own place.
        radius: how far off it may be in metres.
        source: where the rule comes from.
    """

    instruction: str
    index: int
    goal: tuple[float, float, float]
    radius: float
    source: str

    def solved(self, qpos: NDArray[np.float64], shift: NDArray[np.float64]) -> bool:
        """Whether ``qpos`` [30] fulfils the task in a kitchen moved by ``shift`` [3] metres."""
        _, x, y, _ = qpos[self.index + 3 : self.index + 7]
        upright = 1.0 - 2.0 * (x * x + y * y) > 0.95
        distance = np.linalg.norm(qpos[self.index : self.index + 3] - (np.array(self.goal) + shift))
        return bool(upright and distance < self.radius)


_STRICT = "FrankaKitchen-v1's goal for {name!r} is {goal}; it counts anything nearer than .3, here the goal is reached"

TASK_TABLE: dict[str, JointTask | KettleTask] = {
    "knob-on": JointTask(
        "turn the lower right knob", "knob_Joint_1", 9, -0.88, -1.57, "own: knob 1, as 'bottom burner' is for knob 2"
    ),
    "light-on": JointTask(
        "switch on the light",
        "light_switch",
        17,
        -0.6,
        -0.7,
        "FrankaKitchen-v1's goal for 'light switch' is -0.69 of a range of -0.7, nearer than .3; here -0.6",
    ),
    "microwave-open": JointTask(
        "open the microwave", "microwave", 22, -0.75, -2.094, _STRICT.format(name="microwave", goal=-0.75)
    ),
    "slide-door-open": JointTask(
        "slide the cabinet door open", "slide_cabinet", 19, 0.37, 0.44, _STRICT.format(name="slide cabinet", goal=0.37)
    ),
    "left-door-open": JointTask(
        "open the left cabinet door",
        "left_hinge_cabinet",
        20,
        -1.25,
        -1.57,
        "own: the mirror image of 'hinge-cabinet'; RoboHive's goal for this door is -1.25 too",
    ),
    "bottom-burner": JointTask(
        "turn the lower left knob", "knob_Joint_2", 11, -0.88, -1.57, _STRICT.format(name="bottom burner", goal=-0.88)
    ),
    "knob-3-on": JointTask("turn the upper right knob", "knob_Joint_3", 13, -0.88, -1.57, "own: as knob 2"),
    "top-burner": JointTask(
        "turn the upper left knob", "knob_Joint_4", 15, -0.92, -1.57, _STRICT.format(name="top burner", goal=-0.92)
    ),
    "hinge-cabinet": JointTask(
        "open the right cabinet door",
        "right_hinge_cabinet",
        21,
        1.25,
        1.57,
        "FrankaKitchen-v1's goal for 'hinge cabinet' is 1.45, nearer than .3; here 1.25",
    ),
    "kettle": KettleTask(
        "move the kettle to the back burner",
        23,
        (-0.23, 0.75, 1.62),
        0.1,
        "FrankaKitchen-v1's position for 'kettle', nearer than .3 counting its quaternion; here .1 and upright",
    ),
}
"""Task name -> rule. The first five are the paper's; names of the rest follow FrankaKitchen-v1's elements."""

TASKS: tuple[str, ...] = tuple(TASK_TABLE)
INSTRUCTIONS: tuple[str, ...] = tuple(task.instruction for task in TASK_TABLE.values())
"""Sentence of ``TASKS[task_id]`` at index ``task_id``."""

VARIANTS: dict[str, dict[str, dict[str, Rgba]]] = {
    "slide-door-open": {
        "red": {"M_slide_blue": (0.65, 0.12, 0.12, 1.0)},
        "yellow": {"M_slide_blue": (0.8, 0.68, 0.15, 1.0)},
    }
}
"""Task -> variant -> material -> RGBA in [0, 1]. The slide door has one material for the door and its cabinet."""

EXPERT_TASKS: tuple[str, ...] = ("knob-on", "light-on", "microwave-open", "slide-door-open", "left-door-open")
"""The paper's five tasks with demonstrations."""

RL_TASKS: tuple[tuple[str, str], ...] = (("slide-door-open", "red"),)
"""(task, variant) pairs of stage 1: the paper's slide-door-red."""

UNSEEN_TASKS: tuple[tuple[str, str], ...] = (("slide-door-open", "yellow"),)
"""(task, variant) pairs that are only evaluated: the paper's slide-door-yellow."""
