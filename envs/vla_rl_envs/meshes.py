"""Mesh decimation for drawing: a copy of a MuJoCo model with fewer triangles, cached on disk."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

AGGRESSIVENESS = 3.0
"""How hard fast-simplification tries per pass; lower keeps shapes better and leaves more triangles."""

PIXELS_PER_TRIANGLE = 7.0
"""A mesh keeps about one triangle for so many pixels that its outline may cover ..."""
MIN_TRIANGLES = 64
"""... but no mesh is asked to have fewer than this."""
WELD = 0.5
"""Vertices of one mesh closer than about so many pixels become one: parts too small to see vanish, seams close."""

_CACHE_VERSION = 5


_UPLOADED = (
    *("mat_tex", "tex_type", "tex_height", "tex_width", "tex_nchannel", "tex_colorspace"),
    *("mesh_normal", "mesh_facenormal", "mesh_facetexcoord", "hfield_", "skin_", "flex_"),
)
"""How the names of the model's arrays begin that a GL context or a scene copies, beside those of the fingerprint."""


def mesh_fingerprint(model: Any) -> str:
    """Hash of the model's meshes and textures, of which decimated meshes are cached."""
    digest = hashlib.sha256()
    for array in (model.mesh_vert, model.mesh_face, model.mesh_vertadr, model.mesh_faceadr, model.mesh_texcoord):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(np.ascontiguousarray(model.tex_data).tobytes())
    digest.update(np.ascontiguousarray(model.mat_texid).tobytes())
    return digest.hexdigest()[:24]


def scene_key(model: Any, fingerprint: str) -> str:
    """Hash of everything that a GL context and a scene take from the model when they are made.

    Models of one key can be drawn by one renderer; what else they differ in is read anew for every picture.

    Args:
        model: MuJoCo's model.
        fingerprint: its ``mesh_fingerprint``.
    """
    digest = hashlib.sha256(fingerprint.encode())
    planes, visual = model.geom_type == 0, model.vis
    arrays = [getattr(model, name) for name in dir(model) if name.startswith(_UPLOADED) and "pathadr" not in name]
    arrays += [model.geom_size[planes], model.geom_matid[planes], model.stat.center]
    for array in (*arrays, visual.rgba.fog, visual.rgba.haze):
        digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    numbers = [model.stat.extent, visual.global_.linewidth]
    for part in (visual.map, visual.quality):
        numbers += [getattr(part, name) for name in dir(part) if not name.startswith("_")]
    digest.update(repr(numbers).encode())
    return digest.hexdigest()[:24]


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/vla_rl`` or ``~/.cache/vla_rl``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla_rl"


def surface_areas(model: Any) -> NDArray[np.float64]:
    """Surface of every mesh in square metres, float64 [nmesh]."""
    if model.nmesh == 0:
        return np.zeros(0)
    owner = np.repeat(np.arange(model.nmesh), model.mesh_facenum)
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(model.mesh_faceadr, model.mesh_facenum, strict=True)])
    corners = model.mesh_vert[model.mesh_face[rows] + model.mesh_vertadr[owner, None]].astype(np.float64)
    doubled = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    return np.bincount(owner, weights=doubled / 2, minlength=model.nmesh).astype(np.float64)


def triangle_budgets(areas: NDArray[np.float64], pixels: NDArray[np.float64]) -> NDArray[np.int64]:
    """Triangles for meshes of a given surface where one pixel is ``pixels`` metres wide.

    A convex body of surface S has an outline of S / 4 on average over all directions (Cauchy).
    """
    return np.maximum(areas / 4 / pixels**2 / PIXELS_PER_TRIANGLE, MIN_TRIANGLES).astype(np.int64)


def decimated(model: Any, pixels: NDArray[np.float64], *, fingerprint: str | None = None) -> Any:
    """Copy of ``model`` with meshes as coarse as a picture allows in which a pixel at mesh i is ``pixels[i]`` wide.

    The copy is for drawing only: vertices stay, but faces are rewritten, so the original model must keep simulating.
    Every new vertex is snapped to the nearest old one, whose normals and texture coordinates are kept. The result is
    cached under ``cache_dir()``.

    Args:
        model: MuJoCo's model.
        pixels: metres per pixel, float64 [nmesh].
        fingerprint: ``mesh_fingerprint(model)``, where already known.

    Raises:
        ModuleNotFoundError: if ``fast-simplification`` is not installed.
    """
    slim = copy.copy(model)
    max_faces = triangle_budgets(surface_areas(model), pixels)
    if np.all(model.mesh_facenum <= max_faces):
        return slim
    settings = np.array([AGGRESSIVENESS, PIXELS_PER_TRIANGLE, MIN_TRIANGLES, WELD, *pixels], dtype="<f8")
    detail = hashlib.sha256(settings.tobytes()).hexdigest()[:12]
    path = cache_dir() / f"mesh-v{_CACHE_VERSION}-{fingerprint or mesh_fingerprint(model)}-{detail}.npz"
    arrays = _load(path)
    if arrays is None:
        parts = [_decimate_mesh(model, i, int(max_faces[i]), WELD * float(pixels[i])) for i in range(model.nmesh)]
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in ("face", "normal", "texcoord")}
        arrays["facenum"] = np.array([len(part["face"]) for part in parts], dtype=np.int32)
        _save(path, arrays)
    slim.mesh_facenum[:] = arrays["facenum"]
    start = 0
    for mesh, count in enumerate(arrays["facenum"]):
        rows = slice(int(model.mesh_faceadr[mesh]), int(model.mesh_faceadr[mesh]) + int(count))
        slim.mesh_face[rows] = arrays["face"][start : start + count]
        slim.mesh_facenormal[rows] = arrays["normal"][start : start + count]
        slim.mesh_facetexcoord[rows] = arrays["texcoord"][start : start + count]
        start += int(count)
    return slim


