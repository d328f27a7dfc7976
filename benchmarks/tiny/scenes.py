"""Varied pictures of the scenes, with the truth about them from MuJoCo's state and from the geom that a pixel shows."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import colours
import numpy as np
from cameras import View, project
from numpy.typing import NDArray
from parts import NOUNS
from variation import CameraStyle, choose_view, light, move_objects, paint, paint_textures, set_state, show_distractors
from worlds import ALL_TASKS, World, make_world, scene_of, target_of

Array = NDArray[np.float64]
Style = Literal["own", "varied"]

SMALLEST = 4
"""Pixels that a part must show to be spoken of."""

CELLS = 16
"""Cells per side of the map of what is where."""

LABELS: tuple[str, ...] = (*NOUNS, "arm", "gripper")
"""Names of what a cell may show; the number after the last stands for everything else."""

UNKNOWN_COLOUR = len(colours.NAMES)


@dataclass(frozen=True)
class Thing:
    """A part as it is in one picture.

    Attributes:
        name: the part's name; two things of a picture may share it.
        area: pixels that show it.
        point: column and row of a pixel that shows it, near its visible middle, as fractions of the side; None if
            nothing of it shows.
        centre: projection of its middle, hidden or not, possibly outside [0, 1].
        xyz: its middle in metres.
        depth: its distance along the line of sight in metres.
        colour: its colour's name; None where it has no clear one.
        fraction: how far its joint is from the first of its states (0) to the second (1); None if it has no joint.
        states: names of the two.
    """

    name: str
    area: int
    point: tuple[float, float] | None
    centre: tuple[float, float]
    xyz: tuple[float, float, float]
    depth: float
    colour: str | None
    fraction: float | None = None
    states: tuple[str, str] | None = None

    @property
    def visible(self) -> bool:
        """Whether enough of it shows."""
        return self.area >= SMALLEST

    @property
    def state(self) -> str | None:
        """Name of its state; None in between or without one."""
        if self.fraction is None or self.states is None or 0.25 < self.fraction < 0.6:
            return None
        return self.states[int(self.fraction > 0.5)]


@dataclass(frozen=True)
class Sample:
    """A picture and what is true of it.

    Attributes:
        image: uint8 [H, W, 3].
        cells: uint8 [2, CELLS, CELLS], read at the middle of each cell: index into ``LABELS``, and index into
            ``colours.NAMES`` where the thing's colour has a name, else ``UNKNOWN_COLOUR``.
        things: parts of the scene and distractors, with those that cannot be seen.
        gripper: the hand; its ``centre`` and ``xyz`` are the point between the finger tips, its fraction the opening.
        task: name of the task.
        scene: name of the scene.
        target: name of the part that the task is about.
        style: ``"own"`` colours and lights of the simulator, or ``"varied"``.
        camera: the environment's ``"own"``, ``"near"`` it, or ``"far"`` from it.
    """

    image: NDArray[np.uint8]
    cells: NDArray[np.uint8]
    things: tuple[Thing, ...]
    gripper: Thing
    task: str
    scene: str
    target: str
    style: Style
    camera: CameraStyle


class SceneSampler:
    """Draws samples; the same generator state gives the same samples, whatever was drawn before.

    Args:
        size: height and width of the pictures in pixels.
        exclude: scenes not to draw.
        only: scenes to draw alone; empty means all.
        cache: worlds kept at a time; each takes tens of megabytes.
    """

    def __init__(
        self, *, size: int = 64, exclude: tuple[str, ...] = (), only: tuple[str, ...] = (), cache: int = 40
    ) -> None:
        self.size, self.cache = size, cache
        self.tasks = tuple(t for t in ALL_TASKS if (not only or scene_of(t) in only) and scene_of(t) not in exclude)
        self._worlds: OrderedDict[str, World] = OrderedDict()

    def session(
        self,
        rng: np.random.Generator,
        count: int,
        *,
        task: str | None = None,
        style: Style | None = None,
        camera: CameraStyle | None = None,
    ) -> list[Sample]:
        """``count`` pictures of one task's scene: textures change per session, everything else per picture.

        Args:
            rng: source of all choices.
            count: how many.
            task: which task; None draws one, every fourth a kitchen task.
            style: fixes the look; None draws it for each picture.
            camera: fixes the kind of camera pose; None draws it for each picture.
        """
        if task is None:
            task = self._task(rng)
        world = self._world(task)
        repainted = style != "own" and rng.random() < 0.5
        paint_textures(world, self.size, rng, repainted)
        samples = []
        for _ in range(count):
            look: Style = style or ("own" if not repainted and rng.random() < 0.5 else "varied")
            pose: CameraStyle = camera or ("own", "near", "far")[int(rng.choice(3, p=(0.3, 0.35, 0.35)))]
            samples.append(draw(world, task, rng, size=self.size, style=look, camera=pose))
        return samples

    def _task(self, rng: np.random.Generator) -> str:
        kitchen = [task for task in self.tasks if scene_of(task) == "kitchen"]
        others = [task for task in self.tasks if scene_of(task) != "kitchen"]
        pool = kitchen if kitchen and (not others or rng.random() < 0.25) else others
        return pool[int(rng.integers(len(pool)))]

    def _world(self, task: str) -> World:
        key = scene_of(task)
        if key not in self._worlds:
            # One task for all of a scene, so that what a session draws depends on nothing drawn before.
            first = next(other for other in ALL_TASKS if scene_of(other) == key)
            self._worlds[key] = make_world(first)
            if len(self._worlds) > self.cache:
                self._worlds.popitem(last=False)[1].close()
        self._worlds.move_to_end(key)
        return self._worlds[key]


def draw(world: World, task: str, rng: np.random.Generator, *, size: int, style: Style, camera: CameraStyle) -> Sample:
    """One picture of ``world`` with its state, look and camera drawn from ``rng``."""
    world.restore()
    fractions = set_state(world, rng)
    world.kinematics()
    move_objects(world, rng, gentle=style == "own")
    named = paint(world, rng) if style == "varied" else [None] * len(world.parts)
    distractors = show_distractors(world, rng) if rng.random() < (0.5 if style == "varied" else 0.15) else []
    if style == "varied":
        light(world, rng)
    view = choose_view(world, rng, camera)
    world.place_camera(view)
    renderer, mujoco_camera = world.renderer(size), world.mujoco_camera()
    image = renderer.render(world.model, world.data, mujoco_camera)
    shown = renderer.segment(world.model, world.data, mujoco_camera)
    groups = [*world.part_geoms, *(np.array([geom]) for _, _, geom in distractors), world.robot, world.gripper]
    owner = np.full(world.model.ngeom + 1, -1)
    for index, geoms in enumerate(groups):
        owner[geoms] = index
    # The last entry is for pixels that show no geom: index -1.
    owners = owner[shown]
    things = []
    for index, part in enumerate(world.parts):
        geoms, fraction = world.part_geoms[index], fractions[index]
        colour = named[index] or _own_colour(world, geoms)
        states = part.states if part.moves else None
        things.append(_thing(world, part.name, geoms, view, image, owners == index, colour, fraction, states))
    for index, (noun, colour, geom) in enumerate(distractors, start=len(things)):
        things.append(_thing(world, noun, np.array([geom]), view, image, owners == index, colour))
    gripper = _gripper(world, view, image, owners == len(groups) - 1, fractions[-1])
    cells = _cells(owners, things)
    return Sample(image, cells, tuple(things), gripper, task, world.name, target_of(task), style, camera)


def _cells(owners: NDArray[np.int64], things: list[Thing]) -> NDArray[np.uint8]:
    """What is where, coarsely: ``owners`` [H, W] counts the things, then arm and gripper; -1 is everything else."""
    names = [*(thing.name for thing in things), "arm", "gripper"]
    labels = np.array([*(LABELS.index(name) for name in names), len(LABELS)])
    named = [UNKNOWN_COLOUR if thing.colour is None else colours.NAMES.index(thing.colour) for thing in things]
    shades = np.array([*named, *[UNKNOWN_COLOUR] * 3])
    places = ((np.arange(CELLS) + 0.5) * len(owners) / CELLS).astype(int)
    # The last entry of both is for the index -1.
    at = owners[np.ix_(places, places)]
    return np.stack([labels[at], shades[at]]).astype(np.uint8)


def _own_colour(world: World, geoms: NDArray[np.int64]) -> str | None:
    """Name of a part's colour in the simulator; None for textures and for mixtures."""
    model = world.model
    geom = geoms[np.argmax(model.geom_rbound[geoms])]
    material = int(model.geom_matid[geom])
    if material >= 0 and (model.mat_texid[material] >= 0).any():
        return None
    return colours.name_of(model.mat_rgba[material, :3] if material >= 0 else model.geom_rgba[geom, :3])


