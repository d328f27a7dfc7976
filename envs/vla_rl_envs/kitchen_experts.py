"""Scripted experts of Franka Kitchen: way points at the handles, one generator of actions per task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_rl_envs.kitchen_control import CLOSED, FORWARD, OPEN, ArmController, rotation_about
from vla_rl_envs.kitchen_tasks import TASK_TABLE, JointTask

Action = NDArray[np.float32]
Array = NDArray[np.float64]
Script = Iterator[Action]

_FINGERTIP = 0.05
"""How far the fingertips are in front of the hand's site, in metres."""


class _Kitchen:
    """What a script sees of an episode: the arm, the handles and the joint of its task."""

    def __init__(self, env: Any) -> None:
        self.arm = ArmController(env)
        self._data = env.data
        self._rule = TASK_TABLE[env.task]

    @property
    def joint(self) -> float:
        """Value of the task's joint in radians or metres."""
        assert isinstance(self._rule, JointTask)
        return float(self._data.qpos[self._rule.index])

    @property
    def grip(self) -> float:
        """Distance between the fingertips in metres."""
        return float(self._data.qpos[7:9].sum())

    def site(self, name: str) -> Array:
        """Where a handle is now, [3] in metres."""
        return self._data.site(name).xpos.copy()

    def body(self, name: str) -> Array:
        """Where a body's origin (a door's hinge) is now, [3] in metres."""
        return self._data.body(name).xpos.copy()

    def go(
        self,
        position: Array,
        rotation: Array,
        *,
        fingers: float = CLOSED,
        tolerance: float = 0.02,
        patience: int = 40,
        speed: float = 0.03,
        lead: float = 0.08,
        rotation_weight: float = 0.3,
    ) -> Script:
        """Move until the hand is within ``tolerance`` metres of ``position``, or for ``patience`` steps."""
        for _ in range(patience):
            if np.linalg.norm(position - self.arm.position) < tolerance:
                return
            yield self.arm.toward(
                position, rotation, fingers=fingers, speed=speed, lead=lead, rotation_weight=rotation_weight
            )


def _slide_door(kitchen: _Kitchen) -> Script:
    """Put the closed fingers left of the handle, under its middle, and push right."""
    site = "slide_site"
    yield from kitchen.go(kitchen.site(site) + (-0.10, -0.16, -0.06), FORWARD)
    yield from kitchen.go(kitchen.site(site) + (-0.085, 0.01, -0.06), FORWARD)
    while True:
        yield kitchen.arm.toward(kitchen.site(site) + (0.03, 0.02, -0.06), FORWARD, fingers=CLOSED)


def _light(kitchen: _Kitchen) -> Script:
    """Put the closed fingers right of the switch and push left, again if it slips off."""
    site = kitchen.site("light_site")
    while True:
        yield from kitchen.go(site + (0.12, -0.14, 0.0), FORWARD)
        yield from kitchen.go(site + (0.085, 0.0, 0.0), FORWARD, patience=12)
        yield from kitchen.go(site + (-0.14, 0.01, 0.0), FORWARD, patience=20)


def _knob(kitchen: _Kitchen, number: int) -> Script:
    """Push the upper end of the knob right along its arc, again if it slips off.

    Turning it between the fingers instead runs into the limit of the sixth joint.
    """
    site = kitchen.site(f"knob{number}_site")
    rotation = rotation_about("y", 0.4) @ rotation_about("z", -0.6) @ rotation_about("x", -0.3) @ FORWARD
    # The fingertips end just in front of the knob's disc, beside its grip.
    reach = -_FINGERTIP * rotation[:, 2] + (0.0, -0.003, 0.0)

    def on_arc(angle: float, radius: float) -> Array:
        return site + reach + radius * np.array([np.sin(angle), 0.0, np.cos(angle)])

    start = on_arc(-0.9, 0.06)
    while True:
        yield from kitchen.go(start - 0.08 * rotation[:, 2], rotation)
        yield from kitchen.go(start, rotation, tolerance=0.012)
        for _ in range(30):
            yield kitchen.arm.toward(on_arc(0.8 - kitchen.joint, 0.045), rotation, fingers=CLOSED, speed=0.02)


def _about_hinge(hinge: Array, point: Array, angle: float) -> Array:
    return hinge + rotation_about("z", angle) @ (point - hinge)


def _microwave(kitchen: _Kitchen) -> Script:
    """Grasp the handle above its middle and pull it along its arc."""
    tilt = rotation_about("x", -0.3) @ FORWARD
    up = np.array([0.0, 0.0, 0.05])
    while True:
        handle = kitchen.site("microhandle_site") + up
        rotation = rotation_about("z", 0.3) @ tilt
        grasp = -0.02 * rotation[:, 2]
        yield from kitchen.go(handle - 0.15 * rotation[:, 2], rotation, fingers=OPEN)
        yield from kitchen.go(handle + grasp, rotation, fingers=OPEN, tolerance=0.015)
        for _ in range(8):
            yield kitchen.arm.toward(handle + grasp, rotation, fingers=CLOSED)
        while True:
            q = kitchen.joint
            rotation = rotation_about("z", 0.3 - 0.6 * q) @ tilt
            ahead = _about_hinge(kitchen.body("microdoorroot"), kitchen.site("microhandle_site") + up, -0.15)
            if np.linalg.norm(kitchen.arm.position - kitchen.site("microhandle_site") - up) > 0.12:
                break
            yield kitchen.arm.toward(ahead - 0.02 * rotation[:, 2], rotation, fingers=CLOSED)


