"""The value that passes from an encoder to a head: a padded batch of tokens with its mask and its origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Features:
    """Encoder tokens for a batch of observations.

    Attributes:
        tokens: `[B, M, D]` floating point tokens.
        mask: `[B, M]` bool, True where a token is real and False where it is padding.
        fingerprint: Identity of the encoder that made them; features of two encoders never mix.
    """

    tokens: Tensor
    mask: Tensor
    fingerprint: str

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.mask.dtype != torch.bool or self.mask.shape != self.tokens.shape[:2]:
            raise ValueError(
                f"features need tokens [B, M, D] and a bool mask [B, M], got {tuple(self.tokens.shape)} and "
                f"{self.mask.dtype} {tuple(self.mask.shape)}; pass the encoder's output unchanged"
            )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: Any) -> Features:
        """Select rows: an int keeps the batch dimension, anything else indexes it as torch does."""
        if isinstance(index, int):
            index = range(len(self))[index]
            index = slice(index, index + 1)
        return replace(self, tokens=self.tokens[index], mask=self.mask[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Features:
        """Move tokens and mask to `device`, and tokens to `dtype`."""
        return replace(self, tokens=self.tokens.to(device=device, dtype=dtype), mask=self.mask.to(device=device))

    @classmethod
    def cat(cls, features: Sequence[Features]) -> Features:
        """Concatenate along the batch, padding the token dimension to the longest.

        Raises:
            ValueError: If the list is empty or the fingerprints differ.
        """
        if not features:
            raise ValueError("Features.cat got an empty list; pass at least one batch")
        fingerprints = {part.fingerprint for part in features}
        if len(fingerprints) > 1:
            raise ValueError(
                f"features of different encoders cannot be mixed, got fingerprints {sorted(fingerprints)}; "
                "encode all observations again with the same encoder"
            )
        longest = max(part.tokens.shape[1] for part in features)
        tokens = [F.pad(part.tokens, (0, 0, 0, longest - part.tokens.shape[1])) for part in features]
        masks = [F.pad(part.mask, (0, longest - part.mask.shape[1]), value=False) for part in features]
        return cls(tokens=torch.cat(tokens), mask=torch.cat(masks), fingerprint=features[0].fingerprint)
