"""Samples on disk: shards of pictures, texts and truths, each a pure function of a seed and its number."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from colours import NAMES
from numpy.typing import NDArray
from scenes import Sample, SceneSampler
from texts import KINDS, Pair, write_pairs
from worlds import ALL_TASKS

SESSION = 16
"""Pictures that share a scene and its textures."""

TRUTHS: tuple[str, ...] = (
    *("gripper_column", "gripper_row", "gripper_visible", "gripper_x", "gripper_y", "gripper_z", "gripper_opening"),
    *("target_column", "target_row", "target_visible", "target_x", "target_y", "target_z", "target_fraction"),
    *("target_colour", "task", "own_style", "camera"),
)
"""Columns of a shard's truths; colour is an index into ``colours.NAMES``, task one into ``worlds.ALL_TASKS``; camera is
0 for the environment's own, 1 near it, 2 far from it; what is not known is NaN."""


@dataclass(frozen=True)
class Shard:
    """Samples in memory.

    Attributes:
        images: uint8 [N, H, W, 3].
        pairs: texts of each picture.
        truths: float32 [N, len(TRUTHS)].
        cells: uint8 [N, 2, CELLS, CELLS], as in ``scenes.Sample``.
    """

    images: NDArray[np.uint8]
    pairs: list[list[Pair]]
    truths: NDArray[np.float32]
    cells: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    def truth(self, name: str) -> NDArray[np.float32]:
        """One column of the truths, float32 [N]."""
        return self.truths[:, TRUTHS.index(name)]


def truth_row(sample: Sample) -> list[float]:
    """The truths of a sample, in the order of ``TRUTHS``."""
    hand = sample.gripper
    target = next(thing for thing in sample.things if thing.name == sample.target)
    nan = float("nan")
    return [
        *(
            *hand.centre,
            float(hand.visible and hand.point is not None),
            *hand.xyz,
            nan if hand.fraction is None else hand.fraction,
        ),
        *(*target.centre, float(target.visible), *target.xyz, nan if target.fraction is None else target.fraction),
        nan if target.colour is None else float(NAMES.index(target.colour)),
        float(ALL_TASKS.index(sample.task)),
        float(sample.style == "own"),
        float(("own", "near", "far").index(sample.camera)),
    ]


def make_shard(sampler: SceneSampler, *, seed: int, number: int, count: int) -> Shard:
    """Shard ``number`` of the data set of ``seed``: ``count`` pictures, a multiple of ``SESSION``."""
    rng = np.random.default_rng([seed, number])
    return shard_of([sample for _ in range(count // SESSION) for sample in sampler.session(rng, SESSION)], rng)


def shard_of(samples: list[Sample], rng: np.random.Generator) -> Shard:
    """A shard of samples, with texts by ``rng``."""
    return Shard(
        images=np.stack([sample.image for sample in samples]),
        pairs=[write_pairs(sample, rng) for sample in samples],
        truths=np.array([truth_row(sample) for sample in samples], dtype=np.float32),
        cells=np.stack([sample.cells for sample in samples]),
    )


def shard_path(directory: Path, number: int) -> Path:
    """Where shard ``number`` lies."""
    return directory / f"shard-{number:06d}.npz"


def save(shard: Shard, path: Path) -> None:
    """Write a shard, all or nothing."""
    pairs = [[(KINDS.index(p.kind), p.prompt, p.answer, p.place) for p in row] for row in shard.pairs]
    texts = np.frombuffer(json.dumps(pairs, separators=(",", ":")).encode(), dtype=np.uint8)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, images=shard.images, texts=texts, truths=shard.truths, cells=shard.cells)
    os.replace(temporary, path)


def load(path: Path) -> Shard:
    """Read a shard."""
    with np.load(path) as arrays:
        rows = json.loads(arrays["texts"].tobytes())
        images, truths, cells = arrays["images"], arrays["truths"], arrays["cells"]
    pairs = [
        [
            Pair(KINDS[kind], prompt, answer, None if place is None else (place[0], place[1]))
            for kind, prompt, answer, place in row
        ]
        for row in rows
    ]
    return Shard(images, pairs, truths, cells)


def saved(directory: Path) -> list[Path]:
    """The shards in a directory, in order."""
    return sorted(directory.glob("shard-*.npz"))
