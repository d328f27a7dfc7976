"""The identity of an encoder: a short hash of all that decides its features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PROBE = "pick up the red block & open drawer 7"


def update_digest(digest: Any, name: str, value: Tensor) -> None:
    """Add a tensor's name, shape, type and bytes to a hash."""
    digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def encoder_fingerprint(
    model: nn.Module,
    *,
    process: Callable[[np.ndarray, str], dict[str, Tensor]],
    vocabulary: Mapping[str, int],
    settings: Mapping[str, Any],
) -> str:
    """Hash of weights (adapter included), preprocessing, vocabulary and settings: 16 hexadecimal digits.

    Preprocessing enters by what it does: the processor's output for an instruction and fixed frames, of which one is
    of a size that every model resizes.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        update_digest(digest, name, value)
    for size in ((64, 64, 3), (80, 96, 3)):
        frame = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        for name, value in sorted(process(frame, _PROBE).items()):
            if isinstance(value, Tensor):
                update_digest(digest, name, value)
    digest.update(json.dumps(sorted(vocabulary.items())).encode())
    digest.update(json.dumps(dict(settings), sort_keys=True, default=str).encode())
    return digest.hexdigest()
