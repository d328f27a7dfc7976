"""The contract of an encoder that is no `FrozenVLMEncoder`, and how anyone's is saved and loaded."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.encoders.checkpoint import DTYPES, FILE_NAME, Views, make_empty
from vla_rl.encoders.features import Features
from vla_rl.encoders.fingerprint import update_digest
from vla_rl.importing import import_path
from vla_rl.saved_files import RESTORE, read_object, read_tensors, write_tensors
from vla_rl.saved_modules import SavedModule

WEIGHTS = "encoder.safetensors"
_TYPES = ("feature_dtype", "compute_dtype")


def require_rows(tokens: Tensor, count: int, whose: str) -> None:
    """Refuse tokens that are not [B, M, D] for B observations.

    Raises:
        ValueError: they are not.
    """
    if tokens.ndim != 3 or len(tokens) != count:
        raise ValueError(
            f"{whose} gave tokens {list(tokens.shape)} for {count} observations, expected [{count}, M, D]; put the "
            "observations first"
        )


def require_finite(features: Features, whose: str) -> None:
    """Refuse tokens that are not finite in the type that they are stored in.

    Raises:
        FloatingPointError: one is not.
    """
    if not (torch.isfinite(features.tokens).all(-1) | ~features.mask).all():
        raise FloatingPointError(
            f"some tokens of {whose} are not finite in {features.tokens.dtype}; set its feature_dtype to "
            "torch.bfloat16 or torch.float32"
        )


class Encoder(nn.Module):
    """Turns frames and instructions into features. A subclass gives `tokens`, `config` and `feature_dim`.

    It stays frozen, and in eval mode: stages 0 and 2 run with `scope="head"`, unless a subclass overrides `trainable`,
    a context manager that gives the weights that learn. An encoder from
    any package plugs in by its import path: its constructor must accept `config()` back, and its `state_dict` holds
    what it has learned. Loading imports that path from Python's own path; nothing in a saved directory is run.

    Attributes:
        feature_dim: width D of a token.
        num_forwards: calls of `encode` so far.
        num_frames: frames encoded so far, each view counted.
        feature_dtype: type in which `encode` stores tokens.
        compute_dtype: type of the matrix products of what learns on top.
    """

    feature_dim: int
    num_forwards = 0
    num_frames = 0
    feature_dtype: torch.dtype = torch.float16
    compute_dtype: torch.dtype = torch.float32
    image_size: tuple[int, int] | None = None
    views: Views = "joint"
    lora: Any = None
    supports_vision_cache = False
    _known: tuple[Any, str] | None = None

    def config(self) -> dict[str, Any]:
        """JSON-serialisable keyword arguments that rebuild this encoder."""
        raise NotImplementedError(f"{type(self).__name__} must define config()")

    def tokens(self, images: Tensor, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens `[B, M, D]` and their mask, bool `[B, M]`, of frames uint8 `[B, H, W, 3]` or `[B, N, H, W, 3]`.

        M depends on the instructions and the images' shape, and not on what they show.
        """
        raise NotImplementedError(f"{type(self).__name__} must define tokens()")

    @torch.no_grad()
    def encode(self, images: np.ndarray | Tensor, instructions: Sequence[str]) -> Features:
        """Features of frames uint8 `[B, H, W, 3]`, or `[B, N, H, W, 3]` of N views, and of B instructions.

        Raises:
            FloatingPointError: a token does not fit `feature_dtype`.
            ValueError: `tokens` gave another number of rows than there are observations.
        """
        self.eval()
        given = torch.as_tensor(images, device=self.device)
        features = self._features(given, instructions).to(dtype=self.feature_dtype)
        require_finite(features, type(self).__name__)
        self.num_forwards += 1
        self.num_frames += given.shape[:-3].numel()
        self.image_size = (given.shape[-3], given.shape[-2])
        return features

    def forward(self, images: np.ndarray | Tensor, instructions: Sequence[str]) -> Features:
        """The same in float32, with gradients to what a subclass's `trainable` has opened.

        Raises:
            ValueError: `tokens` gave another number of rows than there are observations.
        """
        return self._features(torch.as_tensor(images, device=self.device), instructions)

    def _features(self, images: Tensor, instructions: Sequence[str]) -> Features:
        tokens, mask = self.tokens(images, instructions)
        require_rows(tokens, len(images), type(self).__name__)
        return Features(tokens.float(), mask.bool(), self.fingerprint)

    def prompt_length(self, instructions: Sequence[str], images: np.ndarray | Tensor) -> int:
        """Most tokens M of any of these instructions, by encoding each with the first image."""
        return max(self.encode(images[:1], [text]).tokens.shape[1] for text in instructions)

    def trainable(self, scope: str = "lora", *, checkpointing: bool = False) -> Any:
        """Refuse: what opens weights is a subclass's own.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} opens no weights for scope={scope!r}; use scope='head', or override trainable()"
        )

    def add_lora(self, settings: Any) -> None:
        """Refuse, as `trainable` does."""
        self.trainable("lora")

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next((value.device for value in self.state_dict().values()), torch.device("cpu"))

    @property
    def fingerprint(self) -> str:
        """Identity of the features: hash of class, `config` and weights, anew whenever a weight was written to."""
        state = self.state_dict()
        # Fused optimizers count no version; but weights are open while they learn, and closed afterwards.
        version = (
            *((name, value.data_ptr(), value._version) for name, value in state.items()),
            *(parameter.requires_grad for parameter in self.parameters()),
        )
        if self._known is None or self._known[0] != version:
            digest = hashlib.blake2b(import_path(type(self)).encode(), digest_size=8)
            digest.update(json.dumps(self.config(), sort_keys=True).encode())
            for name, value in sorted(state.items()):
                update_digest(digest, name, value)
            self._known = (version, digest.hexdigest())
        return self._known[1]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write import path, `config`, types and weights to `directory` (JSON and safetensors).

        Raises:
            FileExistsError: the directory is not empty.
        """
        directory = make_empty(directory)
        write_tensors(self.state_dict(), directory / WEIGHTS)
        saved = {"class": import_path(type(self)), "kwargs": self.config(), "fingerprint": self.fingerprint}
        saved |= {name: str(getattr(self, name)).removeprefix("torch.") for name in _TYPES}
        (directory / FILE_NAME).write_text(json.dumps(saved, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Encoder:
        """Load an encoder that `save_pretrained` wrote, of this class or a subclass.

        Args:
            directory: written by `save_pretrained`.
            device: where it runs.
            dtype: sets `compute_dtype`; None leaves it as saved.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or names no encoder that can be imported and built.
        """
        path = Path(directory) / FILE_NAME
        saved = SavedModule.from_json(read_object(path), cls, where=str(path))
        shapes = {name: tuple(value.shape) for name, value in saved.sketch().state_dict().items()}
        weights = read_tensors(Path(directory) / WEIGHTS, shapes)
        encoder = saved.build()
        encoder.load_state_dict(weights)
        encoder.requires_grad_(False).eval()
        for name in _TYPES:
            if (given := saved.unknown_fields.get(name)) is not None:
                if given not in DTYPES:
                    raise ValueError(f"{path} gives {name}={given!r}, expected one of {', '.join(DTYPES)}; {RESTORE}")
                setattr(encoder, name, getattr(torch, given))
        if dtype is not None:
            encoder.compute_dtype = dtype
        if saved.unknown_fields.get("fingerprint") not in (None, encoder.fingerprint):
            warnings.warn(
                f"the encoder in {directory} was saved as {saved.unknown_fields['fingerprint']} and is now "
                f"{encoder.fingerprint}; heads and cached features may not fit",
                stacklevel=2,
            )
        return encoder.to(device)


def load_encoder(directory: str | Path, **kwargs: Any) -> Encoder:
    """The encoder in a directory: a `FrozenVLMEncoder`, or what the import path in `encoder.json` says.

    Args:
        directory: written by an encoder's `save_pretrained`.
        kwargs: of its class's `from_pretrained`.

    Raises:
        ValueError: a file is damaged, or names no encoder that can be imported and built.
    """
    path = Path(directory) / FILE_NAME
    values = read_object(path)
    if "class" not in values:
        from vla_rl.encoders.vlm import FrozenVLMEncoder

        return FrozenVLMEncoder.from_pretrained(str(directory), **kwargs)
    return SavedModule.from_json(values, Encoder, where=str(path)).cls.from_pretrained(directory, **kwargs)
