"""``VLA/Toy-v0``: a tiny image + state + language environment in plain numpy, for fast tests and first steps."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from vla_rl_envs.actions import checked_action

TOY_TASKS: dict[str, str] = {
    "reach-red": "reach the red square",
    "reach-blue": "reach the blue square",
    "reach-green": "reach the green square",
}
_COLOURS: dict[str, dict[str, tuple[int, int, int]]] = {
    "original": {"red": (220, 40, 40), "blue": (50, 70, 220), "green": (40, 180, 60)},
    "new": {"red": (240, 130, 90), "blue": (110, 170, 250), "green": (140, 220, 90)},
}
_REACH = {"original": 0.6, "new": 0.9}


class ToyEnv(gym.Env[dict[str, Any], NDArray[np.float32]]):
    """A white dot on a dark square field moves to the coloured square that the sentence names.

    Three squares (red, blue, green) lie at random places, so the picture alone does not say where to go.

    ## Observation
    ``image`` uint8 [image_size, image_size, 3]; ``state`` float32 [2]: the dot's x and y in [-1, 1];
    ``task_id`` int64, the index into ``instructions``.

    ## Action
    float32 [2] in [-1, 1]: displacement x, y in units of ``step_size`` (0.2).

    ## Reward
    ``"sparse"``: 1 at success, else 0. ``"dense"``: minus the distance to the square.

    ## Episode end
    Terminated when the dot is within 0.15 of the named square, truncated after ``horizon`` steps.

    Args:
        task: ``"reach-red"``, ``"reach-blue"`` or ``"reach-green"``.
        variant: ``"original"``, or ``"new"`` with other shades and a wider field.
        image_size: height and width of the image in pixels.
        horizon: most steps in an episode.
        reward: ``"sparse"`` or ``"dense"``.
        render_mode: ``"rgb_array"`` or None.

    Raises:
        ValueError: for an unknown task, variant or reward.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}
    step_size = 0.2
    radius = 0.15

    def __init__(
        self,
        task: str = "reach-red",
        variant: str = "original",
        *,
        image_size: int = 32,
        horizon: int = 20,
        reward: Literal["sparse", "dense"] = "sparse",
        render_mode: str | None = None,
    ) -> None:
        for given, known in ((task, tuple(TOY_TASKS)), (variant, tuple(_COLOURS)), (reward, ("sparse", "dense"))):
            if given not in known:
                raise ValueError(f"{given!r} is not known to VLA/Toy-v0: choose one of {', '.join(known)}.")
        self.task, self.variant, self.reward, self.render_mode = task, variant, reward, render_mode
        self.image_size, self.horizon = image_size, horizon
        self.instructions = tuple(TOY_TASKS.values())
        self.task_id = tuple(TOY_TASKS).index(task)
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "state": spaces.Box(-1.0, 1.0, (2,), np.float32),
                "task_id": spaces.Discrete(len(TOY_TASKS)),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.position = np.zeros(2)
        self._squares = np.zeros((len(TOY_TASKS), 2))
        self._steps = 0

    @property
    def target(self) -> NDArray[np.float64]:
        """Place of the named square, float64 [2]."""
        return self._squares[self.task_id]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Place the dot and the squares, at least 0.4 apart from each other.

        ``options={"closeness": c}``, c in [0, 1], moves the dot by that part of the way to the edge of its square, and
        the info says so.

        Raises:
            ValueError: for a closeness outside [0, 1].
        """
        super().reset(seed=seed, options=options)
        closeness = float((options or {}).get("closeness", 0.0))
        if not 0 <= closeness <= 1:
            raise ValueError(f"reset got closeness={closeness}; give 0 (the usual start) to 1 (nearly solved).")
        reach = _REACH[self.variant]
        points: list[NDArray[np.float64]] = []
        while len(points) <= len(TOY_TASKS):
            point = self.np_random.uniform(-reach, reach, 2)
            if all(np.linalg.norm(point - other) > 0.4 for other in points):
                points.append(point)
        self.position, self._squares = points[0], np.array(points[1:])
        gap = self.target - self.position
        way = np.linalg.norm(gap) - 1.5 * self.radius
        self.position = self.position + gap / np.linalg.norm(gap) * way * closeness
        self._steps = 0
        info = {"success": False, "instruction": self.instructions[self.task_id]}
        return self._observe(), info | ({"closeness": closeness} if "closeness" in (options or {}) else {})

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move the dot by ``action * step_size``; it stays inside the field.

        Raises:
            ValueError: for an action of another shape, or with numbers that are not finite.
        """
        move = self.step_size * np.clip(checked_action(action, self.action_space).astype(np.float64), -1.0, 1.0)
        self.position = np.clip(self.position + move, -1.0, 1.0)
        self._steps += 1
        distance = float(np.linalg.norm(self.position - self.target))
        success = distance < self.radius
        reward = float(success) if self.reward == "sparse" else -distance
        return self._observe(), reward, success, self._steps >= self.horizon, {"success": success}

    def render(self) -> NDArray[np.uint8]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The current picture, uint8 [image_size, image_size, 3]; x to the right, y upwards."""
        image = np.full((self.image_size, self.image_size, 3), 30, dtype=np.uint8)
        colours = _COLOURS[self.variant]
        for task, square in zip(TOY_TASKS, self._squares, strict=True):
            self._paint(image, square, 0.15, colours[task.removeprefix("reach-")])
        self._paint(image, self.position, 0.06, (255, 255, 255))
        return image

    def _paint(self, image: NDArray[np.uint8], centre: NDArray[np.float64], half: float, colour: Any) -> None:
        scale = (self.image_size - 1) / 2.2
        column, row = (centre[0] + 1.1) * scale, (1.1 - centre[1]) * scale
        top, bottom = round(row - half * scale), round(row + half * scale)
        left, right = round(column - half * scale), round(column + half * scale)
        image[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = colour

    def _observe(self) -> dict[str, Any]:
        state = self.position.astype(np.float32)
        return {"image": self.render(), "state": state, "task_id": np.int64(self.task_id)}