def _load(path: Path) -> dict[str, NDArray[np.int32]] | None:
    try:
        with np.load(path) as stored:
            return {key: stored[key] for key in ("facenum", "face", "normal", "texcoord")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path, arrays: dict[str, NDArray[np.int32]]) -> None:
    """Write through a temporary file; a cache that cannot be written is not an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(file.name, path)
    except OSError:
        return


def _decimate_mesh(model: Any, mesh: int, max_faces: int, weld: float) -> dict[str, NDArray[np.int32]]:
    face_adr, face_num = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
    rows = slice(face_adr, face_adr + face_num)
    old = {
        "face": model.mesh_face[rows].copy(),
        "normal": model.mesh_facenormal[rows].copy(),
        "texcoord": model.mesh_facetexcoord[rows].copy(),
    }
    if face_num <= max_faces:
        return old
    try:
        import fast_simplification
    except ModuleNotFoundError as error:
        message = 'fast rendering decimates meshes with fast-simplification: pip install "vla-rl[metaworld]"'
        raise ModuleNotFoundError(f'{message}, or pass render_quality="full".') from error

    vert_adr, vert_num = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
    vertices = np.ascontiguousarray(model.mesh_vert[vert_adr : vert_adr + vert_num], dtype=np.float32)
    # STL parts come with seams of duplicated vertices, along which a simplifier tears holes: weld them first.
    _, keep, cell = np.unique(np.round(vertices / weld), axis=0, return_index=True, return_inverse=True)
    triangles = cell.reshape(-1)[old["face"]].astype(np.int32)
    triangles = np.ascontiguousarray(triangles[_distinct(triangles)])
    points = vertices[keep]
    if len(triangles) > max_faces:
        simplify: Any = fast_simplification.simplify
        points, triangles = simplify(points, triangles, target_count=max_faces, agg=AGGRESSIVENESS)
    points = np.asarray(points, dtype=np.float32)
    nearest = np.array([int(np.argmin(((vertices - point) ** 2).sum(axis=1))) for point in points], dtype=np.int32)
    new_face = nearest[np.asarray(triangles, dtype=np.int64)].astype(np.int32)
    new_face = new_face[_distinct(new_face)]
    if len(new_face) == 0:
        return old

    normal_adr = int(model.mesh_normaladr[mesh])
    normals = model.mesh_normal[normal_adr : normal_adr + int(model.mesh_normalnum[mesh])]
    corner = _best_corners(vertices, new_face, old["face"].ravel(), normals[old["normal"].ravel()])
    return {
        "face": new_face,
        "normal": old["normal"].ravel()[corner],
        "texcoord": old["texcoord"].ravel()[corner],
    }


def _distinct(face: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which triangles [F, 3] have three different corners."""
    return (face[:, 0] != face[:, 1]) & (face[:, 1] != face[:, 2]) & (face[:, 0] != face[:, 2])


def _best_corners(
    vertices: NDArray[np.float32],
    new_face: NDArray[np.int32],
    corner_vertex: NDArray[np.int32],
    corner_normal: NDArray[np.float32],
) -> NDArray[np.int64]:
    """For every corner of ``new_face`` [F, 3] the old corner at the same vertex whose normal fits the new face best."""
    a, b, c = (vertices[new_face[:, i]] for i in range(3))
    face_normal = np.cross(b - a, c - a)
    order = np.argsort(corner_vertex, kind="stable")
    first = np.searchsorted(corner_vertex[order], np.arange(len(vertices) + 1))
    chosen = np.empty(new_face.shape, dtype=np.int64)
    for row, face in enumerate(new_face):
        for column, vertex in enumerate(face):
            candidates = order[first[vertex] : first[vertex + 1]]
            chosen[row, column] = candidates[np.argmax(corner_normal[candidates] @ face_normal[row])]
    return chosen
