"""How the pictures of an episode lie in its file: raw, or in one of the forms that take less room."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import h5py
import numpy as np

from vla_rl.data.encoded_frames import FrameFormat, decode_frames, encode_frame
from vla_rl.data.packages import needed
from vla_rl.data.safety import MAX_COMPRESSION, MAX_EPISODE_BYTES, UnsafeFileError, encoded_shape
from vla_rl.data.video import VideoWriter, read_video

ImageFormat = Literal["raw", "lzf", "zstd", "png", "webp", "jpeg", "video"]
"""``raw``; ``lzf`` and ``zstd``: HDF5's chunks of one frame, compressed; ``png``, ``webp`` (lossless) and ``jpeg``:
each frame by itself; ``video``: H.264 per episode. All are exact but ``jpeg`` and ``video``."""

LOSSY = ("jpeg", "video")
_JPEG_QUALITY, _CRF, _FPS, _ZSTD_LEVEL = 95, 18, 20, 3
_ZSTD_FILTER = 32015  # as registered with the HDF Group
_ENCODED: dict[str, FrameFormat] = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}


def check_format(images: str) -> None:
    """Whether pictures can be written in a format here.

    Raises:
        ImportError: if a package is missing that it needs.
        ValueError: if it is none of ``ImageFormat``.
    """
    if images not in get_args(ImageFormat):
        raise ValueError(f"images must be one of {', '.join(get_args(ImageFormat))}, got {images!r}")
    if images == "zstd":
        needed("hdf5plugin")
    elif images == "video":
        needed("av")
    elif images in _ENCODED:
        encode_frame(np.zeros((1, 1, 3), np.uint8), _ENCODED[images])


def write_images(group: h5py.Group, key: str, images: np.ndarray, form: ImageFormat) -> h5py.Dataset:
    """Stores pictures, uint8 ``[T, H, W, 3]``, as ``observations/<key>`` of an episode.

    Encoded ones are one string of bytes with the attributes ``encoding``, ``shape`` and ``stored_crc32``, the frames'
    ends in it being in ``frame_ends/<key>``; the others are arrays of their shape. What shrinks so much that a reader
    would have to take it for forged, such as black frames as zstd or WebP, is stored as PNG.

    Args:
        group: the episode's.
        key: name of the camera.
        images: the pictures.
        form: how to store them.

    Raises:
        ImportError: if ``zstd`` needs hdf5plugin, ``video`` PyAV, or the encoded ones pillow.
        ValueError: if a video's height or width is odd.
    """
    name = f"observations/{key}"
    if form == "raw":
        return group.create_dataset(name, data=images)
    if form in ("lzf", "zstd"):
        options = {"compression": "lzf"} if form == "lzf" else dict(needed("hdf5plugin").Zstd(clevel=_ZSTD_LEVEL))
        dataset = group.create_dataset(name, data=images, chunks=(1, *images.shape[1:]), **options)
        dataset.flush()
        if images.nbytes <= MAX_COMPRESSION * dataset.id.get_storage_size():
            return dataset
        del group[name]
        form = "png"
    if form == "video":
        data = _encode_video(images)
    else:
        frames = [encode_frame(image, _ENCODED[form], quality=_JPEG_QUALITY) for image in images]
        if images.nbytes > MAX_COMPRESSION * sum(map(len, frames)):
            form, frames = "png", [encode_frame(image, "PNG") for image in images]
        group.create_dataset(f"frame_ends/{key}", data=np.cumsum([len(frame) for frame in frames]))
        data = b"".join(frames)
    dataset = group.create_dataset(name, data=np.frombuffer(data, np.uint8))
    dataset.attrs["encoding"], dataset.attrs["shape"] = form, images.shape
    return dataset


def image_format(dataset: h5py.Dataset) -> str:
    """The ``ImageFormat`` of stored pictures, or HDF5's name of another filter."""
    if "encoding" in dataset.attrs:
        return str(dataset.attrs["encoding"])
    plist = dataset.id.get_create_plist()
    if not plist.get_nfilters():
        return "raw"
    return "zstd" if plist.get_filter(0)[0] == _ZSTD_FILTER else str(dataset.compression)


def episode_format(group: h5py.Group) -> str:
    """The ``ImageFormat`` of an episode's pictures; several, of several cameras, joined by ``+``."""
    observations = cast("h5py.Group", group["observations"])
    keys = [key for key in map(str, observations) if key.split("_")[0] == "image"]
    return "+".join(sorted({image_format(cast("h5py.Dataset", observations[key])) for key in keys}))


def is_plain(images: str) -> bool:
    """Whether what reads HDF5 reads the pictures too, given the format that an episode's index entry notes."""
    return not {*images.split("+")} & {*_ENCODED, "video"}


