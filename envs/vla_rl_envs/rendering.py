"""Offscreen pictures of a MuJoCo scene, made for training on CPUs: little per frame, shared between environments."""

from __future__ import annotations

import atexit
import copy
import importlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vla_rl_envs.contexts import current
from vla_rl_envs.meshes import decimated, mesh_fingerprint, scene_key

Quality = Literal["fast", "full"]

GL_TIMEOUT = 60.0
"""Seconds after which an OpenGL start-up that does not return is given up."""

_MAX_GEOMS = 2000


def configure_gl() -> None:
    """Choose EGL on a Linux machine without a display; best before the first ``import mujoco``.

    Pictures are drawn in the calling thread (``LP_NUM_THREADS=0``): handing small pictures to another thread costs more
    than it gains where several environments share the cores. Variables that the user has set are left alone.
    """
    os.environ.setdefault("LP_NUM_THREADS", "0")
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
    """Draws any model of this scene (of one ``scene_key``) into an image of one size.

    ``quality="fast"`` draws without shadows, reflections and multisampling, from meshes decimated to what ``camera``
    sees of them, coarser primitives, and one texture level per pixel. ``quality="full"`` draws exactly what
    ``mujoco.Renderer`` draws. Neither touches the simulated model.

    Use ``scene_renderer`` instead of the constructor: it shares one instance between all environments of a scene.

    Args:
        model: any model of the scene; it is copied.
        height: image height in pixels.
        width: image width in pixels.
        pixels: what a pixel is at each mesh in metres (``pixel_sizes``), float64 [nmesh]; None means full quality.
        fingerprint: ``mesh_fingerprint(model)``, where already known.

    Raises:
        ImportError: if no OpenGL library can be loaded.
    """

    def __init__(
        self,
        model: Any,
        *,
        height: int,
        width: int,
        pixels: NDArray[np.float64] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        mujoco = import_mujoco()
        fast = pixels is not None
        drawn = decimated(model, pixels, fingerprint=fingerprint) if fast else copy.copy(model)
        drawn.vis.global_.offwidth = width
        drawn.vis.global_.offheight = height
        if fast:
            quality = drawn.vis.quality
            quality.shadowsize, quality.offsamples = 1, 0
            quality.numquads, quality.numslices, quality.numstacks = 1, 12, 8
        self._gl = _gl_context()
        with current(self._gl):
            try:
                self._context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_50.value)
            except mujoco.FatalError as error:  # a window system that is not there
                raise ImportError(_NO_GL.format(backend=os.environ.get("MUJOCO_GL", ""), error=error)) from error
            if fast:
                use_one_mipmap_level(self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR.value
        self._scene = mujoco.MjvScene(drawn, maxgeom=_MAX_GEOMS)
        if fast:
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
            model: of the same scene as the one given to the constructor.
            data: its state, after ``mj_forward`` or ``mj_step``.
            camera: which camera to use.
            rotate: turn the picture by 180 degrees (flip both axes).

        Returns:
            A new array, uint8 [H, W, 3], first row on top.
        """
        self._update_scene(model, data, self._option, self._perturb, camera, self._all_categories, self._scene)
        with current(self._gl):
            self._set_buffer(self._offscreen, self._context)
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

    def checked(self) -> _ProcessCache:
        """This cache, unless a fork has left it with the parent's objects: drawing with those hangs or crashes."""
        if self.pid != os.getpid():
            if self.gl is not None:
                raise RuntimeError(
                    "this process was forked from one that had already drawn pictures, and OpenGL does not survive a "
                    'fork: start workers with context="forkserver" or "spawn".'
                )
            self.pid = os.getpid()
        return self


_cache = _ProcessCache()


def scene_renderer(
    model: Any,
    camera: Any,
    *,
    height: int,
    width: int,
    quality: Quality = "fast",
    fingerprint: str | None = None,
) -> SceneRenderer:
    """The renderer of this process for a scene, size and quality; built at the first call.

    Args:
        model: the scene. Its own reference pose decides how finely meshes are drawn, so give every environment of a
            scene the same model (as compiled, not as varied by a reset), and they share one renderer.
        camera: the camera that will be used, or one at the same distance.
        height: image height in pixels.
        width: image width in pixels.
        quality: ``"fast"`` or ``"full"``.
        fingerprint: ``mesh_fingerprint(model)``, where already known.

    Raises:
        ValueError: for an unknown ``quality``.
        ImportError: if no OpenGL library can be loaded.
    """
    if quality not in ("fast", "full"):
        raise ValueError(f"render quality {quality!r} is not known: choose 'fast' or 'full'.")
    fingerprint = fingerprint or mesh_fingerprint(model)
    pixels = pixel_sizes(model, camera, height=height) if quality == "fast" else None
    cache = _cache.checked()
    key = (scene_key(model, fingerprint), height, width, None if pixels is None else pixels.tobytes())
    if key not in cache.renderers:
        cache.renderers[key] = SceneRenderer(model, height=height, width=width, pixels=pixels, fingerprint=fingerprint)
    return cache.renderers[key]


def pixel_sizes(model: Any, camera: Any, *, height: int) -> NDArray[np.float64]:
    """What one pixel of a picture of ``height`` rows taken by ``camera`` is at each mesh, in metres.

    Taken where the mesh is nearest to the camera in the model's reference pose, and rounded down to a power of the
    square root of two, so that nearly equal views share a renderer.

    Returns:
        float64 [nmesh]; infinite for a mesh that no geom uses.
    """
    mujoco = import_mujoco()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
    mujoco.mjv_updateScene(
        model, data, mujoco.MjvOption(), mujoco.MjvPerturb(), camera, mujoco.mjtCatBit.mjCAT_ALL.value, scene
    )
    view = scene.camera[0]
    focal = 0.5 * height * view.frustum_near / view.frustum_top
    geoms = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_MESH.value)
    distance = np.linalg.norm(data.geom_xpos[geoms] - view.pos, axis=1)
    nearest = np.full(model.nmesh, np.inf)
    np.minimum.at(nearest, model.geom_dataid[geoms], np.maximum(distance - model.geom_rbound[geoms], 0.5 * distance))
    return 2 ** (np.floor(2 * np.log2(nearest / focal)) / 2)


