"""A store written anew with its pictures in another format: small for an archive, raw for training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_rl.data.copying import Progress
from vla_rl.data.image_formats import LOSSY, ImageFormat, check_format
from vla_rl.data.safety import check_group, check_inside
from vla_rl.data.store import EpisodeStore
from vla_rl.data.writing import new_folder


def pack(
    store: str | Path,
    out: str | Path,
    *,
    images: ImageFormat,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EpisodeStore:
    """Writes all episodes to a new store whose pictures have another format; ``images="raw"`` unpacks them.

    Every episode is read back, and compared bit by bit where the format is exact, before the new store gets its name.
    Cached features stay behind, and so does what others have put into the files beside an episode's own arrays.

    Args:
        store: what to pack; left as it is.
        out: folder of the new store.
        images: see ``ImageFormat``.
        overwrite: replace what is at ``out``.
        progress: called after every episode.

    Returns:
        The new store, open for reading.

    Raises:
        ImportError: if the format needs a package that is not installed.
        ValueError: if the store holds no episode, its pictures do not suit the format, or do not come back the same.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
        OSError: if it cannot be written; then nothing is left behind.
    """
    check_format(images)
    source, out = EpisodeStore(store, mode="r"), Path(out).absolute()
    if not len(source):
        raise ValueError(f"'{source.path}' holds no episodes, so nothing was packed")
    with new_folder(out, overwrite=overwrite) as folder, EpisodeStore(folder, images=images) as target:
        for index in range(len(source)):
            check_inside(source.episode_path(index), source.path)
            with source.open_episode(index) as group:
                check_group(group)
            episode = source[index]
            target.append(episode, extras=source.read_extras(index))
            kept = target[index].observations
            for key in episode.image_keys:
                if images not in LOSSY and not np.array_equal(kept[key], episode.observations[key]):
                    raise ValueError(f"'{key}' of episode {index} does not come back from {images} as it was")
            if progress is not None:
                progress(index + 1, len(source))
    EpisodeStore(out, mode="a").close()  # writes its name, now that it has it, into metadata.json
    return EpisodeStore(out, mode="r")
