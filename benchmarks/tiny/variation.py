"""What differs from picture to picture: joints, places, colours, textures, lights and the camera."""

from __future__ import annotations

from typing import Literal

import colours
import mujoco
import numpy as np
from cameras import View, look_at, orbit
from numpy.typing import NDArray
from worlds import World

Array = NDArray[np.float64]
CameraStyle = Literal["own", "near", "far"]

_SHAPES = {"cube": mujoco.mjtGeom.mjGEOM_BOX, "ball": mujoco.mjtGeom.mjGEOM_SPHERE}
_SHAPES |= {"cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER}


def choose_view(world: World, rng: np.random.Generator, camera: CameraStyle) -> View:
    """The environment's camera, one near it, or one anywhere around the working area."""
    own = world.view
    middle = (np.array(world.area[0]) + world.area[1]) / 2 + (0.0, 0.0, 0.12)
    kitchen = world.name == "kitchen"
    if camera == "own":
        return own
    if camera == "near":
        turn = _rotation(rng.normal(0.0, 0.06, 3))
        return View(own.eye + rng.normal(0.0, 0.07, 3), turn @ own.axes, own.fovy * rng.uniform(0.9, 1.1))
    target = middle + rng.uniform(-0.15, 0.15, 3) + ((0.0, 0.0, 0.35) if kitchen else (0.0, 0.0, 0.0))
    azimuth = rng.uniform(40.0, 140.0) if kitchen else rng.uniform(0.0, 360.0)
    elevation = -rng.uniform(5.0, 40.0) if kitchen else -rng.uniform(15.0, 70.0)
    distance = rng.uniform(1.2, 2.2) if kitchen else rng.uniform(0.75, 1.6)
    free = orbit(target, distance=distance, azimuth=azimuth, elevation=elevation)
    return look_at(free.eye, target, roll=rng.normal(0.0, 0.1), fovy=rng.uniform(40.0, 62.0))


def set_state(world: World, rng: np.random.Generator) -> list[float | None]:
    """Draw all joints; returns the fraction of each part and, last, of the gripper's opening."""
    data = world.data
    data.qpos[:] = world.qpos
    pose = world.poses[rng.integers(len(world.poses))]
    data.qpos[world.arm] = pose + rng.normal(0.0, 0.04, len(pose))
    opening = _bimodal(rng)
    closed, opened = world.finger_ends
    data.qpos[world.fingers] = closed + opening * (opened - closed)
    fractions: list[float | None] = []
    by_body: dict[str, float] = {}
    for part in world.parts:
        if part.moves is None:
            fractions.append(None)
            continue
        if part.moves not in by_body:
            by_body[part.moves] = fraction = _bimodal(rng)
            joint = int(world.model.body_jntadr[world.model.body(part.moves).id])
            data.qpos[world.model.jnt_qposadr[joint]] = part.ends[0] + fraction * (part.ends[1] - part.ends[0])
        fractions.append(by_body[part.moves])
    return [*fractions, opening]


def _bimodal(rng: np.random.Generator) -> float:
    kind = rng.random()
    return float(rng.uniform(0.0, 0.1) if kind < 0.38 else rng.uniform(0.85, 1.0) if kind < 0.76 else rng.random())


def move_objects(world: World, rng: np.random.Generator, *, gentle: bool) -> None:
    """Shift, turn and scale objects where they are drawn, leaving qpos alone."""
    low, high = np.array(world.area[0]), np.array(world.area[1])
    if world.name == "kitchen":
        shift = np.append(rng.uniform(-0.06, 0.06, 2), 0.0)
        for geoms in world.roots:
            _transform(world, geoms, np.zeros(3), shift, 0.0, 1.0)
    placed: list[tuple[Array, float]] = []
    for geoms, loose in zip(world.roots, world.loose, strict=True):
        if world.name == "kitchen" and not loose:
            continue
        middle = world.data.geom_xpos[geoms].mean(axis=0)
        radius = float(world.model.geom_rbound[geoms].max())
        scale = rng.uniform(0.95, 1.05) if gentle else float(np.exp(rng.uniform(-0.3, 0.25)))
        yaw = rng.normal(0.0, 0.05) if gentle else rng.normal(0.0, 0.35)
        goal, near_hand = middle, loose and rng.random() < 0.3
        for _ in range(8):
            goal = rng.uniform(low, high)
            if gentle:
                goal = middle + (goal - (low + high) / 2) * 0.6
            if all(np.linalg.norm(goal[:2] - other) > 0.7 * (radius + size) for other, size in placed):
                break
        goal[2] = middle[2]
        if near_hand:
            goal = world.tip() + rng.normal(0.0, 0.02, 3)
        elif rng.random() < 0.15:
            goal[:2] = np.clip(world.tip()[:2] + rng.normal(0.0, 0.06, 2), low[:2], high[:2])
        foot = np.array([middle[0], middle[1], low[2]])
        _transform(world, geoms, foot, goal - middle, yaw, scale)
        placed.append((goal[:2], radius))


def _transform(world: World, geoms: NDArray[np.int64], about: Array, shift: Array, yaw: float, scale: float) -> None:
    """Turn (radians about z) and scale drawn geoms about a point, then shift them by metres."""
    turn = scale * _rotation(np.array([0.0, 0.0, yaw]))
    positions, axes = world.data.geom_xpos, world.data.geom_xmat
    positions[geoms] = (positions[geoms] - about) @ turn.T + about + shift
    axes[geoms] = (turn @ axes[geoms].reshape(-1, 3, 3)).reshape(-1, 9)


def _rotation(vector: Array) -> Array:
    quaternion, matrix = np.zeros(4), np.zeros(9)
    angle = float(np.linalg.norm(vector))
    mujoco.mju_axisAngle2Quat(quaternion, vector / angle if angle else np.array([0.0, 0.0, 1.0]), angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def show_distractors(world: World, rng: np.random.Generator) -> list[tuple[str, str, int]]:
    """Show up to three hidden geoms as coloured shapes on the surface: (noun, colour, geom)."""
    low, high = np.array(world.area[0]), np.array(world.area[1])
    count = min(int(rng.integers(1, 4)), len(world.hidden))
    result, used = [], set()
    for geom in rng.permutation(world.hidden)[:count]:
        noun = str(rng.choice(list(_SHAPES)))
        colour = str(rng.choice([name for name in colours.NAMES if (noun, name) not in used]))
        used.add((noun, colour))
        size = rng.uniform(0.018, 0.05)
        model, data = world.model, world.data
        model.geom_type[geom] = _SHAPES[noun].value
        model.geom_size[geom] = (size, size, size)
        model.geom_matid[geom], model.geom_group[geom] = -1, 1
        model.geom_rgba[geom] = (*colours.draw(colour, rng), 1.0)
        data.geom_xpos[geom] = rng.uniform(low - (0.08, 0.05, 0.0), high + (0.08, 0.0, 0.0)) + (0.0, 0.0, size)
        data.geom_xmat[geom] = _rotation(np.array([0.0, 0.0, rng.uniform(0.0, 3.0)])).ravel()
        result.append((noun, colour, int(geom)))
    return result


def paint(world: World, rng: np.random.Generator) -> list[str | None]:
    """New colours for parts, robot and furniture; returns the name of each repainted part's colour."""
    model = world.model
    names: list[str | None] = []
    share = 0.5 if world.name == "kitchen" else 0.85
    for geoms in world.part_geoms:
        if rng.random() > share:
            names.append(None)
            continue
        name = str(rng.choice(colours.NAMES))
        rgb = colours.draw(name, rng)
        main = _main_material(world, geoms) if rng.random() < 0.5 else geoms
        for geom in main:
            material = int(model.geom_matid[geom])
            alpha = model.mat_rgba[material, 3] if material >= 0 else model.geom_rgba[geom, 3]
            model.geom_matid[geom], model.geom_rgba[geom] = -1, (*rgb, alpha)
        names.append(name)
    if rng.random() < 0.5:
        model.geom_rgba[world.robot, :3] = rng.uniform(0.05, 0.95, 3)
    if rng.random() < 0.4:
        model.geom_rgba[world.gripper, :3] = rng.uniform(0.05, 0.95, 3)
    textured = np.flatnonzero((model.mat_texid >= 0).any(axis=1))
    for geoms in world.furniture:
        kind = rng.random()
        if kind < 0.35:
            model.geom_matid[geoms], model.geom_rgba[geoms, :3] = -1, rng.uniform(0.05, 0.95, 3)
        elif kind < 0.75:
            model.geom_matid[geoms] = rng.choice(textured)
            model.geom_rgba[geoms, :3] = rng.uniform(0.4, 1.0, 3)
    return names


def _main_material(world: World, geoms: NDArray[np.int64]) -> NDArray[np.int64]:
    materials = world.model.geom_matid[geoms]
    largest = materials[np.argmax(world.model.geom_rbound[geoms])]
    return geoms[materials == largest]


def light(world: World, rng: np.random.Generator) -> None:
    """New brightness, tint and directions of all lights."""
    model, data = world.model, world.data
    tint = 1.0 + rng.normal(0.0, 0.03, 3)
    model.vis.headlight.ambient[:] = rng.uniform(0.2, 0.5) * tint
    model.vis.headlight.diffuse[:] = rng.uniform(0.1, 0.45) * tint
    model.light_diffuse[:] = rng.uniform(0.0, 0.4, (model.nlight, 1)) * tint
    turn = _rotation(np.array([0.0, 0.0, rng.uniform(-np.pi, np.pi)]))
    data.light_xdir[:] = data.light_xdir @ turn.T


def paint_textures(world: World, size: int, rng: np.random.Generator, repaint: bool) -> None:
    """Replace up to three of the textures by noise, stripes or checks, or bring the simulator's back."""
    model, renderer = world.model, world.renderer(size)
    large = np.flatnonzero((model.tex_type != mujoco.mjtTexture.mjTEXTURE_SKYBOX.value) & (model.tex_height >= 64))
    chosen = set(rng.permutation(large)[:3].tolist()) if repaint else set()
    for texture in large.tolist():
        start = int(model.tex_adr[texture])
        height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
        part = slice(start, start + height * width * int(model.tex_nchannel[texture]))
        if texture in chosen:
            pattern = _pattern(rng, height, width, int(model.tex_nchannel[texture]))
            model.tex_data[part] = pattern.ravel()
        elif np.array_equal(model.tex_data[part][:4096], world.base["tex_data"][part][:4096]):
            continue
        else:
            model.tex_data[part] = world.base["tex_data"][part]
        renderer.upload_texture(model, texture)


def _pattern(rng: np.random.Generator, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    cells = int(rng.choice((4, 8, 16, 32)))
    two = rng.integers(0, 256, (2, channels))
    rows, columns = np.ogrid[:height, :width]
    rows, columns = rows * cells // height, columns * cells // width
    kind = rng.integers(3)
    if kind == 0:
        return np.clip(two[0] + rng.normal(0.0, 40.0, (cells, cells, channels)), 0, 255).astype(np.uint8)[rows, columns]
    which = (rows + columns) % 2 if kind == 1 else rows % 2 + 0 * columns
    return two.astype(np.uint8)[which]