def use_one_mipmap_level(context: Any) -> None:
    """Sample one mipmap level per pixel instead of blending two, in every texture of a current GL context."""
    from OpenGL import GL

    for name, kind in zip(context.texture[: context.ntexture], context.textureType, strict=False):
        target = GL.GL_TEXTURE_2D if kind == 0 else GL.GL_TEXTURE_CUBE_MAP
        GL.glBindTexture(target, int(name))
        GL.glTexParameteri(target, GL.GL_TEXTURE_MIN_FILTER, GL.GL_LINEAR_MIPMAP_NEAREST)
        GL.glBindTexture(target, 0)


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
        backend = os.environ.get("MUJOCO_GL", "").lower()
        try:
            # By name, because mujoco.gl_context keeps the choice made when MuJoCo was first imported.
            module = {"egl": "mujoco.egl", "osmesa": "mujoco.osmesa"}.get(backend)
            build = importlib.import_module(module or "mujoco.gl_context").GLContext
            cache.gl = _within(GL_TIMEOUT, lambda: build(64, 64)) if module == "mujoco.egl" else build(64, 64)
            atexit.register(_free_gl, cache.gl, cache.renderers, os.getpid())
        except Exception as error:
            raise ImportError(_NO_GL.format(backend=backend, error=error)) from error
    return cache.gl


def _within(seconds: float, build: Callable[[], Any]) -> Any:
    """Result of ``build`` in a helper thread, because a driver that hangs cannot be interrupted."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(build())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except FutureTimeout:
        raise TimeoutError(f"it did not start within {seconds:g} s") from None
