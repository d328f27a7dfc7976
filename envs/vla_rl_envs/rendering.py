"""Offscreen pictures of a MuJoCo scene, made for training on CPUs: little per frame, shared between environments."""

from __future__ import annotations

import atexit
import copy
import importlib
import os
import sys
import threading
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vla_rl_envs.meshes import decimated, mesh_fingerprint

Quality = Literal["fast", "full"]

FAST_MAX_FACES = 500
"""Triangles kept per mesh by ``quality="fast"``: a picture of 128 pixels then differs little from the full one."""

_MAX_GEOMS = 2000


def configure_gl() -> None:
    """Choose EGL on a Linux machine without a display; best before the first ``import mujoco``.

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
        self, model: Any, *, height: int, width: int, quality: Quality, fingerprint: str | None = None
    ) -> None:

        mujoco = import_mujoco()
        if quality == "fast":
            drawn = decimated(model, max_faces=FAST_MAX_FACES, fingerprint=fingerprint)
        else:
            drawn = copy.copy(model)
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

    def render(self, model: Any, data: Any, camera: Any, *, rotate: bool = False) -> NDArray[np.uint8]:
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

    def close(self) -> None:
        """Free the GPU memory; the renderer cannot draw afterwards."""
        self._context.free()


class _ProcessCache(threading.local):
    """GL objects belong to one thread of one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.gl: Any = None
        self.renderers: dict[tuple[Any, ...], SceneRenderer] = {}
        self.inherited: list[Any] = []

    def checked(self) -> _ProcessCache:
        """This cache, emptied where a fork has left it with the parent's objects.

        The software renderer's threads are gone in a forked child, where the first picture would hang for ever.
        """
        if self.pid != os.getpid():
            if self.gl is not None and os.environ.get("LP_NUM_THREADS") != "0":
                raise RuntimeError(
                    "this process was forked from one that had already drawn pictures, and OpenGL does not survive a "
                    'fork: start workers with context="forkserver" or "spawn", or set LP_NUM_THREADS=0 before Python '
                    "starts."
                )
            self.inherited.append((self.gl, self.renderers))
            self.pid, self.gl, self.renderers = os.getpid(), None, {}
        return self


_cache = _ProcessCache()


def scene_renderer(
    model: Any,
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


def fixed_camera(model: Any, name: str) -> Any:
    """The camera called ``name`` in ``model``.

    Raises:
        ValueError: if the model has no such camera; the message lists those it has.
    """
    mujoco = import_mujoco()
    index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA.value, name)
    if index < 0:
        names = ", ".join(model.camera(i).name for i in range(model.ncam))
        raise ValueError(f"camera {name!r} is not in the scene: choose one of {names}.")
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
    camera.fixedcamid = index
    return camera


def _free_gl(gl: Any, renderers: dict[tuple[Any, ...], SceneRenderer], pid: int) -> None:
    """Free GL objects before the library shuts its display down, in the process that made them."""
    if pid != os.getpid():
        return
    gl.make_current()
    for renderer in renderers.values():
        renderer.close()
    gl.free()


def _gl_context() -> Any:
    cache = _cache.checked()
    if cache.gl is None:
        try:
            # By name, because mujoco.gl_context keeps the choice made when MuJoCo was first imported.
            module = {"egl": "mujoco.egl", "osmesa": "mujoco.osmesa"}.get(os.environ.get("MUJOCO_GL", "").lower())
            cache.gl = importlib.import_module(module or "mujoco.gl_context").GLContext(64, 64)
            atexit.register(_free_gl, cache.gl, cache.renderers, os.getpid())
        except Exception as error:
            raise ImportError(_NO_GL.format(backend=os.environ.get("MUJOCO_GL", ""), error=error)) from error
    return cache.gl
