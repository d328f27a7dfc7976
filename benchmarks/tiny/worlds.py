"""The simulators behind the pictures: one scene each, with its named parts, its robot's poses and a renderer."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import parts as tables
from cameras import View, orbit
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from numpy.typing import NDArray
from parts import Part
from vla_rl_envs import make_expert, rendering
from vla_rl_envs.kitchen_tasks import TASKS as KITCHEN_TASKS
from vla_rl_envs.rendering import SceneRenderer, fixed_camera, pixel_sizes
from vla_rl_envs.tasks import TASKS as METAWORLD_TASKS

METAWORLD_ID, KITCHEN_ID = "vla_rl_envs:VLA/MetaWorld-v0", "vla_rl_envs:VLA/FrankaKitchen-v0"
ALL_TASKS: tuple[str, ...] = (*METAWORLD_TASKS, *KITCHEN_TASKS)

_SCRIPTED = (
    "knob-on",
    "light-on",
    "microwave-open",
    "slide-door-open",
    "left-door-open",
    "bottom-burner",
    "top-burner",
)
_ROBOT_ROOTS = ("base", "controller_box", "pedestal_feet", "mocap")
_FURNITURE = ("tablelink", "RetainingWall")
_GEOM_FIELDS = ("geom_rgba", "geom_matid", "geom_type", "geom_size", "geom_group")
_LIGHT_FIELDS = ("light_diffuse", "light_ambient", "light_castshadow")
_HEADLIGHT = ("ambient", "diffuse", "specular")


class SampleRenderer(SceneRenderer):
    """The fast renderer with two more abilities: which geom each pixel shows, and new textures."""

    def segment(self, model: Any, data: Any, camera: Any) -> NDArray[np.int32]:
        """Index of the geom that each pixel shows, int32 [H, W]; -1 where there is none."""
        flags = self._scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        try:
            colours = self.render(model, data, camera).astype(np.int32)
        finally:
            flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = False
        drawn = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        numbers, places = np.unique(drawn, return_inverse=True)
        geoms = np.array([self._geom(int(number) - 1) for number in numbers], dtype=np.int32)
        return geoms[places].reshape(drawn.shape)

    def _geom(self, drawn: int) -> int:
        if not 0 <= drawn < self._scene.ngeom:
            return -1
        geom = self._scene.geoms[drawn]
        return int(geom.objid) if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM else -1

    def upload_texture(self, model: Any, texture: int) -> None:
        """Draw with ``model.tex_data`` of this texture from now on."""
        self._gl.make_current()
        mujoco.mjr_uploadTexture(model, self._context, texture)
        # The upload resets the filter that the fast renderer has set.
        rendering.use_one_mipmap_level(self._context)


@dataclass(eq=False)
class World:
    """A scene ready to be varied.

    Attributes:
        name: the scene; tasks may share one.
        model, data: MuJoCo's, private to this world.
        parts: what can be named, in the table's order.
        part_geoms: drawn geoms of each part.
        roots: geoms of each object that may be moved on its own.
        loose: whether the object of the same place can be carried.
        furniture: geoms of table, fence and floor, one array each.
        robot, gripper: geoms of the arm and of the hand.
        hidden: geoms that are never drawn, used as distractors.
        arm, fingers: addresses in qpos.
        finger_ends: qpos of the fingers when closed and when open.
        poses: arm joint positions, float64 [N, len(arm)].
        tips: geoms whose mean position is the point between the finger tips.
        camera: id of the camera that is moved around.
        own_camera: the environment's camera, by which meshes are simplified as they are there.
        view: the environment's own camera.
        area: low and high corner of where objects stand (x, y, z of the surface).
        base: copies of the arrays that a sample changes.
    """

    name: str
    model: Any
    data: Any
    parts: tuple[Part, ...]
    part_geoms: list[NDArray[np.int64]]
    roots: list[NDArray[np.int64]]
    loose: list[bool]
    furniture: list[NDArray[np.int64]]
    robot: NDArray[np.int64]
    gripper: NDArray[np.int64]
    hidden: NDArray[np.int64]
    arm: NDArray[np.int64]
    fingers: NDArray[np.int64]
    finger_ends: tuple[NDArray[np.float64], NDArray[np.float64]]
    poses: NDArray[np.float64]
    tips: NDArray[np.int64]
    camera: int
    own_camera: Any
    view: View
    area: tuple[tuple[float, float, float], tuple[float, float, float]]
    qpos: NDArray[np.float64]
    base: dict[str, NDArray[Any]] = field(default_factory=dict)
    _renderers: dict[int, SampleRenderer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.model
        self.base = {name: getattr(model, name).copy() for name in (*_GEOM_FIELDS, *_LIGHT_FIELDS)}
        self.base |= {f"headlight.{name}": np.array(getattr(model.vis.headlight, name)) for name in _HEADLIGHT}
        self.base["tex_data"] = model.tex_data.copy()
        self.base["cam_fovy"] = model.cam_fovy.copy()

    def restore(self) -> None:
        """Undo what samples changed, textures and the state apart."""
        for name in (*_GEOM_FIELDS, *_LIGHT_FIELDS):
            getattr(self.model, name)[:] = self.base[name]
        for name in _HEADLIGHT:
            getattr(self.model.vis.headlight, name)[:] = self.base[f"headlight.{name}"]

    def renderer(self, size: int) -> SampleRenderer:
        """The renderer for pictures of ``size`` x ``size`` pixels, built at the first call."""
        if size not in self._renderers:
            pixels = pixel_sizes(self.model, self.own_camera, height=size)
            self._renderers[size] = SampleRenderer(self.model, height=size, width=size, pixels=pixels)
        return self._renderers[size]

    def mujoco_camera(self) -> Any:
        """The camera to render with."""
        return fixed_camera(self.model, self.model.camera(self.camera).name)

    def place_camera(self, view: View) -> None:
        """Move the camera, after the kinematics and before rendering."""
        self.data.cam_xpos[self.camera] = view.eye
        self.data.cam_xmat[self.camera] = view.axes.ravel()
        self.model.cam_fovy[self.camera] = view.fovy

    def kinematics(self) -> None:
        """Poses of bodies, geoms, lights and cameras from qpos."""
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def tip(self) -> NDArray[np.float64]:
        """Point between the finger tips in metres, float64 [3]."""
        return self.data.geom_xpos[self.tips].mean(axis=0)

    def close(self) -> None:
        """Free the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


