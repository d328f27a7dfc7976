"""Which OpenGL context is current, with each of MuJoCo's backends: ours while we draw, and then whose it was before."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def current(gl: Any) -> Iterator[None]:
    """Make a MuJoCo ``GLContext`` current, and afterwards what was so before, which Gymnasium's renderer counts on."""
    restore = _BACKENDS[type(gl).__module__](gl)
    gl.make_current()
    try:
        yield
    finally:
        if restore is not None:
            restore()


def _egl(gl: Any) -> Callable[[], object] | None:
    from OpenGL import EGL

    before = EGL.eglGetCurrentContext()
    if not before or before.address == gl._context.address:
        return None
    display = EGL.eglGetCurrentDisplay()
    surfaces = EGL.eglGetCurrentSurface(EGL.EGL_DRAW), EGL.eglGetCurrentSurface(EGL.EGL_READ)
    return partial(EGL.eglMakeCurrent, display, *surfaces, before)


def _osmesa(gl: Any) -> Callable[[], object] | None:
    from OpenGL import GL, osmesa

    before = osmesa.OSMesaGetCurrentContext()
    if not before or before == gl._context:
        return None
    width, height, _, buffer = osmesa.OSMesaGetColorBuffer(before)
    return partial(osmesa.OSMesaMakeCurrent, before, buffer, GL.GL_FLOAT, width, height)  # MuJoCo's buffers are floats


def _glfw(gl: Any) -> Callable[[], object] | None:
    import glfw

    before = glfw.get_current_context()
    return partial(glfw.make_context_current, before) if before and before != gl._context else None


def _cgl(gl: Any) -> Callable[[], object] | None:
    from mujoco.cgl import cgl

    get = cgl._CGL.CGLGetCurrentContext
    get.restype = ctypes.c_void_p
    before = get()
    return partial(cgl.CGLSetCurrentContext, before) if before and before != gl._context.value else None


_BACKENDS: dict[str, Callable[[Any], Callable[[], object] | None]] = {
    "mujoco.egl": _egl,
    "mujoco.osmesa": _osmesa,
    "mujoco.glfw": _glfw,
    "mujoco.cgl": _cgl,
}
"""Module of the ``GLContext`` -> what makes the present context current again; None where that is ``gl`` or nothing."""
