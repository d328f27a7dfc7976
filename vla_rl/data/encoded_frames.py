"""Single pictures as PNG, WebP or JPEG bytes: what formats that keep one file or cell per frame need."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from vla_rl.data.packages import needed
from vla_rl.data.safety import MAX_COMPRESSION, MAX_EPISODE_BYTES, SLACK_BYTES, UnsafeFileError

FrameFormat = Literal["PNG", "WEBP", "JPEG"]


def encode_frame(image: np.ndarray, form: FrameFormat, *, quality: int = 95) -> bytes:
    """A picture, uint8 ``[H, W, 3]``, as PNG or WebP, compressed fast and without loss, or as JPEG of some quality."""
    options: dict[FrameFormat, dict[str, Any]] = {
        "PNG": {"compress_level": 1},
        "WEBP": {"lossless": True, "exact": True, "quality": 0, "method": 0},
        "JPEG": {"quality": quality},
    }
    buffer = io.BytesIO()
    needed("PIL.Image").fromarray(image).save(buffer, form, **options[form])
    return buffer.getvalue()


def decode_frames(
    frames: Sequence[bytes], name: str, *, formats: Sequence[FrameFormat] = ("PNG", "JPEG")
) -> np.ndarray:
    """Pictures out of compressed ones, uint8 ``[T, H, W, 3]``.

    Args:
        frames: at least one.
        name: where they come from, for messages.
        formats: which to accept.

    Raises:
        ImportError: if pillow is not installed.
        UnsafeFileError: if they claim to be larger than their bytes can hold, or than an episode may be.
        ValueError: if one is of no accepted format or damaged, or they are not of one size.
    """
    pillow = needed("PIL.Image")
    result: np.ndarray | None = None
    step = 0
    try:
        for step, data in enumerate(frames):
            with pillow.open(io.BytesIO(data), formats=formats) as image:
                height, width = image.height, image.width
                if result is None:
                    claimed = height * width * 3 * len(frames)
                    if claimed > min(MAX_COMPRESSION * sum(map(len, frames)) + SLACK_BYTES, MAX_EPISODE_BYTES):
                        raise UnsafeFileError(
                            f"{name}: {len(frames)} frames of {height} x {width} would take {claimed:,} bytes decoded, "
                            f"{sum(map(len, frames)):,} are there; refused"
                        )
                    result = np.empty((len(frames), height, width, 3), dtype=np.uint8)
                if (height, width) != result.shape[1:3]:
                    raise ValueError("it has another size than the first")
                result[step] = np.asarray(image.convert("RGB"))
    except UnsafeFileError:
        raise
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot decode frame {step} ({error})") from error
    if result is None:
        raise ValueError(f"{name} has no frames")
    return result