def scene_of(task: str) -> str:
    """The scene in which a task takes place: Meta-World's file name, or ``"kitchen"``."""
    if task in KITCHEN_TASKS:
        return "kitchen"
    # The property needs no instance, and an instance would cost a second.
    path = ALL_V3_ENVIRONMENTS[f"{task}-v3"].model_name.fget(None)  # pyright: ignore[reportAttributeAccessIssue]
    return Path(path).stem.removeprefix("sawyer_")


def target_of(task: str) -> str:
    """Name of the part that ``task`` is about."""
    return tables.TARGETS.get(task, "puck")


def make_world(task: str) -> World:
    """The world of a task, with the object positions that its first reset gives."""
    return _kitchen_world() if task in KITCHEN_TASKS else _metaworld_world(task)


def _metaworld_world(task: str) -> World:
    env: Any = gym.make(METAWORLD_ID, task=task, render_quality="none", disable_env_checker=True).unwrapped
    env.reset(seed=0)
    model, data, name = env.model, env.data, scene_of(task)
    drawn = _drawn(model)
    root_names = {int(geom): model.body(int(model.body_rootid[model.geom_bodyid[geom]])).name for geom in drawn}
    robot = [geom for geom in drawn if root_names[geom] in _ROBOT_ROOTS]
    hand = _below(model, "right_hand")
    table_wood = model.material("table_wood").id
    furniture = [[g for g in drawn if root_names[g] == body] for body in _FURNITURE]
    furniture.append([g for g in drawn if model.geom_bodyid[g] == 0])
    furniture[0] += [g for g in drawn if root_names[g] == "" and model.geom_matid[g] == table_wood]
    fixed = {*robot, *(geom for geoms in furniture for geom in geoms)}
    ids = sorted({int(model.body_rootid[model.geom_bodyid[geom]]) for geom in drawn if geom not in fixed})
    roots = [[g for g in drawn if model.body_rootid[model.geom_bodyid[g]] == root] for root in ids]
    free = {int(model.jnt_bodyid[j]) for j in np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE.value)}
    camera = model.camera("corner2").id
    # The environment turns this camera's picture by 180 degrees.
    axes = data.cam_xmat[camera].reshape(3, 3) * (-1.0, -1.0, 1.0)
    return World(
        name=name,
        model=model,
        data=data,
        parts=tables.METAWORLD[name],
        part_geoms=_assign(model, drawn, tables.METAWORLD[name]),
        roots=[np.array(geoms) for geoms in roots],
        loose=[root in free for root in ids],
        furniture=[np.array(geoms) for geoms in furniture if geoms],
        robot=np.array(robot),
        gripper=np.array([geom for geom in robot if model.geom_bodyid[geom] in hand]),
        hidden=_hidden(model, drawn),
        arm=_addresses(model, [f"right_j{i}" for i in range(7)]),
        fingers=_addresses(model, ["r_close", "l_close"]),
        finger_ends=(np.array([0.04, -0.03]), np.zeros(2)),
        poses=_sawyer_poses(),
        tips=np.array([model.geom("rightpad_geom").id, model.geom("leftpad_geom").id]),
        camera=camera,
        own_camera=fixed_camera(model, "corner2"),
        view=View(data.cam_xpos[camera].copy(), axes, float(model.cam_fovy[camera])),
        area=((-0.32, 0.45, 0.0), (0.32, 0.92, 0.0)),
        qpos=data.qpos.copy(),
    )