def _thing(
    world: World,
    name: str,
    geoms: NDArray[np.int64],
    view: View,
    image: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    colour: str | None,
    fraction: float | None = None,
    states: tuple[str, str] | None = None,
) -> Thing:
    area = int(mask.sum())
    xyz = _middle(world, geoms)
    centre, depth = project(xyz[None], view)
    point = None
    if area:
        point = _inner_pixel(mask)
        seen = image[mask].mean(axis=0) / 255
        if colour is not None and (area < 2 * SMALLEST or not colours.looks_like(colour, seen)):
            colour = None
    return Thing(
        name=name,
        area=area,
        point=point,
        centre=(float(centre[0, 0]), float(centre[0, 1])),
        xyz=(float(xyz[0]), float(xyz[1]), float(xyz[2])),
        depth=float(depth[0]),
        colour=colour if area else None,
        fraction=fraction,
        states=states,
    )


def _gripper(
    world: World, view: View, image: NDArray[np.uint8], mask: NDArray[np.bool_], opening: float | None
) -> Thing:
    thing = _thing(world, "gripper", world.gripper, view, image, mask, None, opening, ("closed", "open"))
    tip = world.tip()
    centre, depth = project(tip[None], view)
    inside = bool((centre >= 0).all() and (centre < 1).all() and depth[0] > 0)
    column, row = (float(value) for value in centre[0])
    values = {"centre": (column, row), "xyz": tuple(float(x) for x in tip), "depth": float(depth[0])}
    values["point"] = (column, row) if inside and thing.point is not None else None
    return Thing(**{**thing.__dict__, **values})


def _middle(world: World, geoms: NDArray[np.int64]) -> Array:
    """Middle of the box around drawn geoms in metres, float64 [3]."""
    axes = world.data.geom_xmat[geoms].reshape(-1, 3, 3)
    boxes = world.model.geom_aabb[geoms]
    centres = world.data.geom_xpos[geoms] + np.einsum("nij,nj->ni", axes, boxes[:, :3])
    halves = np.einsum("nij,nj->ni", np.abs(axes), boxes[:, 3:])
    return ((centres - halves).min(axis=0) + (centres + halves).max(axis=0)) / 2


def _inner_pixel(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Column and row, as fractions, of the pixel of ``mask`` [H, W] that is nearest to the mean of all its pixels."""
    rows, columns = np.nonzero(mask)
    distance = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    best = int(distance.argmin())
    height, width = mask.shape
    return (float(columns[best] + 0.5) / width, float(rows[best] + 0.5) / height)
