"""Cartesian control of the kitchen's Franka arm by damped least squares, as absolute joint targets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla_rl_envs.rendering import import_mujoco

mujoco = import_mujoco()

Array = NDArray[np.float64]

FORWARD: Array = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
"""Rotation of a hand that points along +y, away from the robot, with the fingers side by side along x.

The columns are the axes of the site ``end_effector``: up, from finger to finger, and where the hand points.
"""

OPEN, CLOSED = 1.0, -1.0

_DAMPING = 0.02
_REST_GAIN = 0.05
_RADIANS_PER_ACTION = 0.16
_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, 0.0, -2.8973])
_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.4, 2.8973, 2.1127, 2.8973])


def rotation_about(axis: str, angle: float) -> Array:
    """Rotation matrix [3, 3] by ``angle`` radians about the world's ``"x"``, ``"y"`` or ``"z"``."""
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[second, first], matrix[first, second] = np.sin(angle), -np.sin(angle)
    return matrix


def rotation_vector(rotation: Array) -> Array:
    """Axis times angle [3], in radians, of a rotation matrix [3, 3] whose angle is below pi."""
    axis = 0.5 * np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    sine = float(np.linalg.norm(axis))
    angle = float(np.arctan2(sine, 0.5 * (np.trace(rotation) - 1.0)))
    return axis if sine < 1e-9 else axis * (angle / sine)


def rotation_matrix(vector: Array) -> Array:
    """Inverse of ``rotation_vector`` (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * (cross @ cross)


def limited(vector: Array, longest: float) -> Array:
    """``vector``, shortened to the length ``longest`` if it is longer."""
    length = float(np.linalg.norm(vector))
    return vector if length <= longest else vector * (longest / length)


def bounded_least_squares(jacobian: Array, error: Array, low: Array, high: Array, *, damping: float) -> Array:
    """Damped least squares step that respects bounds: joints at a bound are fixed there and the rest solved again.

    Clipping an unbounded solution instead would leave the other joints unaware, and the hand stalls at a limit.

    Args:
        jacobian: [K, N].
        error: wanted change [K].
        low: smallest step of each joint [N].
        high: largest step of each joint [N].
        damping: lambda in ``min |J d - e|^2 + lambda^2 |d|^2``.

    Returns:
        The step ``d`` [N].
    """
    step = np.zeros(jacobian.shape[1])
    free = np.ones(jacobian.shape[1], dtype=bool)
    while free.any():
        part = jacobian[:, free]
        rest = error - jacobian[:, ~free] @ step[~free]
        step[free] = part.T @ np.linalg.solve(part @ part.T + damping**2 * np.eye(len(error)), rest)
        beyond = free & ((step < low - 1e-12) | (step > high + 1e-12))
        if not beyond.any():
            break
        step = np.where(beyond, np.clip(step, low, high), step)
        free &= ~beyond
    return step


class ArmController:
    """Turns "hand there, fingers so" into actions of ``VLA/FrankaKitchen-v0``, one per step.

    It keeps a Cartesian set point, which runs ahead of the hand by a bounded distance, and the joint angles that reach
    it. Actions are computed from these absolute angles, with the torque that gravity needs, so neither noise nor sag
    adds up.

    Args:
        env: an unwrapped ``FrankaKitchenEnv``.
        rest: joint angles [7] that the redundant arm prefers; None: those at the start.
    """

    def __init__(self, env: Any, *, rest: Array | None = None) -> None:
        self._env = env
        self._model, self._data = env.model, env.data
        self._scratch = mujoco.MjData(self._model)
        self._scratch.qpos[:] = self._data.qpos
        self._site = self._model.site("end_effector").id
        self._stiffness = self._model.actuator_gainprm[:7, 0].copy()
        self._angles = np.clip(self._data.qpos[:7], _LOW, _HIGH)
        self.rest = self._angles.copy() if rest is None else rest
        self._goal_position, self._goal_rotation = self.position, self.rotation

    @property
    def position(self) -> Array:
        """Where the hand's site is, [3] in metres; the closed fingertips are about 5 cm further."""
        return self._data.site_xpos[self._site].copy()

    @property
    def rotation(self) -> Array:
        """Rotation matrix [3, 3] of the hand."""
        return self._data.site_xmat[self._site].reshape(3, 3).copy()

    def toward(
        self,
        position: Array,
        rotation: Array,
        *,
        fingers: float,
        speed: float = 0.03,
        lead: float = 0.08,
        rotation_weight: float = 0.3,
    ) -> NDArray[np.float32]:
        """The next action on the way to a pose.

        Args:
            position: where the hand's site should go, [3] in metres.
            rotation: which way it should turn, [3, 3].
            fingers: ``OPEN`` or ``CLOSED``.
            speed: how far the set point moves, in metres per step.
            lead: how far it may be ahead of the hand, in metres; with contact this is the force.
            rotation_weight: metres of position that a radian of rotation is worth where the arm cannot have both.

        Returns:
            float32 [9] in [-1, 1].
        """
        goal = self._goal_position + limited(position - self._goal_position, speed)
        self._goal_position = self.position + limited(goal - self.position, lead)
        turn = limited(rotation_vector(rotation @ self._goal_rotation.T), 0.12)
        ahead = rotation_vector(rotation_matrix(turn) @ self._goal_rotation @ self.rotation.T)
        self._goal_rotation = rotation_matrix(limited(ahead, 0.4)) @ self.rotation
        for _ in range(3):
            self._angles += self._ik_step(rotation_weight)
        return self._action(fingers)

    def toward_joints(self, angles: Array, *, fingers: float, speed: float = 0.12) -> NDArray[np.float32]:
        """The next action on the way to joint ``angles`` [7], by up to ``speed`` radians per step and joint."""
        self._angles = self._angles + np.clip(angles - self._angles, -speed, speed)
        self._goal_position, self._goal_rotation = self.position, self.rotation
        return self._action(fingers)

    def _ik_step(self, rotation_weight: float) -> Array:
        self._scratch.qpos[:7] = self._angles
        mujoco.mj_kinematics(self._model, self._scratch)
        mujoco.mj_comPos(self._model, self._scratch)
        jacobian = np.zeros((6, self._model.nv))
        mujoco.mj_jacSite(self._model, self._scratch, jacobian[:3], jacobian[3:], self._site)
        rotation = self._scratch.site_xmat[self._site].reshape(3, 3)
        error = np.concatenate(
            [
                self._goal_position - self._scratch.site_xpos[self._site],
                rotation_weight * rotation_vector(self._goal_rotation @ rotation.T),
            ]
        )
        weighted = jacobian[:, :7].copy()
        weighted[3:] *= rotation_weight
        low, high = np.maximum(_LOW - self._angles, -0.1), np.minimum(_HIGH - self._angles, 0.1)
        step = bounded_least_squares(weighted, error, low, high, damping=_DAMPING)
        pull = _REST_GAIN * (self.rest - self._angles)
        pull -= np.linalg.pinv(weighted, rcond=1e-2) @ (weighted @ pull)
        return np.clip(step + pull, low, high)

    def _action(self, fingers: float) -> NDArray[np.float32]:
        wanted = self._angles + self._data.qfrc_bias[:7] / self._stiffness
        arm = (wanted - self._env.simulator.observed_joints()[:7]) / _RADIANS_PER_ACTION
        return np.clip(np.append(arm, [fingers, fingers]), -1.0, 1.0).astype(np.float32)