def _kitchen_world() -> World:
    env: Any = gym.make(KITCHEN_ID, render_quality="none", variation=0.0, disable_env_checker=True).unwrapped
    env.reset(seed=0)
    model, data = env.model, env.data
    drawn = _drawn(model)
    desk, kettle = _below(model, "desk"), _below(model, "kettle")
    robot = [g for g in drawn if model.geom_bodyid[g] not in desk | kettle and model.geom_bodyid[g] > 1]
    hand = _below(model, "panda0_leftfinger") | _below(model, "panda0_rightfinger")
    hand |= {model.body("panda0_link7").id}
    own = mujoco.MjvCamera()
    own.lookat[:], own.distance, own.azimuth, own.elevation = (-0.3, 0.5, 2.15), 1.9, 60.0, -20.0
    return World(
        name="kitchen",
        model=model,
        data=data,
        parts=tables.KITCHEN,
        part_geoms=_assign(model, drawn, tables.KITCHEN),
        roots=[np.array([g for g in drawn if model.geom_bodyid[g] in bodies]) for bodies in (desk, kettle)],
        loose=[False, True],
        furniture=[np.array([g for g in drawn if model.geom_bodyid[g] == body.id]) for body in _walls(model)],
        robot=np.array(robot),
        gripper=np.array([geom for geom in robot if model.geom_bodyid[geom] in hand]),
        hidden=_hidden(model, drawn),
        arm=np.arange(7),
        fingers=np.arange(7, 9),
        finger_ends=(np.zeros(2), np.full(2, 0.04)),
        poses=_franka_poses(),
        tips=np.array([g for g in robot if model.geom_bodyid[g] in hand - {model.body("panda0_link7").id}]),
        camera=0,
        own_camera=own,
        view=orbit(
            np.array(own.lookat),
            distance=own.distance,
            azimuth=own.azimuth,
            elevation=own.elevation,
            fovy=float(model.vis.global_.fovy),
        ),
        area=((-0.45, 0.3, 1.62), (0.3, 0.5, 1.62)),
        qpos=data.qpos.copy(),
    )


def _walls(model: Any) -> list[Any]:
    return [model.body(name) for name in ("wallroot", "wall2", "world")]


def _drawn(model: Any) -> list[int]:
    alpha = np.where(model.geom_matid >= 0, model.mat_rgba[model.geom_matid, 3], model.geom_rgba[:, 3])
    return [int(geom) for geom in np.flatnonzero((alpha > 0) & (model.geom_group < 3) & (model.geom_rgba[:, 3] > 0))]


def _hidden(model: Any, drawn: list[int]) -> NDArray[np.int64]:
    fixed = model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE.value
    return np.array([g for g in np.flatnonzero(fixed & (model.geom_group >= 3)) if g not in drawn])


def _below(model: Any, body: str) -> set[int]:
    found = {model.body(body).id}
    for index in range(model.nbody):
        if int(model.body_parentid[index]) in found:
            found.add(index)
    return found


def _assign(model: Any, drawn: list[int], parts: tuple[Part, ...]) -> list[NDArray[np.int64]]:
    taken: set[int] = set()
    result = []
    for part in parts:
        bodies = _below(model, part.body)
        materials = {model.material(name).id for name in part.materials}
        geoms = [
            geom
            for geom in drawn
            if geom not in taken
            and int(model.geom_bodyid[geom]) in bodies
            and (not materials or int(model.geom_matid[geom]) in materials)
        ]
        if not geoms:
            raise ValueError(f"part {part.name!r} has no drawn geoms below body {part.body!r}; correct the table")
        taken.update(geoms)
        result.append(np.array(geoms))
    return result


def _addresses(model: Any, joints: list[str]) -> NDArray[np.int64]:
    return np.array([int(model.jnt_qposadr[model.joint(name).id]) for name in joints])


@functools.lru_cache(maxsize=1)
def _sawyer_poses(steps: int = 4000, every: int = 5) -> NDArray[np.float64]:
    """Arm joints along a walk between random points, the same in every process."""
    env: Any = gym.make(METAWORLD_ID, task="reach", horizon=10**6, render_quality="none", terminate_on_success=False)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    inner = env.unwrapped
    arm = _addresses(inner.model, [f"right_j{i}" for i in range(7)])
    poses, goal, hand = [], np.zeros(3), np.zeros(3)
    for step in range(steps):
        if step % 40 == 0:
            goal = rng.uniform((-0.4, 0.42, 0.04), (0.4, 0.95, 0.4))
        observation, *_ = inner.step(np.append(np.clip((goal - hand) / 0.01, -1, 1), 0.0))
        hand = observation["state"][:3]
        if step % every == 0:
            poses.append(inner.data.qpos[arm].copy())
    env.close()
    return np.array(poses)


@functools.lru_cache(maxsize=1)
def _franka_poses(every: int = 2) -> NDArray[np.float64]:
    """Arm joints along the scripted experts' paths, the same in every process."""
    poses = []
    for task in _SCRIPTED:
        env: Any = gym.make(KITCHEN_ID, task=task, render_quality="none", disable_env_checker=True)
        env.reset(seed=0)
        expert, done, step = make_expert(env), False, 0
        while not done:
            _, _, terminated, truncated, _ = env.step(expert(env))
            done, step = terminated or truncated, step + 1
            if step % every == 0:
                poses.append(env.unwrapped.data.qpos[:7].copy())
        env.close()
    return np.array(poses)
