"""How a batch becomes features at the least cost: what stays frozen is computed once per row and kept."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vla_rl.data.reencoding import read_features
from vla_rl.data.sampler import BalancedSampler, Batch
from vla_rl.encoders.features import Features
from vla_rl.encoders.hidden import moved_away
from vla_rl.encoders.lower import vision_away, why_no_lower_cache
from vla_rl.encoders.vlm import FrozenVLMEncoder
from vla_rl.policy import VLAPolicy

Scope = Literal["head", "lora", "text", "all"]


class SupervisedError(RuntimeError):
    """Supervised learning that must not go on."""


class FeatureSource(Protocol):
    """Turns batches into features."""

    def __call__(self, batch: Batch, shifts: Tensor | None = None) -> Features:
        """Features of a batch, of its images shifted where they are read from images.

        Args:
            batch: B steps.
            shifts: from `draw_shifts`, [2, B]; None for none.
        """
        ...


class RowCache:
    """Frozen tensors by row, computed at first use, in RAM or in a file mapped to memory.

    Args:
        sampler: its row ids are the keys.
        compute: batch -> tensor [B, ...] on the CPU.
        rows_at_once: most rows per call of `compute`.
        directory: where to keep them in a file, which vanishes with the cache; None for RAM.
    """

    def __init__(
        self,
        sampler: BalancedSampler,
        compute: Callable[[Batch], Tensor],
        *,
        rows_at_once: int = 256,
        directory: str | Path | None = None,
    ):
        self.sampler, self.compute = sampler, compute
        self.rows_at_once, self.directory = rows_at_once, directory
        self.known = np.zeros(sampler.num_rows, dtype=bool)
        self.values: Tensor | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The tensors of a batch, [B, ...]."""
        self.need(batch.row_id)
        assert self.values is not None
        return self.values[torch.as_tensor(batch.row_id)]

    def need(self, ids: np.ndarray) -> None:
        """Compute what a batch of these rows would."""
        self._compute(np.unique(ids[~self.known[ids]]))

    def fill(self) -> None:
        """Compute every row that is missing."""
        self._compute(np.flatnonzero(~self.known))

    @property
    def num_bytes(self) -> int:
        """Size of the cache, for all rows."""
        return 0 if self.values is None else self.values.numel() * self.values.element_size()

    def _compute(self, missing: np.ndarray) -> None:
        for start in range(0, len(missing), self.rows_at_once):
            ids = missing[start : start + self.rows_at_once]
            values = self.compute(self.sampler.rows(ids))
            if self.values is None:
                self.values = self._allocate((self.sampler.num_rows, *values.shape[1:]), values.dtype)
            self.values[torch.as_tensor(ids)] = values
            self.known[ids] = True

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.directory is None:
            return torch.empty(shape, dtype=dtype)
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.directory) as file:  # it lives on without a name while it is mapped
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def random_shift(images: Tensor, pixels: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Shift each image [B, H, W, 3] by up to `pixels` each way, repeating its edge (DrQ, arXiv 2004.13649)."""
    if pixels == 0:
        return images
    return shifted(images, draw_shifts(len(images), pixels, generator=generator))


def draw_shifts(count: int, pixels: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Shifts down and right of `count` images, int64 [2, count], each up to `pixels` either way."""
    return torch.randint(-pixels, pixels + 1, (2, count), generator=generator)


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Images [B, H, W, 3] shifted by [2, B] pixels, their edges repeated."""
    batch, height, width = images.shape[:3]
    rows = (torch.arange(height) + shifts[0][:, None]).clamp(0, height - 1)
    cols = (torch.arange(width) + shifts[1][:, None]).clamp(0, width - 1)
    return images[torch.arange(batch)[:, None, None], rows[:, :, None], cols[:, None, :]]


def feature_source(
    policy: VLAPolicy,
    sampler: BalancedSampler,
    *,
    scope: Scope,
    rows_at_once: int = 256,
    directory: str | Path | None = None,
) -> FeatureSource:
    """How a batch becomes features at the least cost that the scope allows.

    "head": features once per row. "lora": hidden states below the adapter once per row, where it sits on the top layers
    only and the model lets them be cached (else a warning says why not); vision tokens once per row, where the model
    takes them. Else: images, with the shifts that come with the batch.

    Args:
        policy: its encoder makes the features.
        sampler: where the batches come from.
        scope: what learns.
        rows_at_once: most rows per forward that fills a cache.
        directory: where to keep caches in files; None for RAM.
    """
    encoder = policy.encoder
    if scope == "head":
        return CachedFeatures(policy, sampler, rows_at_once=rows_at_once, directory=directory)
    if scope == "lora" and isinstance(encoder, FrozenVLMEncoder) and encoder.frozen_layers:
        probe = sampler.rows(np.arange(min(2, sampler.num_rows)))
        reason = why_no_lower_cache(encoder, probe.images, probe.instructions)
        if reason is None:
            return CachedLower(policy, sampler, rows_at_once=rows_at_once, directory=directory)
        warnings.warn(f"hidden states below the adapter are computed for every batch: {reason}", stacklevel=2)
    if scope == "lora" and encoder.supports_vision_cache:
        return CachedVision(policy, sampler, rows_at_once=rows_at_once, directory=directory)
    return WholeModel(policy)


class WholeModel:
    """Features of images, with gradients to whatever is open."""

    def __init__(self, policy: VLAPolicy):
        self.encoder = policy.encoder

    def __call__(self, batch: Batch, shifts: Tensor | None = None) -> Features:
        """Features of a batch; several views of one step are not shifted."""
        images = torch.as_tensor(batch.images)
        if shifts is not None and images.ndim == 4:
            images = shifted(images, shifts.cpu())  # what goes into a distributed module's forward lands on its GPU
        return self.encoder.forward(images, batch.instructions)


class CachedVision:
    """Features through the text backbone, from vision tokens computed once per row."""

    def __init__(
        self,
        policy: VLAPolicy,
        sampler: BalancedSampler,
        *,
        rows_at_once: int = 256,
        directory: str | Path | None = None,
    ):
        self.encoder = cast(FrozenVLMEncoder, policy.encoder)
        self.rows = RowCache(sampler, self._compute, rows_at_once=rows_at_once, directory=directory)

    def _compute(self, batch: Batch) -> Tensor:
        return self.encoder.encode_vision(batch.images).cpu()

    def __call__(self, batch: Batch, shifts: Tensor | None = None) -> Features:
        """Features of a batch, with gradients to the adapter."""
        return self.encoder.forward(None, batch.instructions, vision=self.rows(batch))

    def offloaded(self) -> AbstractContextManager[None]:
        """Fill the cache; inside, the vision tower lies on the CPU."""
        self.rows.fill()
        return vision_away(self.encoder)


class CachedLower:
    """Features through the adapted top layers, from the hidden states below them, computed once per row.

    They are kept in the precision that they arise in. Gradients are bit-equal to those of the images where both are
    computed in batches of the same rows; else they differ by the rounding of matrix products of other shapes.
    """

    def __init__(
        self,
        policy: VLAPolicy,
        sampler: BalancedSampler,
        *,
        rows_at_once: int = 256,
        directory: str | Path | None = None,
    ):
        self.encoder = cast(FrozenVLMEncoder, policy.encoder)
        self.length = self.encoder.prompt_length(sampler.instructions, sampler.rows(np.array([0])).images)
        self.rows = RowCache(sampler, self._compute, rows_at_once=rows_at_once, directory=directory)

    def _compute(self, batch: Batch) -> Tensor:
        hidden = self.encoder.encode_lower(batch.images, batch.instructions).cpu()
        return F.pad(hidden, (0, 0, 0, self.length - hidden.shape[-2]))

    def __call__(self, batch: Batch, shifts: Tensor | None = None) -> Features:
        """Features of a batch, with gradients to the adapter."""
        return self.encoder.forward(None, batch.instructions, lower=self.rows(batch))

    def offloaded(self) -> AbstractContextManager[None]:
        """Fill the cache; inside, the vision tower and the layers below the adapter lie on the CPU."""
        self.rows.fill()
        return vision_away(self.encoder, lower=True)


class CachedFeatures:
    """Features of a frozen encoder by row: read from the stores that hold them, else one forward of the VLM per row.

    Attributes:
        num_read: rows whose features a store held (`vla-rl data re-encode`) under this encoder's fingerprint.
        num_computed: rows that went through the VLM.

    Raises:
        SupervisedError: on use, if the encoder has changed since.
    """

    def __init__(
        self,
        policy: VLAPolicy,
        sampler: BalancedSampler,
        *,
        rows_at_once: int = 256,
        directory: str | Path | None = None,
    ):
        self.encoder, self.device, self.sampler = policy.encoder, policy.device, sampler
        self.fingerprint = policy.encoder.fingerprint
        first = sampler.rows(np.array([0])).images
        views = first.shape[1] if first.ndim == 5 and self.encoder.views == "separate" else 1
        self.length = views * self.encoder.prompt_length(sampler.instructions, first)
        self.rows = RowCache(sampler, self._compute, rows_at_once=rows_at_once, directory=directory)
        self.num_read = self.num_computed = 0

    def _compute(self, batch: Batch) -> Tensor:
        packed = torch.zeros(len(batch), self.length, self.encoder.feature_dim + 1, dtype=self.encoder.feature_dtype)
        missing = np.flatnonzero(~self._read(batch, packed))
        if len(missing):
            features = self.encoder.encode(batch.images[missing], [batch.instructions[row] for row in missing])
            _pack(packed, torch.as_tensor(missing), features.tokens.cpu(), features.mask.cpu())
        self.num_computed += len(missing)
        self.num_read += len(batch) - len(missing)
        return packed

    def _read(self, batch: Batch, packed: Tensor) -> np.ndarray:
        """Put what the stores hold into `packed`; which rows these are, bool [B]."""
        found = np.zeros(len(batch), dtype=bool)
        for store, episode in {*zip(batch.store_index.tolist(), batch.episode_index.tolist(), strict=True)}:
            rows = np.flatnonzero((batch.store_index == store) & (batch.episode_index == episode))
            steps = batch.step_index[rows]
            stored = read_features(self.sampler.stores[store], episode, self.fingerprint, steps=steps)
            if stored is None or stored[0].shape[1] > self.length:
                continue
            _pack(packed, torch.as_tensor(rows), torch.as_tensor(stored[0]), torch.as_tensor(stored[1]))
            found[rows] = True
        return found

    def __call__(self, batch: Batch, shifts: Tensor | None = None) -> Features:
        """Features of a batch."""
        if self.encoder.fingerprint != self.fingerprint:
            raise SupervisedError(
                f"cached features are of encoder {self.fingerprint}, the encoder is now {self.encoder.fingerprint}; "
                "make a new cache"
            )
        packed = self.rows(batch).to(self.device)
        return Features(packed[..., :-1], packed[..., -1] > 0.5, self.fingerprint)

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        """Fill the cache; inside, the whole VLM lies on the CPU."""
        self.rows.fill()
        with moved_away([getattr(self.encoder, "model", self.encoder)], torch.device("cpu")):
            yield


def _pack(packed: Tensor, rows: Tensor, tokens: Tensor, mask: Tensor) -> None:
    """Write tokens [N, M, D] and mask [N, M] into the rows of `packed`, the mask behind the last channel."""
    packed[rows, : tokens.shape[1], :-1] = tokens.to(packed.dtype)
    packed[rows, : tokens.shape[1], -1] = mask.to(packed.dtype)
