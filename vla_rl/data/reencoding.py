"""Cached features beside the episodes of a store: one group per encoder, keyed by its fingerprint.

::

    <root>/data/features/<fingerprint>/<i>.hdf5    "tokens" [T+1, M, D] and "mask" [T+1, M] of episode i

Groups are a cache: any of them can be deleted, and tools that make a new store leave them behind.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from vla_rl.data.copying import Progress
from vla_rl.data.heaps import check_words
from vla_rl.data.image_formats import image_shape, read_images
from vla_rl.data.layout import get_dataset, get_group
from vla_rl.data.safety import check_group, check_inside
from vla_rl.data.store import EpisodeStore
from vla_rl.data.writing import explained, require_space, sync_file
from vla_rl.file_lock import WriterLock


class Encoder(Protocol):
    """What re-encoding needs of an encoder; ``FrozenVLMEncoder`` has it."""

    @property
    def fingerprint(self) -> str:
        """Identity of all that decides the features."""
        ...

    def encode(self, images: np.ndarray, instructions: list[str]) -> Any:
        """``tokens [B, M, D]`` and bool ``mask [B, M]`` of images ``[B, H, W, 3]`` or ``[B, N, H, W, 3]``."""
        ...


@dataclass(frozen=True)
class FeatureGroup:
    """The features that one encoder left in a store.

    Attributes:
        fingerprint: of the encoder.
        episodes: how many episodes have them.
        num_bytes: size of their files.
    """

    fingerprint: str
    episodes: int
    num_bytes: int


def reencode(
    path: str | Path,
    encoder: Encoder,
    *,
    batch_size: int = 32,
    drop_stale: bool = False,
    progress: Progress | None = None,
) -> FeatureGroup:
    """Computes the features of every observation in a store, and keeps them beside its episodes.

    Episodes that have them already are skipped, so a killed call goes on where it was, and appended episodes are added
    by calling it again. Batches never span episodes: the result is the same, bit by bit, however often it was killed,
    given the same ``batch_size``, number of threads and machine.

    Args:
        path: root directory of the store.
        encoder: gives the tokens, kept as float16 or, if they have another type, as float32.
        batch_size: observations per forward pass.
        drop_stale: afterwards, delete the features of all other encoders.
        progress: called after every episode.

    Returns:
        What the store now holds for this encoder.

    Raises:
        FileNotFoundError: if there is no store.
        BlockingIOError: if a writer has it open.
        ValueError: if ``batch_size`` is below 1, the fingerprint cannot name a folder, or cameras differ in size.
        OSError: if the disk is full; what was computed before stays.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    store = EpisodeStore(path, mode="r")
    fingerprint = encoder.fingerprint
    targets = [_target(store, index, fingerprint) for index in range(len(store))]
    with ExitStack() as locks:
        for root in _roots(store):
            locks.callback(WriterLock(root).release)
        with explained(store.path, "the features computed before are kept"):
            for folder in {target.parent for target in targets}:
                folder.mkdir(parents=True, exist_ok=True)
            for index, target in enumerate(targets):
                with store.open_episode(index) as group:
                    if not _matches(target, group, fingerprint):
                        _encode_episode(group, target, encoder, fingerprint, batch_size)
                if progress is not None:
                    progress(index + 1, len(store))
        if encoder.fingerprint != fingerprint:
            raise ValueError(f"the encoder changed from {fingerprint} to {encoder.fingerprint} while it encoded")
        if drop_stale:
            _drop(store, keep=fingerprint)
    found = {group.fingerprint: group for group in feature_groups(store)}
    return found.get(fingerprint, FeatureGroup(fingerprint, 0, 0))


def feature_groups(store: EpisodeStore) -> list[FeatureGroup]:
    """The features that a store holds, by fingerprint."""
    sizes: dict[str, list[int]] = {}
    for folder in _folders(store):
        sizes.setdefault(folder.name, []).extend(path.stat().st_size for path in folder.glob("*.hdf5"))
    return [FeatureGroup(name, len(files), sum(files)) for name, files in sorted(sizes.items())]


