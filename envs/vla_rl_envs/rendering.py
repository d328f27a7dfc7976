"""Offscreen pictures of a MuJoCo scene, made for training on CPUs: little per frame, shared between environments."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vla_rl_envs.meshes import decimated, mesh_fingerprint

if TYPE_CHECKING:
    import mujoco

Quality = Literal["fast", "full"]

FAST_MAX_FACES = 500
"""Triangles kept per mesh by ``quality="fast"``: a picture of 128 pixels then differs little from the full one."""

_MAX_GEOMS = 2000


def configure_gl() -> None:
    """Choose EGL on a Linux machine without a display; must run before the first ``import mujoco``.

    One rasteriser thread per process (``LP_NUM_THREADS``), because several environments usually share the cores.
    Variables that the user has set are left alone.
    """
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


configure_gl()

_NO_GL = (
    "no OpenGL could be loaded with MUJOCO_GL={backend!r} ({error}): install the Debian packages libegl1 and "
    "libgl1-mesa-dri and set MUJOCO_GL=egl before Python starts, or install libosmesa6 and set MUJOCO_GL=osmesa; "
    "MUJOCO_GL=disable simulates without pictures."
)


def import_mujoco() -> Any:
    """Import MuJoCo, whose import loads OpenGL.

    Raises:
        ModuleNotFoundError: if MuJoCo is not installed.
        ImportError: if no OpenGL library can be loaded; the message names the packages.
    """
    try:
        import mujoco
    except ModuleNotFoundError as error:
        if error.name == "mujoco":
            raise ModuleNotFoundError('MuJoCo is not installed: pip install "vla-rl[metaworld]"') from error
        raise
    except (ImportError, AttributeError, OSError) as error:
        raise ImportError(_NO_GL.format(backend=os.environ.get("MUJOCO_GL", ""), error=error)) from error
    return mujoco


class SceneRenderer:
    """Draws any model that shares this scene's meshes and textures into an image of one size.

    ``quality="fast"`` draws without shadows, reflections and multisampling, from decimated meshes.
    ``quality="full"`` draws exactly what ``mujoco.Renderer`` draws. Neither touches the simulated model.

    Use ``scene_renderer`` instead of the constructor: it shares one instance between all environments of a scene.

    Args:
        model: any model of the scene; it is copied.
        height: image height in pixels.
        width: image width in pixels.
        quality: ``"fast"`` or ``"full"``.
        fingerprint: ``mesh_fingerprint(model)``, where already known.

    Raises:
        ImportError: if no OpenGL library can be loaded.
    """

    def __init__(
        self, model: mujoco.MjModel, *, height: int, width: int, quality: Quality, fingerprint: str | None = None
    ) -> None:
        import copy

        import mujoco

        max_faces = FAST_MAX_FACES if quality == "fast" else None
        drawn = copy.copy(model) if max_faces is None else decimated(model, max_faces=max_faces, fingerprint=fingerprint)
        drawn.vis.global_.offwidth = width
        drawn.vis.global_.offheight = height
        if quality == "fast":
            drawn.vis.quality.shadowsize = 1
            drawn.vis.quality.offsamples = 0
        self._gl = _gl_context()
        self._gl.make_current()
        self._context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_50.value)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR.value
        self._scene = mujoco.MjvScene(drawn, maxgeom=_MAX_GEOMS)
        if quality == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._option = mujoco.MjvOption()
        self._perturb = mujoco.MjvPerturb()
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._buffer = np.empty((height, width, 3), dtype=np.uint8)
        self._offscreen = mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value
        self._all_categories = mujoco.mjtCatBit.mjCAT_ALL.value
        self._update_scene = mujoco.mjv_updateScene
        self._render = mujoco.mjr_render
        self._read_pixels = mujoco.mjr_readPixels
        self._set_buffer = mujoco.mjr_setBuffer

    def render(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: mujoco.MjvCamera, *, rotate: bool = False
    ) -> NDArray[np.uint8]:
        """Draw ``data`` with the colours, sizes and cameras of ``model``.

        Args:
            model: a model with the same meshes and textures as the one given to the constructor.
            data: its state, after ``mj_forward`` or ``mj_step``.
            camera: which camera to use.
            rotate: turn the picture by 180 degrees (flip both axes).

        Returns:
            A new array, uint8 [H, W, 3], first row on top.
        """
        self._gl.make_current()
        self._set_buffer(self._offscreen, self._context)
        self._update_scene(model, data, self._option, self._perturb, camera, self._all_categories, self._scene)
        self._render(self._viewport, self._scene, self._context)
        self._read_pixels(self._buffer, None, self._viewport, self._context)
        return np.ascontiguousarray(self._buffer[:, ::-1] if rotate else self._buffer[::-1])


class _ProcessCache(threading.local):
    """GL objects belong to one thread of one process; a forked child starts with none of its parent's."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.gl: Any = None
        self.renderers: dict[tuple[Any, ...], SceneRenderer] = {}
        self.inherited: list[Any] = []

    def checked(self) -> _ProcessCache:
        if self.pid != os.getpid():
            self.inherited.append((self.gl, self.renderers))
            self.pid, self.gl, self.renderers = os.getpid(), None, {}
        return self


_cache = _ProcessCache()


def scene_renderer(
    model: mujoco.MjModel,
    *,
    height: int,
    width: int,
    quality: Quality = "fast",
    fingerprint: str | None = None,
) -> SceneRenderer:
    """The renderer of this process for ``model``'s scene, size and quality; built at the first call.

    Raises:
        ValueError: for an unknown ``quality``.
        ImportError: if no OpenGL library can be loaded.
    """
    if quality not in ("fast", "full"):
        raise ValueError(f"render quality {quality!r} is not known: choose 'fast' or 'full'.")
    fingerprint = fingerprint or mesh_fingerprint(model)
    cache = _cache.checked()
    key = (fingerprint, height, width, quality)
    if key not in cache.renderers:
        cache.renderers[key] = SceneRenderer(
            model, height=height, width=width, quality=quality, fingerprint=fingerprint
        )
    return cache.renderers[key]


def fixed_camera(model: mujoco.MjModel, name: str) -> mujoco.MjvCamera:
    """The camera called ``name`` in ``model``.

    Raises:
        ValueError: if the model has no such camera; the message lists those it has.
    """
    import mujoco

    index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA.value, name)
    if index < 0:
        names = ", ".join(model.camera(i).name for i in range(model.ncam))
        raise ValueError(f"camera {name!r} is not in the scene: choose one of {names}.")
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
    camera.fixedcamid = index
    return camera


def _gl_context() -> Any:
    cache = _cache.checked()
    if cache.gl is None:
        try:
            from mujoco.gl_context import GLContext  # pyright: ignore[reportAttributeAccessIssue]

            cache.gl = GLContext(64, 64)
        except Exception as error:
            raise ImportError(_NO_GL.format(backend=os.environ.get("MUJOCO_GL", ""), error=error)) from error
    return cache.gl
