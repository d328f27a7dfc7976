"""The frozen vision-language encoder: frames and instructions to tokens, with its weights opened only on request."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.encoders import loading
from vla_rl.encoders import lora as adapters
from vla_rl.encoders.checkpoint import EncoderSettings, make_empty
from vla_rl.encoders.features import Features
from vla_rl.encoders.fingerprint import encoder_fingerprint
from vla_rl.encoders.hidden import hidden_states
from vla_rl.encoders.lora import LoRASettings
from vla_rl.encoders.packaged import PACKAGED, packaged_path
from vla_rl.encoders.pixels import PixelPipeline, Size
from vla_rl.encoders.prompts import PromptInputs
from vla_rl.encoders.vision import VisionPath
from vla_rl.encoders.weights import half_weights, used_parameters, zero_dropout

Scope = Literal["lora", "text", "all"]


class FrozenVLMEncoder(nn.Module):
    """A Hugging Face vision-language model as an encoder: its text backbone's hidden states are the features.

    All weights are frozen, every dropout is zero and the model stays in eval mode; `trainable` opens weights for
    supervised learning. A half-precision `dtype` means mixed precision: linear layers multiply in it, everything else
    stays float32, in `encode` and `forward` alike.

    Args:
        model: A float32 image-text-to-text model; it becomes part of the encoder and is frozen in place.
        processor: Its processor; padding is set to the right.
        dtype: Type of the matrix products, torch.float32 or torch.bfloat16.
        prompt: Format string with the field `{instruction}`.
        layer: Which entry of the text backbone's `hidden_states` to use; -1 is the last, after the final norm.
        source: Directory or hub id that the unchanged weights came from; None saves them in full.
        revision: Revision of `source`.
        trust_remote_code: Whether `source` runs code of its own.

    Attributes:
        feature_dim: Width D of a token.
        lora: Settings of the adapter, or None.
        num_forwards: Calls of the model so far.
        num_frames: Frames encoded so far, each view counted.
        feature_dtype: Type in which `encode` stores tokens.
        supports_vision_cache: Whether `encode_vision` works.
        image_size: (H, W) of the last frames seen; vision tokens passed without frames belong to this size.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        dtype: torch.dtype = torch.float32,
        prompt: str = "{instruction}",
        layer: int = -1,
        source: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.compute_dtype = dtype
        self.feature_dtype = torch.float16
        self.prompt = prompt
        self.layer = layer
        self.source = source
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.image_size: Size | None = None
        self.num_forwards = 0
        self.num_frames = 0
        self.lora: LoRASettings | None = None
        self._open = False
        self._base_changed = False
        self._fingerprint: str | None = None

        zero_dropout(model)
        self._vision = VisionPath(model)
        self.supports_vision_cache = self._vision.supported
        self._prompts = PromptInputs(
            processor,
            image_token_id=loading.image_token_id(model.config),
            prompt=prompt,
            accepted=frozenset(inspect.signature(model.forward).parameters),
        )
        reference = functools.partial(self._prompts.process, instruction="go")
        self._pixels = PixelPipeline(processor.image_processor, reference)
        backbone = loading.text_backbone(model)
        self.feature_dim: int = getattr(backbone.config, "hidden_size", None) or backbone.config.d_model
        if layer != -1 and not 0 <= layer < (count := len(loading.text_layers(backbone))):
            raise ValueError(f"layer={layer}, expected -1 (last) or 0 to {count - 1} (the input of that layer)")
        self._freeze()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        lora: LoRASettings | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        prompt: str | None = None,
        layer: int | None = None,
    ) -> FrozenVLMEncoder:
        """Load an encoder from a directory written by `save_pretrained`, a model directory, a hub id, or "tiny".

        Args:
            name_or_path: Directory, hub id, or the name of an encoder that comes with the package.
            lora: Adapter to add, fresh; None adds none (a saved one is loaded all the same).
            device: Where the model runs.
            dtype: Type of the matrix products; None means the saved one, else torch.float32.
            revision: Revision on the hub.
            trust_remote_code: Allow the model's own code; pin a revision with it.
            prompt: Format string with `{instruction}`; None means the saved one, else the bare instruction.
            layer: Entry of `hidden_states`; None means the saved one, else -1, the last.
        """
        path = Path(name_or_path)
        saved = PACKAGED[str(name_or_path)] if packaged_path(name_or_path) else EncoderSettings.read(name_or_path)
        origin: dict[str, Any] = {
            "revision": revision or saved.revision,
            "trust_remote_code": trust_remote_code or saved.trust_remote_code,
        }
        weights = str(path / "model") if saved.weights else packaged_path(str(saved.source)) or str(saved.source)
        model = loading.load_model(weights, **origin)
        if saved.lora is not None:
            adapters.load_lora(model, path / "adapter")
        encoder = cls(
            model,
            loading.load_processor(weights, **origin),
            dtype=dtype or saved.torch_dtype,
            prompt=saved.prompt if prompt is None else prompt,
            layer=saved.layer if layer is None else layer,
            source=None if saved.weights else saved.source,
            **origin,
        )
        encoder.image_size = saved.image_size
        encoder.lora = saved.lora
        asked_otherwise = dtype is not None or prompt is not None or layer is not None
        if saved.fingerprint and not asked_otherwise and encoder.fingerprint != saved.fingerprint:
            warnings.warn(
                f"the encoder in {path} has fingerprint {encoder.fingerprint}, but was saved as {saved.fingerprint}: "
                f"its weights or the processor of {weights} changed since; heads and cached features may not fit",
                stacklevel=2,
            )
        if lora is not None:
            encoder.add_lora(lora)
        return encoder.to(device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the encoder: settings, adapter, and the full weights where they have no source or were changed.

        Raises:
            FileExistsError: If the directory is not empty.
            RuntimeError: While `trainable` is open.
        """
        if self._open:
            raise RuntimeError("the encoder is open for training; leave the trainable() block before saving it")
        directory = make_empty(directory)
        weights = self._base_changed or self.source is None
        if weights:
            adapters.save_base(self.model, directory / "model")
            self.processor.save_pretrained(directory / "model")
        if self.lora is not None:
            adapters.save_lora(self.model, directory / "adapter")
        EncoderSettings(
            source=None if weights else self.source,
            revision=None if weights else self.revision,
            trust_remote_code=self.trust_remote_code,
            weights=weights,
            dtype=str(self.compute_dtype).removeprefix("torch."),
            prompt=self.prompt,
            layer=self.layer,
            image_size=self.image_size,
            lora=self.lora,
            fingerprint=self.fingerprint,
        ).write(directory)

    def add_lora(self, settings: LoRASettings) -> None:
        """Add a fresh LoRA adapter to the text backbone; it starts as the identity, and frozen."""
        adapters.add_lora(self.model, settings)
        self.lora = settings
        self._freeze()

    def encode(self, images: np.ndarray | Tensor, instructions: Sequence[str]) -> Features:
        """Encode frames without gradients: the features to cache.

        Args:
            images: uint8 `[B, H, W, 3]`, or `[B, N, H, W, 3]` with N views whose tokens are concatenated.
            instructions: B instructions.

        Returns:
            Features with tokens `[B, M, D]` in `feature_dtype`, on the encoder's device.

        Raises:
            FloatingPointError: If a token does not fit `feature_dtype`.
        """
        with torch.no_grad(), adapters.without_dropout(self.model):
            features = self.forward(images, instructions).to(dtype=self.feature_dtype)
        if not torch.isfinite(features.tokens[features.mask]).all():
            raise FloatingPointError(
                f"some tokens are not finite in {self.feature_dtype}; set encoder.feature_dtype to torch.bfloat16 or "
                "torch.float32, and look for infinite weights if it happens there too"
            )
        return features

    def forward(
        self, images: np.ndarray | Tensor | None, instructions: Sequence[str], *, vision: Tensor | None = None
    ) -> Features:
        """The computation of `encode` in float32, with gradients to whatever `trainable` has opened.

        Args:
            images: uint8 `[B, H, W, 3]` or `[B, N, H, W, 3]`, or None with `vision`.
            instructions: B instructions.
            vision: What `encode_vision` gave for the frames, `[B, V, D']` or `[B, N, V, D']`, in place of images.
        """
        if (images is None) == (vision is None):
            raise ValueError("forward takes images or vision tokens, got both or neither; pass exactly one of them")
        given = self._check_images(images) if vision is None else vision.to(self.device)
        if len(instructions) != len(given):
            raise ValueError(
                f"got {len(instructions)} instructions for {len(given)} observations; pass one per observation"
            )
        several = given.ndim == (5 if vision is None else 4)
        rows = given.flatten(0, 1) if several else given
        repeated = [instruction for instruction in instructions for _ in range(len(rows) // len(given))]
        inputs: dict[str, Any] = dict(self._prompts.batch(repeated, self._size(), self.device))
        mask = inputs["attention_mask"].bool()
        with self._autocast():
            if vision is None:
                inputs["pixel_values"] = self._pixels(rows)
            else:
                inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
                inputs["pixel_values"] = None
                inputs["mm_encoder_outputs"] = {"image": self._restore_vision(rows)}
            hidden = hidden_states(self.model, inputs, layer=self.layer)
        self.num_forwards += 1
        self.num_frames += len(rows)
        tokens = hidden.float().reshape(len(given), -1, hidden.shape[-1])
        return Features(tokens=tokens, mask=mask.reshape(len(given), -1), fingerprint=self.fingerprint)

    @torch.no_grad()
    def encode_vision(self, images: np.ndarray | Tensor) -> Tensor:
        """Projected vision tokens, to be cached and passed to `forward` while vision tower and projector stay frozen.

        Args:
            images: uint8 `[B, H, W, 3]` or `[B, N, H, W, 3]`.

        Returns:
            `[B, V, D']`, or `[B, N, V, D']` for several views; D' spans all that the model adds to its text layers.

        Raises:
            NotImplementedError: If the model cannot take vision tokens, or makes them from the instruction.
        """
        if not self.supports_vision_cache:
            raise NotImplementedError(
                f"{type(self.model).__name__} cannot cache vision tokens; pass images to forward instead"
            )
        given = self._check_images(images)
        frames = given if given.ndim == 4 else given.flatten(0, 1)
        inputs = self._prompts.batch(["go"] * len(frames), self._size(), self.device)
        with self._autocast():
            pixels = self._pixels(frames)
            rows = self._vision.encode(self.model, pixels=pixels, inputs=inputs, frames=len(frames))
        return rows if given.ndim == 4 else rows.unflatten(0, given.shape[:2])

    @contextmanager
    def trainable(self, scope: Scope = "lora") -> Iterator[list[nn.Parameter]]:
        """Open weights for training; on leaving, everything is frozen again and the fingerprint is new.

        Args:
            scope: "lora" (the adapter), "text" (text backbone and projector, adapter included) or "all".

        Yields:
            The opened parameters, float32.

        Raises:
            RuntimeError: If weights are open already.
            ValueError: If the scope is "lora" and there is no adapter.
        """
        if self._open:
            raise RuntimeError("the encoder is open for training already; leave the first trainable() block before")
        parameters = self._scope(scope)
        _ = self.fingerprint
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        for module in adapters.lora_dropouts(self.model):
            module.train()
        self._open = True
        self._base_changed |= scope != "lora"
        try:
            yield parameters
        finally:
            self._open = False
            self._freeze()

    @property
    def fingerprint(self) -> str:
        """Identity of the features: weights, adapter, preprocessing, prompt, layer and dtype.

        While `trainable` is open it is the former one, marked, since the weights are moving.
        """
        if self._fingerprint is None:
            self._fingerprint = encoder_fingerprint(
                self.model,
                process=self._prompts.process,
                vocabulary=self.processor.tokenizer.get_vocab(),
                settings={"prompt": self.prompt, "layer": self.layer, "dtype": self.compute_dtype, "lora": self.lora},
            )
        return f"{self._fingerprint}-training" if self._open else self._fingerprint

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> FrozenVLMEncoder:
        """Set the wrapper's flag only: the model stays in eval mode unless it checkpoints gradients."""
        self.training = mode
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        self.model.train(mode and checkpointing)
        for module in adapters.lora_dropouts(self.model):
            module.train(self._open)
        return self

    def _freeze(self) -> None:
        self.model.requires_grad_(False).eval()
        if self.compute_dtype != torch.float32:
            for weight in half_weights(self.model):
                weight.data = weight.data.to(self.compute_dtype)
        for parameter in adapters.lora_parameters(self.model):
            parameter.data = parameter.data.float()
        self._fingerprint = None

    def _scope(self, scope: Scope) -> list[nn.Parameter]:
        if scope == "lora":
            if self.lora is None:
                raise ValueError("the encoder has no LoRA adapter; call add_lora(LoRASettings()) or use scope 'text'")
            return adapters.lora_parameters(self.model)
        if scope not in ("text", "all"):
            raise ValueError(f"scope is {scope!r}, expected 'lora', 'text' or 'all'; pass one of them")
        return used_parameters(self.model, vision=scope == "all")

    def _autocast(self) -> torch.autocast:
        half = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if half else None, enabled=half)

    def _check_images(self, images: np.ndarray | Tensor | None) -> Tensor:
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim not in (4, 5) or images.shape[-1] != 3 or 0 in images.shape:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}, expected uint8 [B, H, W, 3] or [B, N, H, W, 3]; "
                "convert frames to 0..255 channels-last"
            )
        self.image_size = (images.shape[-3], images.shape[-2])
        return images.to(self.device)

    def _size(self) -> Size:
        if self.image_size is None:
            raise ValueError("the size of the frames behind the vision tokens is unknown; set encoder.image_size")
        return self.image_size

    def _restore_vision(self, rows: Tensor) -> Any:
        if not self._vision.format_known:
            self.encode_vision(torch.zeros((1, *self._size(), 3), dtype=torch.uint8))
        return self._vision.restore(rows)