def read_features(
    store: EpisodeStore, index: int, fingerprint: str, *, steps: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Cached features of one episode.

    Args:
        store: open store.
        index: the episode.
        fingerprint: of the encoder that is to use them; features of another are never given.
        steps: ``N`` observations in ``[0, T]``, in any order; all ``T + 1`` if None.

    Returns:
        Tokens ``[N, M, D]``, float16 or float32, and mask ``[N, M]``, bool; None if the episode has none.

    Raises:
        IndexError: if the episode or a step does not exist.
    """
    target = _target(store, index, fingerprint)
    if not target.is_file():
        return None
    check_inside(target, target.parents[3])
    with store.open_episode(index) as group:
        if not _matches(target, group, fingerprint):
            return None
    with h5py.File(target, "r") as file:
        check_group(file)
        tokens, mask = get_dataset(file, "tokens"), get_dataset(file, "mask")[()]
        if steps is None:
            return tokens[()], mask
        wanted = np.asarray(steps, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(mask)):
            raise IndexError(f"steps must be numbers in [0, {len(mask) - 1}], got {wanted.tolist()}")
        rows, inverse = np.unique(wanted, return_inverse=True)
        return tokens[rows][inverse], mask[wanted]


def _encode_episode(group: h5py.Group, target: Path, encoder: Encoder, fingerprint: str, batch_size: int) -> None:
    observations = get_group(group, "observations")
    cameras = [get_dataset(observations, key) for key in _cameras(group)]
    sizes = {key: list(image_shape(camera)[1:]) for key, camera in zip(_cameras(group), cameras, strict=True)}
    if any(size != list(image_shape(cameras[0])[1:]) for size in sizes.values()):
        raise ValueError(
            f"cameras must share one size to be encoded together, got {sizes}; record them with one image_size"
        )
    instruction, count = str(group.attrs["instruction"]), image_shape(cameras[0])[0]
    temporary = target.with_name(target.name + ".tmp")
    crc = 0
    try:
        with h5py.File(temporary, "w") as file:
            for start in range(0, count, batch_size):
                views = [read_images(camera, slice(start, start + batch_size)) for camera in cameras]
                images = views[0] if len(views) == 1 else np.stack(views, axis=1)
                features = encoder.encode(images, [instruction] * len(images))
                tokens, mask = _as_numpy(features.tokens), features.mask.cpu().numpy()
                if start == 0:
                    require_space(target, count * (tokens[0].nbytes + mask[0].nbytes))
                    shape = (count, *tokens.shape[1:])
                    file.create_dataset("tokens", shape, tokens.dtype, chunks=(1, *shape[1:]))
                    file.create_dataset("mask", shape[:2], np.bool_)
                get_dataset(file, "tokens")[start : start + len(tokens)] = tokens
                get_dataset(file, "mask")[start : start + len(mask)] = mask
                crc = zlib.crc32(np.ascontiguousarray(tokens).data.cast("B"), crc)
            get_dataset(file, "tokens").attrs["crc32"] = np.uint32(crc)
            for name, value in origin(group, fingerprint).items():
                file.attrs[name] = value
        sync_file(temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _as_numpy(tokens: Any) -> np.ndarray:
    name = str(tokens.dtype)
    return (tokens if name in ("torch.float16", "torch.float32") else tokens.float()).cpu().numpy()


def _cameras(group: h5py.Group) -> list[str]:
    """Names of the pictures of an episode, in the order that samplers stack them."""
    return sorted(key for key in map(str, get_group(group, "observations")) if key.split("_")[0] == "image")


def origin(group: h5py.Group, fingerprint: str) -> dict[str, Any]:
    """What features belong to: an encoder, a sentence, and pictures, known by their checksums."""
    pictures = [get_dataset(group, f"observations/{key}") for key in _cameras(group)]
    sums = [int(picture.attrs.get("crc32", 0)) for picture in pictures]
    shapes = [list(image_shape(picture)) for picture in pictures]
    return {"fingerprint": fingerprint, "instruction": str(group.attrs["instruction"]), "pictures": f"{sums} {shapes}"}


def _matches(target: Path, group: h5py.Group, fingerprint: str) -> bool:
    """Whether there is a whole file of features, of this encoder and of this very episode."""
    expected = origin(group, fingerprint)
    try:
        with h5py.File(target, "r") as file:
            check_words(file, {})
            return all(file.attrs.get(name) == value for name, value in expected.items())
    except (OSError, ValueError):
        return False


def _target(store: EpisodeStore, index: int, fingerprint: str) -> Path:
    """Where the features of an episode lie, in the store that holds its file."""
    if not re.fullmatch(r"[-.\w]{1,100}", fingerprint) or not fingerprint.strip("."):
        raise ValueError(f"{fingerprint!r} is no fingerprint that could name a folder; expected letters and digits")
    path, number = store.locate(index)
    return path.parents[1] / "features" / fingerprint / f"{number:06d}.hdf5"


def _roots(store: EpisodeStore) -> list[Path]:
    """The store itself, or the stores with episodes in it that are read as one."""
    return sorted({store.locate(index)[0].parents[2] for index in range(len(store))})


def _folders(store: EpisodeStore) -> list[Path]:
    features = [root / "data" / "features" for root in _roots(store)]
    return sorted(path for folder in features if folder.is_dir() for path in folder.iterdir() if path.is_dir())


def _drop(store: EpisodeStore, *, keep: str) -> None:
    for folder in _folders(store):
        if folder.name != keep and not folder.is_symlink():
            shutil.rmtree(folder)