def image_shape(dataset: h5py.Dataset) -> tuple[int, ...]:
    """``(T, H, W, 3)`` of stored pictures, decoded.

    Raises:
        ValueError: if encoded ones do not say it.
        UnsafeFileError: if it is more than an episode may have.
    """
    if "encoding" not in dataset.attrs:
        return dataset.shape
    shape = encoded_shape(dataset)
    if math.prod(shape) > MAX_EPISODE_BYTES:
        raise UnsafeFileError(f"{_where(dataset)} claims the shape {shape}, more than an episode may have; refused")
    return shape


def read_images(dataset: h5py.Dataset, rows: slice | Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Stored pictures, or any array of an episode, decoded if need be; touches only what it needs.

    Args:
        dataset: what ``write_images`` made.
        rows: which, in any order, with repetitions; all if None.

    Returns:
        uint8 ``[N, H, W, 3]``.

    Raises:
        ImportError: if what decodes them is not installed.
        IndexError: if there is no such row.
        ValueError: if they are damaged, or encoded in a way that this version does not know.
        UnsafeFileError: if they claim to be larger than their bytes can hold, or than an episode may be.
    """
    form = image_format(dataset)
    if form == "zstd":
        needed("hdf5plugin")
    if "encoding" in dataset.attrs:
        wanted = _row_numbers(rows, image_shape(dataset)[0])
        distinct, inverse = np.unique(wanted, return_inverse=True)
        return _decode(dataset, form, distinct)[inverse]
    if rows is None or isinstance(rows, slice):
        return dataset[slice(None) if rows is None else rows] if dataset.shape else dataset[()]
    found = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
    for k, row in enumerate(rows):
        found[k] = dataset[row]
    return found


def _row_numbers(rows: slice | Sequence[int] | np.ndarray | None, count: int) -> np.ndarray:
    """Which rows out of so many, none of them negative."""
    if rows is None or isinstance(rows, slice):
        return np.arange(*(rows or slice(None)).indices(count))
    numbers = np.asarray(rows, dtype=np.int64)
    outside = numbers[(numbers < -count) | (numbers >= count)]
    if len(outside):
        raise IndexError(f"row {outside[0]} is asked for, but there are {count}")
    return numbers % count


def _decode(dataset: h5py.Dataset, form: str, rows: np.ndarray) -> np.ndarray:
    """The pictures of encoded ones with ascending numbers."""
    where = _where(dataset)
    steps, height, width, _ = image_shape(dataset)
    if dataset.dtype != np.uint8 or dataset.ndim != 1:
        raise ValueError(f"{where} is {dataset.dtype} {list(dataset.shape)}, expected a string of bytes")
    if not len(rows):
        return np.empty((0, height, width, 3), np.uint8)
    if form == "video":
        content = io.BytesIO(dataset[()].tobytes())
        return read_video(content, rows / _FPS, height=height, width=width, tolerance=0.4 / _FPS, name=where)
    if form not in _ENCODED:
        raise ValueError(f"{where} is encoded as '{form}', which this version does not know; install a newer one")
    ends = _frame_ends(dataset)
    starts = np.concatenate([[0], ends[:-1]])
    if len(ends) != steps or (ends <= starts).any() or ends[-1] != len(dataset):
        raise ValueError(f"{where} has {len(dataset)} bytes, and the ends of its {steps} frames do not fit them")
    images = decode_frames([dataset[starts[k] : ends[k]].tobytes() for k in rows], where, formats=(_ENCODED[form],))
    if images.shape[1:3] != (height, width):
        raise ValueError(f"{where} has frames of {images.shape[1:3]}, expected {(height, width)}")
    return images


def _frame_ends(dataset: h5py.Dataset) -> np.ndarray:
    """Where each frame ends in the bytes of encoded ones, int64; of no frame if that is not there or no list."""
    observations, key = str(dataset.name).rsplit("/", 1)
    ends: Any = dataset.file.get(f"{observations.rsplit('/', 1)[0]}/frame_ends/{key}")
    known = isinstance(ends, h5py.Dataset) and ends.ndim == 1 and ends.dtype.kind in "iu"
    return ends[()].astype(np.int64) if known else np.empty(0, np.int64)


def _encode_video(images: np.ndarray) -> bytes:
    height, width = images.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"pictures are {height} x {width}, but videos need even sizes; choose another format")
    content = io.BytesIO()
    video = VideoWriter(content, height=height, width=width, fps=_FPS, crf=_CRF)
    video.add(images)
    video.close()
    return content.getvalue()


def _where(dataset: h5py.Dataset) -> str:
    return f"'{dataset.file.filename}': '{dataset.name}'"
