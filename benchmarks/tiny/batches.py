"""From shards to batches of token ids: which picture and which of its texts, padded and labelled."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from shards import Shard, load, saved
from texts import Kind, Pair
from torch import Tensor

WEIGHTS: dict[Kind, float] = {
    "instruction": 0.25,
    "where": 0.2,
    "colour": 0.15,
    "state": 0.15,
    "what": 0.1,
    "caption": 0.05,
    "relation": 0.05,
    "presence": 0.05,
}
"""How often a picture is shown with a text of each kind."""

WINDOW = 4
"""Shards that are mixed with each other at a time."""


@dataclass
class Batch:
    """What one step learns from.

    Attributes:
        frames: uint8 [B, H, W, 3].
        ids: int64 [B, T]: image tokens, prompt, answer, padding.
        mask: int64 [B, T], 1 where a token is real.
        answer: bool [B, T], True on the answer's tokens, the end included.
        caption_ids, caption_mask: int64 [B, C]: a caption of each picture, without image tokens.
        place: float32 [B, 2] column and row that the text is about, NaN where there is none.
        gripper: float32 [B, 2] column and row of the finger tips, NaN where they cannot be seen.
        cells: int64 [B, 2, CELLS, CELLS], as in ``scenes.Sample``.
    """

    frames: Tensor
    ids: Tensor
    mask: Tensor
    answer: Tensor
    caption_ids: Tensor
    caption_mask: Tensor
    place: Tensor
    gripper: Tensor
    cells: Tensor

    def to(self, device: str) -> Batch:
        """A copy on ``device``."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in self.__dict__.items()})


class Collator:
    """Builds batches with the ids that the model's processor would give.

    Args:
        processor: a PaliGemma processor.
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = processor.tokenizer
        count = processor.image_processor.image_seq_length
        self.pad = int(tokenizer.pad_token_id)
        self._head = [processor.image_token_id] * count + [tokenizer.bos_token_id]
        self._end = int(tokenizer.eos_token_id)
        self.decode = tokenizer.decode
        self._ids = functools.lru_cache(maxsize=200_000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )

    def __call__(self, shard: Shard, index: NDArray[np.int64], pairs: Sequence[Pair], captions: Sequence[str]) -> Batch:
        """A batch of the pictures ``index`` [B] of a shard, with a text and a caption each."""
        rows, starts = [], []
        for pair in pairs:
            prompt = [*self._head, *self._ids(pair.prompt + "\n")]
            starts.append(len(prompt))
            rows.append([*prompt, *self._ids(pair.answer), self._end])
        ids, mask = self._padded(rows)
        positions = torch.arange(ids.shape[1])
        answer = (positions >= torch.tensor(starts)[:, None]) & mask.bool()
        caption_ids, caption_mask = self._padded([self._ids(caption) for caption in captions])
        nowhere = (float("nan"),) * 2
        return Batch(
            frames=torch.from_numpy(shard.images[index]),
            ids=ids,
            mask=mask,
            answer=answer,
            caption_ids=caption_ids,
            caption_mask=caption_mask,
            place=torch.tensor([pair.place or nowhere for pair in pairs], dtype=torch.float32),
            gripper=torch.from_numpy(gripper_places(shard)[index]),
            cells=torch.from_numpy(shard.cells[index].astype(np.int64)),
        )

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids, mask

    def choose(self, shard: Shard, index: NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """A batch of some rows of a shard, each with one of its texts by ``WEIGHTS``."""
        pairs, captions = [], []
        for row in index:
            options = shard.pairs[row]
            weights = np.array([WEIGHTS[pair.kind] for pair in options])
            pairs.append(options[int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum()))])
            captions.append(next(pair.answer for pair in options if pair.kind == "caption"))
        return self(shard, index, pairs, captions)


def gripper_places(shard: Shard) -> NDArray[np.float32]:
    """Column and row of the finger tips, float32 [N, 2]; NaN where they cannot be seen."""
    places = np.stack([shard.truth("gripper_column"), shard.truth("gripper_row")], axis=1)
    return np.where(shard.truth("gripper_visible")[:, None] > 0, places, np.nan)


class Stream:
    """Endless batches from a directory of shards, the one at step k a function of the seed, k and the directory.

    Shards may be added and removed while it runs.

    Args:
        directory: where the shards are.
        collator: builds the batches.
        batch_size: rows of a batch.
        seed: of the order.
        cached: shards kept in memory.
    """

    def __init__(self, directory: Path, collator: Collator, *, batch_size: int, seed: int, cached: int = 128) -> None:
        self.directory, self.collator, self.batch_size, self.seed = directory, collator, batch_size, seed
        self._load = functools.lru_cache(maxsize=cached)(load)
        self._reader = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[Shard]]] | None = None
        self._window: tuple[int, list[Shard]] = (-1, [])
        paths = saved(directory)
        if not paths:
            raise FileNotFoundError(f"no shards in {directory}; write some with benchmarks/tiny/generate.py")
        self._steps = max(1, min(WINDOW, len(paths)) * len(self._load(paths[0])) // batch_size)

    def batch(self, step: int) -> Batch:
        """The batch of step ``step``."""
        window, place = divmod(step, self._steps)
        shards = self._shards(window)
        sizes = np.cumsum([0, *map(len, shards)])
        order = np.random.default_rng([self.seed, window, 1]).permutation(sizes[-1])
        rng = np.random.default_rng([self.seed, step, 2])
        chosen = np.sort(order[place * self.batch_size : (place + 1) * self.batch_size])
        parts = [
            (shard, chosen[(chosen >= low) & (chosen < high)] - low)
            for shard, low, high in zip(shards, sizes[:-1], sizes[1:], strict=True)
        ]
        return self.collator.choose(_subset(parts), np.arange(len(chosen)), rng)

    def _shards(self, window: int) -> list[Shard]:
        if self._window[0] != window:
            if self._next is not None and self._next[0] == window:
                self._window = (window, self._next[1].result())
            else:
                self._window = (window, self._read(window))
            self._next = (window + 1, self._reader.submit(self._read, window + 1))
        return self._window[1]

    def _read(self, window: int) -> list[Shard]:
        for attempt in range(5):
            paths = saved(self.directory)
            rng = np.random.default_rng([self.seed, window, attempt])
            try:
                return [self._load(paths[i]) for i in rng.permutation(len(paths))[:WINDOW]]
            except FileNotFoundError:
                continue
        raise FileNotFoundError(f"shards in {self.directory} vanish while they are read; keep more of them")


def _subset(parts: list[tuple[Shard, NDArray[np.int64]]]) -> Shard:
    return Shard(
        np.concatenate([shard.images[index] for shard, index in parts]),
        [shard.pairs[row] for shard, index in parts for row in index],
        np.concatenate([shard.truths[index] for shard, index in parts]),
        np.concatenate([shard.cells[index] for shard, index in parts]),
    )
