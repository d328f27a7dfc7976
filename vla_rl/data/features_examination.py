"""Files of cached features under the magnifying glass: whole, and of the encoder and episode that they lie with."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from vla_rl.data.examination import Finding
from vla_rl.data.layout import get_dataset, get_group
from vla_rl.data.reencoding import origin
from vla_rl.data.safety import check_group, check_inside

FRAMES = 64  # read at a time


def examine_features(root: Path, episodes: Mapping[int, Path]) -> Iterator[Finding]:
    """Judges every file of features in a store; never raises for what the files hold.

    Args:
        root: folder of the store.
        episodes: its episode files by number.

    Yields:
        An error for a file that is damaged, a warning for one that no encoder would be given: the features of another
        episode than the one beside them, or of none.
    """
    for path in sorted((root / "data" / "features").glob("*/*")):
        name = path.relative_to(root).as_posix()
        match = re.fullmatch(r"(\d{6,18})\.hdf5", path.name)
        if match is None or int(match[1]) not in episodes:
            yield Finding("warning", name, "it belongs to no episode; delete it")
            continue
        try:
            check_inside(path, root)
            with h5py.File(path, "r") as file, h5py.File(episodes[int(match[1])], "r") as whole:
                check_group(file)
                _examine(file)
                group = get_group(whole, f"episode_{int(match[1])}")
                check_group(group)
                expected = origin(group, path.parent.name)
                stale = [key for key, value in expected.items() if file.attrs.get(key) != value]
                count = get_dataset(group, "actions").shape[0] + 1
                if not stale and get_dataset(file, "tokens").shape[0] != count:
                    raise ValueError(f"it holds {get_dataset(file, 'tokens').shape[0]} frames, the episode {count}")
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
            text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
            yield Finding("error", name, f"damaged: {text[:300] or type(error).__name__}; delete it and re-encode")
        else:
            if stale:
                yield Finding("warning", name, f"its {', '.join(stale)} is not that of the episode; re-encode")


def _examine(file: h5py.File) -> None:
    tokens, mask = get_dataset(file, "tokens"), get_dataset(file, "mask")
    if tokens.ndim != 3 or tokens.dtype.name not in ("float16", "float32"):
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}, expected float16 or float32 [T + 1, M, D]")
    if mask.dtype != np.bool_ or mask.shape != tokens.shape[:2]:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}, expected bool {list(tokens.shape[:2])}")
    crc = 0
    for start in range(0, tokens.shape[0], FRAMES):
        part, known = tokens[start : start + FRAMES], mask[start : start + FRAMES]
        if not np.isfinite(part[known]).all():
            raise ValueError(f"tokens of the frames from {start} hold NaN or infinite values")
        crc = zlib.crc32(np.ascontiguousarray(part).data.cast("B"), crc)
    expected = tokens.attrs.get("crc32")
    if expected is None or int(expected) != crc:
        raise ValueError(
            f"tokens have checksum {crc:08x}, expected {'none' if expected is None else f'{expected:08x}'}"
        )
