"""Frames into and out of mp4 files, the way LeRobot keeps them: many episodes in one file, found by time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from vla_rl.data.packages import needed
from vla_rl.data.safety import MAX_EPISODE_BYTES, UnsafeFileError


class VideoWriter:
    """One mp4 file, H.264 with a key frame at every second frame, so that single frames are found fast.

    Args:
        path: file to write, or one open for writing and seeking.
        height: of a frame, even.
        width: of a frame, even.
        fps: frames per second.
        crf: x264's constant rate factor; less is better and larger.

    Raises:
        ImportError: if PyAV is not installed.
    """

    def __init__(self, path: Path | IO[bytes], *, height: int, width: int, fps: int, crf: int) -> None:
        self._av: Any = needed("av")
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.num_frames = 0
        self._container: Any = self._av.open(path, "w", format="mp4")
        self._stream: Any = self._container.add_stream("libx264", rate=fps, options={"crf": str(crf), "g": "2"})
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._time_base = Fraction(1, fps)

    def add(self, images: np.ndarray) -> None:
        """Appends pictures, uint8 ``[T, H, W, 3]``."""
        for image in images:
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = self.num_frames, self._time_base
            self.num_frames += 1
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Writes what the encoder still holds, and the file's table."""
        self._container.mux(self._stream.encode())
        self._container.close()


def read_video(
    path: Path | IO[bytes], times: np.ndarray, *, height: int, width: int, tolerance: float, name: str | None = None
) -> np.ndarray:
    """The frames at some moments of an mp4 file.

    Args:
        path: the file; checked by the caller to lie where it may. Or one that is open.
        times: ``T`` moments in seconds, ascending.
        height: expected of every frame.
        width: expected of every frame.
        tolerance: seconds by which a frame may be off.
        name: where it comes from, for messages; by default the path.

    Returns:
        uint8 ``[T, H, W, 3]``.

    Raises:
        ImportError: if PyAV is not installed.
        UnsafeFileError: if the frames have another size than expected, or would take more than an episode may.
        ValueError: if the file is no mp4, or has no frame at some moment.
    """
    av: Any = needed("av")
    where = name or f"'{path}'"
    if len(times) * height * width * 3 > MAX_EPISODE_BYTES:
        raise UnsafeFileError(f"{where}: {len(times)} frames of {height} x {width} are more than an episode may have")
    if not (np.isfinite(times).all() and (times >= 0).all() and (np.diff(times) > 0).all()):
        raise ValueError(f"{where}: the times of its frames do not ascend")
    images = np.empty((len(times), height, width, 3), dtype=np.uint8)
    found = 0
    try:
        # The format is named, since a file that FFmpeg recognises as a playlist could make it open others.
        with av.open(path, "r", format="mp4", options={"protocol_whitelist": "file"}) as container:
            stream = container.streams.video[0]
            container.seek(int(max(0.0, times[0] - tolerance) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if (frame.height, frame.width) != (height, width):
                    raise UnsafeFileError(
                        f"{where} has frames of {frame.height} x {frame.width}, expected {height} x {width}; refused"
                    )
                if frame.time is None or frame.time < times[found] - tolerance:
                    continue
                if frame.time > times[found] + tolerance:
                    break
                images[found] = frame.to_ndarray(format="rgb24")
                found += 1
                if found == len(times):
                    return images
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot read {where} ({error}); fetch it again") from error
    raise ValueError(f"{where} has no frame at {times[found]:.3f} s; is it cut off, or of another recording?")