def _left_door(kitchen: _Kitchen) -> Script:
    """Grasp the lower end of the handle, pull the door ajar, then push it open from behind its edge.

    The door's edge swings to the end of the arm's reach: hence a posture of its own, a hand that may turn
    rather than fall short, and at the end open fingers and a turning wrist for the last centimetres.
    """
    arm, hinge = kitchen.arm, kitchen.body("hingeleftdoor")
    arm.rest = np.array([-1.35, -1.43, 1.23, -1.5, 0.1, 1.85, 1.45])
    for _ in range(14):
        yield arm.toward_joints(arm.rest, fingers=OPEN)
    while True:
        while kitchen.joint > -0.15:
            yield from _pull_ajar(kitchen, hinge)
        edge = hinge + rotation_about("z", kitchen.joint) @ (0.377, 0.0, -0.15)
        rotation = rotation_about("z", 0.5) @ rotation_about("x", 0.3) @ FORWARD
        tip = _FINGERTIP * rotation[:, 2]
        yield from kitchen.go(edge + (0.06, -0.08, 0.0) - tip, rotation)
        yield from kitchen.go(edge + (0.03, 0.05, 0.0) - tip, rotation, patience=20)
        for step in range(60):
            angle = kitchen.joint
            turn = 0.5 * np.sin(step * 2 * np.pi / 24) if angle < -1.0 else 0.0
            yaw = 0.5 + max(0.0, -angle - 0.5) + turn
            rotation = rotation_about("z", yaw) @ rotation_about("x", 0.3) @ FORWARD
            behind = hinge + rotation_about("z", angle - 0.2) @ (0.36, 0.03, -0.17)
            fingers = OPEN if angle < -0.9 else CLOSED
            goal = behind - _FINGERTIP * rotation[:, 2]
            yield arm.toward(goal, rotation, fingers=fingers, rotation_weight=0.02)


def _pull_ajar(kitchen: _Kitchen, hinge: Array) -> Script:
    """One attempt to pull the left door's handle along its arc, to a third of a radian."""
    arm = kitchen.arm
    rotation = rotation_about("z", 0.7) @ rotation_about("x", 0.4) @ FORWARD
    approach = rotation[:, 2]
    inside = -0.03 * approach + (0.0, 0.0, -0.142)
    grasp = kitchen.site("hinge_site1") + inside
    # From the left, as the other door's handle is on the right; slowly, or the hand swings out on the way.
    yield from kitchen.go(grasp - 0.1 * approach - (0.03, 0.0, 0.0), rotation, fingers=OPEN, tolerance=0.015)
    yield from kitchen.go(
        grasp, rotation, fingers=OPEN, tolerance=0.015, patience=25, speed=0.02, lead=0.05, rotation_weight=0.1
    )
    for _ in range(6):
        yield arm.toward(grasp, rotation, fingers=CLOSED, rotation_weight=0.1)
    for _ in range(40):
        if kitchen.joint < -0.33 or kitchen.grip < 0.015:
            break
        ahead = _about_hinge(hinge, kitchen.site("hinge_site1"), -0.2) + inside
        yield arm.toward(ahead, rotation, fingers=CLOSED, rotation_weight=0.1)
    here = arm.position
    for _ in range(3):
        yield arm.toward(here, rotation, fingers=OPEN)
    yield from kitchen.go(here - 0.12 * approach, rotation, fingers=OPEN)


_SCRIPTS: dict[str, Callable[[_Kitchen], Script]] = {
    "slide-door-open": _slide_door,
    "light-on": _light,
    "microwave-open": _microwave,
    "knob-on": lambda kitchen: _knob(kitchen, 1),
    "left-door-open": _left_door,
    "bottom-burner": lambda kitchen: _knob(kitchen, 2),
    "knob-3-on": lambda kitchen: _knob(kitchen, 3),
    "top-burner": lambda kitchen: _knob(kitchen, 4),
}

SCRIPTED_TASKS: tuple[str, ...] = tuple(_SCRIPTS)
"""Tasks that have an expert."""


_LONGEST_PAUSE = 4
"""Steps between two calls after which the script starts anew; a wrapper that repeats actions stays below."""


class KitchenExpert:
    """Scripted expert for one task of ``VLA/FrankaKitchen-v0``: ``expert(env) -> action``.

    It goes through way points and therefore keeps a place in its script. The script starts anew with every episode,
    with another environment, and where another policy has taken some steps. Call it before every step.

    Args:
        task: a task name.

    Raises:
        TypeError: if there is no script for ``task``.
    """

    def __init__(self, task: str) -> None:
        if task not in _SCRIPTS:
            raise TypeError(f"no scripted expert for {task!r}: there is one for {', '.join(_SCRIPTS)}.")
        self._script_of = _SCRIPTS[task]
        self._script: Script = iter(())
        self._episode: tuple[Any, int] = (None, 0)
        self._last = 0

    def __call__(self, env: Any) -> Action:
        """The action of this step, float32 [9] in [-1, 1]."""
        inner = env.unwrapped
        episode, pause = (inner, inner.resets), inner.steps - self._last
        if episode != self._episode or inner.steps == 0 or not 0 <= pause <= _LONGEST_PAUSE:
            self._episode, self._script = episode, self._script_of(_Kitchen(inner))
        self._last = inner.steps
        return next(self._script)
