"""The frozen vision-language encoder: frames and instructions to tokens, with its weights opened only on request."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.encoders import loading
from vla_rl.encoders import lora as adapters
from vla_rl.encoders.attention import training_attention
from vla_rl.encoders.base import Encoder
from vla_rl.encoders.checkpoint import Views
from vla_rl.encoders.checks import require_encodable
from vla_rl.encoders.features import Features
from vla_rl.encoders.fingerprint import encoder_fingerprint
from vla_rl.encoders.hidden import LowerLayers, hidden_states
from vla_rl.encoders.lora import LoRASettings
from vla_rl.encoders.pixels import PixelPipeline, Size
from vla_rl.encoders.prompts import PromptInputs
from vla_rl.encoders.saving import restore, save
from vla_rl.encoders.truncation import truncate_text
from vla_rl.encoders.vision import VisionPath, takes_vision_tokens
from vla_rl.encoders.weights import Scope, half_weights, scope_parameters, zero_dropout


class FrozenVLMEncoder(Encoder):
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
        views: How several frames of one observation (cameras, or a history) go in: "separate", each with the prompt
            in a forward of its own, their tokens concatenated; or "joint", all in one prompt that sees them together.
        truncate_layers: Keep only the first so many text layers; None keeps all.
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
        num_views: Views per observation last seen; lower hidden states of joint views belong to this number.

    Raises:
        ValueError: If the model cannot serve as an encoder, or its processor not for this; the message says why.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        dtype: torch.dtype = torch.float32,
        prompt: str = "{instruction}",
        layer: int = -1,
        views: Views = "separate",
        truncate_layers: int | None = None,
        source: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        require_encodable(model, processor)
        if truncate_layers is not None:
            truncate_text(model, truncate_layers)
        self.model = model
        self.processor = processor
        self.compute_dtype = dtype
        self.prompt = prompt
        self.layer = layer
        self.views: Views = views
        self.truncate_layers = truncate_layers
        self.source = source
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.unknown_fields: dict[str, Any] = {}
        self.num_views = 1
        self._open = False
        self._base_changed = False
        self._fingerprint: str | None = None
        model._register_load_state_dict_pre_hook(self._notice_weights)
        zero_dropout(model)
        self._vision = VisionPath(model)
        self.supports_vision_cache = self._vision.supported
        self._prompts = PromptInputs(
            processor,
            image_token_id=loading.image_token_id(model.config),
            prompt=prompt,
            accepted=frozenset(inspect.signature(model.forward).parameters),
        )
        process = functools.partial(self._prompts.process, instruction="go")
        self._pixels = PixelPipeline(processor.image_processor, process)
        self._lower: LowerLayers | None = None
        self._vision_shapes: dict[Size, tuple[int, ...]] = {}
        self._prompts.require_batches()
        if views not in ("separate", "joint"):
            raise ValueError(f"views={views!r}, expected 'separate' or 'joint'; pass one of them")
        if views == "joint":
            self._prompts.require_views()
        backbone = loading.text_backbone(model)
        self._anchor = (list(backbone.parameters())[-1],)  # stays on the device whatever else is moved off it
        self.feature_dim: int = getattr(backbone.config, "hidden_size", None) or backbone.config.d_model
        if layer != -1 and layer not in range(count := len(loading.text_layers(backbone))):
            raise ValueError(f"layer={layer}, expected -1 (last) or 0 to {count - 1} (the input of that layer)")
        self._freeze()
        self.supports_vision_cache = self.supports_vision_cache and takes_vision_tokens(self)

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
        views: Views | None = None,
        truncate_layers: int | None = None,
        quantization_config: Any = None,
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
            views: "separate" or "joint"; None means the saved one, else "separate".
            truncate_layers: Keep only the first so many text layers; None means as many as were saved.
            quantization_config: Handed on to transformers, such as a `BitsAndBytesConfig` for weights in 8 or 4 bits;
                the adapter learns, the quantised weights cannot. None means the saved one; False, whole weights.
        """
        settings = {"dtype": dtype, "prompt": prompt, "layer": layer, "views": views}
        encoder, quantized = restore(
            cls,
            name_or_path,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            truncate_layers=truncate_layers,
            quantization_config=quantization_config,
            asked={name: value for name, value in settings.items() if value is not None},
        )
        if lora is not None:
            encoder.add_lora(lora)
        return encoder if quantized else encoder.to(device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the encoder: settings, adapter, and the full weights where they have no source or were changed.

        Raises:
            FileExistsError: If the directory is not empty.
            RuntimeError: While `trainable` is open.
        """
        if self._open:
            raise RuntimeError("the encoder is open for training; leave the trainable() block before saving it")
        save(self, directory, weights=self._base_changed or self.source is None)

    def add_lora(self, settings: LoRASettings) -> None:
        """Add a fresh LoRA adapter to the text backbone; it starts as the identity, and frozen."""
        adapters.add_lora(self.model, settings, layer=self.layer)
        self.lora = settings
        self._lower = None
        self._freeze()

    def compile(self, **options: Any) -> None:
        """Compile every layer of text backbone and vision tower with `torch.compile`, in place; opt-in, as it is slow.

        Args:
            **options: Of `torch.compile`, such as `mode="reduce-overhead"` for CUDA graphs.
        """
        for layers in loading.layer_stacks(self.model):
            for layer in layers:
                layer.compile(**options)

    def encode(self, images: np.ndarray | Tensor, instructions: Sequence[str]) -> Features:
        """Encode frames without gradients: the features to cache.

        Args:
            images: uint8 `[B, H, W, 3]`, or `[B, N, H, W, 3]` with N views (cameras, or frames of a history).
            instructions: B instructions.

        Returns:
            Features with tokens `[B, M, D]` in `feature_dtype`, on the encoder's device.

        Raises:
            FloatingPointError: If a token does not fit `feature_dtype`.
        """
        with torch.no_grad(), adapters.without_dropout(self.model):
            features = self.forward(images, instructions).to(dtype=self.feature_dtype)
        if not (torch.isfinite(features.tokens).all(-1) | ~features.mask).all():
            raise FloatingPointError(
                f"some tokens are not finite in {self.feature_dtype}; set encoder.feature_dtype to torch.bfloat16 or "
                "torch.float32, and look for infinite weights if it happens there too"
            )
        return features

    def forward(
        self,
        images: np.ndarray | Tensor | None,
        instructions: Sequence[str],
        *,
        vision: Tensor | None = None,
        lower: Tensor | None = None,
    ) -> Features:
        """The computation of `encode` in float32, with gradients to whatever `trainable` has opened.

        Args:
            images: uint8 `[B, H, W, 3]` or `[B, N, H, W, 3]`, or None with `vision` or `lower`.
            instructions: B instructions.
            vision: What `encode_vision` gave for the frames, `[B, V, D']` or `[B, N, V, D']`, in place of images.
            lower: What `encode_lower` gave for frames and instructions, in place of images; more padding is cut off.
        """
        if [images is None, vision is None, lower is None].count(False) != 1:
            raise ValueError("forward takes images, vision tokens or lower hidden states; pass exactly one of them")
        if lower is not None:
            return self._forward_upper(lower.to(self.device), instructions)
        inputs, count, frames = self._inputs(images, vision, instructions)
        with self._autocast():
            hidden = hidden_states(self.model, inputs, layer=self.layer)
        return self._features(hidden, inputs["attention_mask"], count, frames)

    def _inputs(
        self, images: np.ndarray | Tensor | None, vision: Tensor | None, instructions: Sequence[str]
    ) -> tuple[dict[str, Any], int, int]:
        """Arguments of the model, number of observations and of frames."""
        given = self._check_images(images) if vision is None else vision.to(self.device)
        if isinstance(instructions, str) or len(instructions) != len(given):
            raise ValueError(
                f"got {'a string, not a list of' if isinstance(instructions, str) else len(instructions)} instructions "
                f"for {len(given)} observations; pass one per observation"
            )
        several = given.ndim == (5 if vision is None else 4)
        views = given.shape[1] if several else 1
        rows = given.flatten(0, 1) if several else given
        inputs = self._prompt_inputs(instructions, views)
        with self._autocast():
            if vision is None and self.views == "joint" and views > 1:
                inputs["pixel_values"] = self._pixels.joint(given)
            elif vision is None:
                inputs["pixel_values"] = self._pixels(rows)
            else:
                self._replace_pixels(inputs, rows)
        return inputs, len(given), len(rows)

    def _prompt_inputs(self, instructions: Sequence[str], views: int) -> dict[str, Any]:
        """Everything but pixels: one row per observation where views are joint, else one per view."""
        if self.views == "joint":
            return dict(self._prompts.batch(instructions, self._size(), self.device, views=views))
        repeated = [instruction for instruction in instructions for _ in range(views)]
        return dict(self._prompts.batch(repeated, self._size(), self.device))

    def _replace_pixels(self, inputs: dict[str, Any], rows: Tensor) -> None:
        for name in [name for name in inputs if name.startswith("pixel_")]:
            del inputs[name]
        inputs["pixel_values"] = None
        if not self._vision.format_known:
            self.vision_shape()
        inputs["mm_encoder_outputs"] = {"image": self._vision.restore(rows)}

    def _features(self, hidden: Tensor, mask: Tensor, count: int, frames: int) -> Features:
        self.num_forwards += 1
        self.num_frames += frames
        tokens = hidden.float().reshape(count, -1, hidden.shape[-1])
        return Features(tokens=tokens, mask=mask.bool().reshape(count, -1), fingerprint=self.fingerprint)

    def _forward_upper(self, lower: Tensor, instructions: Sequence[str]) -> Features:
        """Features from the output of the layers below the adapter; neither they nor the vision tower run."""
        joint = self.views == "joint"
        if lower.ndim not in ((3,) if joint else (3, 4)):
            raise ValueError(f"lower hidden states are {tuple(lower.shape)}; pass what encode_lower gave, unchanged")
        rows = lower.flatten(0, 1) if lower.ndim == 4 else lower
        inputs = self._prompt_inputs(instructions, self.num_views if joint else len(rows) // len(lower))
        longest = inputs["attention_mask"].shape[1]
        if len(instructions) != len(lower) or rows.shape[1] < longest:
            raise ValueError(
                f"lower hidden states are {tuple(lower.shape)} for {len(instructions)} instructions of up to {longest} "
                "tokens; pass what encode_lower gave for these instructions"
            )
        frames = len(rows) * (self.num_views if joint else 1)
        self._replace_pixels(inputs, torch.zeros(frames, *self.vision_shape(), device=self.device))
        with self._autocast(), self.lower_layers().replaced_by(rows[:, :longest]):
            hidden = hidden_states(self.model, inputs, layer=self.layer)
        return self._features(hidden, inputs["attention_mask"], len(lower), frames)

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
            raise NotImplementedError(f"{type(self.model).__name__} cannot cache vision tokens; pass images to forward")
        given = self._check_images(images)
        frames = given if given.ndim == 4 else given.flatten(0, 1)
        inputs = self._prompts.batch(["go"] * len(frames), self._size(), self.device)
        with self._autocast():
            pixels = self._pixels(frames)
            rows = self._vision.encode(self.model, pixels=pixels, inputs=inputs, frames=len(frames))
        return rows if given.ndim == 4 else rows.unflatten(0, given.shape[:2])

    @torch.no_grad()
    def encode_lower(self, images: np.ndarray | Tensor, instructions: Sequence[str]) -> Tensor:
        """Hidden states below the adapter, to be cached and passed to `forward` while only the adapter learns.

        Args:
            images: uint8 `[B, H, W, 3]` or `[B, N, H, W, 3]`.
            instructions: B instructions.

        Returns:
            `[B, M, D]`, or `[B, N, M, D]` for separate views, padded to the longest instruction.

        Raises:
            ValueError: If the adapter begins at the first layer, or there is none.
        """
        layers = self.lower_layers()
        inputs, count, frames = self._inputs(images, None, instructions)
        with self._autocast():
            hidden = layers.run(self.model, inputs)
        self.num_forwards += 1
        self.num_frames += frames
        return hidden if len(hidden) == count else hidden.unflatten(0, (count, -1))

    @property
    def frozen_layers(self) -> int:
        """How many text layers lie below the adapter, and so give the same while only it learns."""
        return adapters.first_adapted_layer(self.model) if self.lora is not None else 0

    def prompt_length(self, instructions: Sequence[str], images: np.ndarray | Tensor | None = None) -> int:
        """Tokens of the longest of these instructions' prompts, images included; no forward of the model.

        Args:
            instructions: At least one.
            images: A batch of the frames to come, for their size and number of views; None for the last seen.
        """
        if images is not None:
            self._check_images(images)
        views = self.num_views if self.views == "joint" else 1
        return max(self._prompts.get(text, self._size(), views=views)["input_ids"].shape[1] for text in instructions)

    @contextmanager
    def trainable(self, scope: Scope = "lora", *, checkpointing: bool = False) -> Iterator[list[nn.Parameter]]:
        """Open weights for training; on leaving, everything is frozen again and the fingerprint is new.

        Args:
            scope: "lora" (the adapter), "text" (text backbone and projector, adapter included) or "all".
            checkpointing: Keep only the input of each layer for the backward pass, and compute the rest again there.

        Yields:
            The opened parameters, float32.

        Raises:
            RuntimeError: If weights are open already.
            ValueError: If the scope is "lora" and there is no adapter.
        """
        if self._open:
            raise RuntimeError("the encoder is open for training already; leave the first trainable() block before")
        parameters, _ = scope_parameters(self.model, scope), self.fingerprint
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        for module in adapters.lora_dropouts(self.model):
            module.train()
        self._open = True
        self._base_changed |= scope != "lora"
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.train()
        try:
            with training_attention(self):
                yield parameters
        finally:
            if checkpointing:
                self.model.gradient_checkpointing_disable()
                self.training = False
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
                settings={
                    "prompt": self.prompt,
                    "layer": self.layer,
                    "dtype": self.compute_dtype,
                    "lora": self.lora,
                    **({"views": "joint"} if self.views == "joint" else {}),
                },
            )
        return f"{self._fingerprint}-training" if self._open else self._fingerprint

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._anchor[0].device

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

    def _notice_weights(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Before `load_state_dict`: the features will be others, perhaps the weights below the adapter too."""
        self._fingerprint = self._fingerprint if self._open else None
        self._base_changed = self._base_changed or adapters.changes_base(self.model, state, prefix=prefix)

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
        self.num_views = images.shape[1] if images.ndim == 5 else 1
        return images.to(self.device)

    def _size(self) -> Size:
        if self.image_size is None:
            raise ValueError("the size of the frames behind the vision tokens is unknown; set encoder.image_size")
        return self.image_size

    def vision_shape(self) -> tuple[int, ...]:
        """Shape (V, D') of the vision tokens of one frame of `image_size`."""
        size, views = self._size(), self.num_views
        if size not in self._vision_shapes:
            self._vision_shapes[size] = tuple(self.encode_vision(np.zeros((1, *size, 3), np.uint8)).shape[1:])
            self.num_views = views
        return self._vision_shapes[size]

    def lower_layers(self) -> LowerLayers:
        """The text layers below the adapter.

        Raises:
            ValueError: If there are none.
        """
        if self._lower is None:
            if self.frozen_layers == 0:
                raise ValueError("no text layer lies below the adapter; add one with LoRASettings(top_layers=...)")
            self._lower = LowerLayers(self.model, self.frozen_layers)
        return self._lower
