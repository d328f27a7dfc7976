"""The frozen vision-language encoder: frames and instructions to tokens, with its weights opened only on request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.encoders import loading
from vla_rl.encoders import lora as adapters
from vla_rl.encoders.features import Features
from vla_rl.encoders.fingerprint import encoder_fingerprint
from vla_rl.encoders.lora import LoRASettings
from vla_rl.encoders.pixels import PixelPipeline, Size
from vla_rl.encoders.prompts import PromptInputs

Scope = Literal["lora", "text", "all"]
_SETTINGS = "encoder.json"


class _Captured(Exception):  # noqa: N818 - it carries a result, it is no error
    """Ends a model's forward as soon as the wanted hidden states exist, before any language-model head."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _VisionTokens:
    """Stands for a vision tower's output inside a model: what features do not depend on is None."""

    def __init__(self, pooler_output: Any, deepstack_features: list[Any]) -> None:
        self.pooler_output = pooler_output
        self.deepstack_features = deepstack_features

    def __getattr__(self, name: str) -> None:
        return None


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
        self._lora: LoRASettings | None = None
        self._open = False
        self._base_changed = False
        self._fingerprint: str | None = None
        self._vision_ranks: list[int] | None = None

        loading.zero_dropout(model)
        self._vision_inputs = loading.vision_inputs(model)
        self.supports_vision_cache = self._vision_inputs is not None
        self._prompts = PromptInputs(
            processor,
            image_token_id=loading.image_token_id(model.config),
            prompt=prompt,
            accepted=loading.accepted_inputs(model),
        )
        self._pixels = PixelPipeline(processor.image_processor, lambda frame: self._prompts.process(frame, "go"))
        backbone = loading.text_backbone(model)
        self.feature_dim: int = getattr(backbone.config, "hidden_size", None) or backbone.config.d_model
        if layer != -1 and not 0 <= layer < len(loading.text_layers(backbone)):
            raise ValueError(
                f"layer={layer}, expected -1 (last) or 0 to {len(loading.text_layers(backbone)) - 1} (input of a layer)"
            )
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
        """Load an encoder from a directory written by `save_pretrained`, a model directory, or a hub id.

        Args:
            name_or_path: Directory or hub id.
            lora: Adapter to add, fresh; None adds none (a saved one is loaded all the same).
            device: Where the model runs.
            dtype: Type of the matrix products; None means the saved one, else torch.float32.
            revision: Revision on the hub.
            trust_remote_code: Allow the model's own code; pin a revision with it.
            prompt: Format string with `{instruction}`; None means the saved one, else the bare instruction.
            layer: Entry of `hidden_states`; None means the saved one, else -1, the last.
        """
        path = Path(name_or_path)
        saved: dict[str, Any] = {}
        weights = source = str(path.resolve()) if path.is_dir() else str(name_or_path)
        if (path / _SETTINGS).is_file():
            saved = json.loads((path / _SETTINGS).read_text())
            source = saved["source"]
            weights = str(path / "model") if saved["weights"] else source
            revision, trust_remote_code = saved["revision"], trust_remote_code or saved["trust_remote_code"]
        model = loading.load_model(weights, revision=revision, trust_remote_code=trust_remote_code)
        if saved.get("lora"):
            adapters.load_lora(model, path / "adapter")
        encoder = cls(
            model,
            loading.load_processor(weights, revision=revision, trust_remote_code=trust_remote_code),
            dtype=dtype or getattr(torch, saved.get("dtype", "float32")),
            prompt=saved.get("prompt", "{instruction}") if prompt is None else prompt,
            layer=saved.get("layer", -1) if layer is None else layer,
            source=None if saved.get("weights") else source,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if saved.get("image_size"):
            encoder.image_size = (saved["image_size"][0], saved["image_size"][1])
        if saved.get("lora"):
            encoder._lora = LoRASettings(**saved["lora"])
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
        directory = Path(directory)
        loading.refuse_nonempty(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = self._base_changed or self.source is None
        if weights:
            adapters.save_base(self.model, directory / "model")
            self.processor.save_pretrained(directory / "model")
        if self._lora is not None:
            adapters.save_lora(self.model, directory / "adapter")
        settings = {
            "source": self.source,
            "revision": None if weights else self.revision,
            "trust_remote_code": self.trust_remote_code,
            "weights": weights,
            "dtype": str(self.compute_dtype).removeprefix("torch."),
            "prompt": self.prompt,
            "layer": self.layer,
            "image_size": self.image_size,
            "lora": asdict(self._lora) if self._lora else None,
        }
        (directory / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    def add_lora(self, settings: LoRASettings) -> None:
        """Add a fresh LoRA adapter to the text backbone; it starts as the identity and frozen."""
        adapters.add_lora(self.model, settings)
        self._lora = settings
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
        dropouts = [module for module in adapters.lora_dropouts(self.model) if module.training]
        for module in dropouts:
            module.eval()
        with torch.no_grad():
            features = self.forward(images, instructions).to(dtype=self.feature_dtype)
        for module in dropouts:
            module.train()
        if not torch.isfinite(features.tokens[features.mask]).all():
            raise FloatingPointError(
                f"some tokens are not finite in {self.feature_dtype}; set encoder.feature_dtype to torch.bfloat16 or "
                "torch.float32, and check the frames if it happens there too"
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
        if images is not None:
            frames, batch = self._frames(images)
            size = (frames.shape[1], frames.shape[2])
            count = len(frames)
        else:
            assert vision is not None
            batch, size = len(vision), self._cached_size()
            vision = vision if vision.ndim == 3 else vision.flatten(0, 1)
            frames, count = None, len(vision)
        if len(instructions) != batch:
            raise ValueError(f"got {len(instructions)} instructions for {batch} observations; pass one per observation")
        views = count // batch
        repeated = [instruction for instruction in instructions for _ in range(views)]
        inputs = self._prompts.batch(repeated, size, self.device)
        mask = inputs["attention_mask"].bool()
        with self._autocast():
            if frames is not None:
                inputs["pixel_values"] = self._pixels(frames)
            else:
                assert vision is not None
                inputs = {name: value for name, value in inputs.items() if not name.startswith("pixel_")}
                inputs["pixel_values"] = None
                inputs["mm_encoder_outputs"] = {"image": self._vision_output(vision.to(self.device))}
            hidden = self._hidden_states(inputs)
        self.num_forwards += 1
        self.num_frames += count
        tokens = hidden.float().reshape(batch, -1, hidden.shape[-1])
        return Features(tokens=tokens, mask=mask.reshape(batch, -1), fingerprint=self.fingerprint)

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
        if self._vision_inputs is None:
            raise NotImplementedError(
                f"{type(self.model).__name__} cannot cache vision tokens; pass images to forward instead"
            )
        frames, batch = self._frames(images)
        inputs = self._prompts.batch(["go"] * len(frames), (frames.shape[1], frames.shape[2]), self.device)
        inputs = {name: value for name, value in inputs.items() if name in self._vision_inputs}
        with self._autocast():
            output = self.model.get_image_features(pixel_values=self._pixels(frames), **inputs, return_dict=True)
        parts = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        self._vision_ranks = [part.ndim if isinstance(part, Tensor) else -part[0].ndim for part in parts]
        tokens = torch.cat([loading.vision_rows(part, len(frames)) for part in parts], dim=-1)
        return tokens if len(frames) == batch else tokens.unflatten(0, (batch, -1))

    @contextmanager
    def trainable(self, scope: Scope = "lora") -> Iterator[list[nn.Parameter]]:
        """Open weights for training; on leaving, everything is frozen again and the fingerprint is new.

        Args:
            scope: "lora" (the adapter), "text" (text backbone and projector, adapter included) or "all".

        Yields:
            The opened parameters, float32.

        Raises:
            ValueError: If the scope is "lora" and there is no adapter.
        """
        parameters = self._scope(scope)
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        for module in adapters.lora_dropouts(self.model):
            module.train()
        _ = self.fingerprint
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

        While `trainable` is open it is marked as such, since the weights are moving.
        """
        if self._fingerprint is None:
            self._fingerprint = encoder_fingerprint(
                self.model,
                process=self._prompts.process,
                vocabulary=self.processor.tokenizer.get_vocab(),
                settings={"prompt": self.prompt, "layer": self.layer, "dtype": self.compute_dtype, "lora": self._lora},
            )
        return f"{self._fingerprint}-training" if self._open else self._fingerprint

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> FrozenVLMEncoder:
        """Set the flag of the wrapper only: the model stays in eval mode unless it checkpoints gradients."""
        super().train(mode)
        self.model.train(mode and getattr(self.model, "is_gradient_checkpointing", False))
        return self

    def _freeze(self) -> None:
        self.model.requires_grad_(False).eval()
        if self.compute_dtype != torch.float32:
            for weight in loading.half_weights(self.model):
                weight.data = weight.data.to(self.compute_dtype)
        for parameter in adapters.lora_parameters(self.model):
            parameter.data = parameter.data.float()
        self._fingerprint = None

    def _scope(self, scope: Scope) -> list[nn.Parameter]:
        if scope == "lora":
            if self._lora is None:
                raise ValueError("the encoder has no LoRA adapter; call add_lora(LoRASettings()) or use scope 'text'")
            return adapters.lora_parameters(self.model)
        if scope not in ("text", "all"):
            raise ValueError(f"scope is {scope!r}, expected 'lora', 'text' or 'all'")
        return loading.used_parameters(self.model, vision=scope == "all")

    def _autocast(self) -> torch.autocast:
        half = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if half else None, enabled=half)

    def _frames(self, images: np.ndarray | Tensor) -> tuple[Tensor, int]:
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim not in (4, 5) or images.shape[-1] != 3 or 0 in images.shape:
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}, expected uint8 [B, H, W, 3] or [B, N, H, W, 3]; "
                "convert frames to 0..255 channels-last"
            )
        frames = (images if images.ndim == 4 else images.flatten(0, 1)).to(self.device)
        self.image_size = (frames.shape[1], frames.shape[2])
        return frames, len(images)

    def _cached_size(self) -> Size:
        if self.image_size is None:
            raise ValueError(
                "the size of the frames behind the vision tokens is unknown; set encoder.image_size=(H, W)"
            )
        return self.image_size

    def _vision_output(self, rows: Tensor) -> Any:
        if self._vision_ranks is None:
            self.encode_vision(torch.zeros((1, *self._cached_size(), 3), dtype=torch.uint8))
        assert self._vision_ranks is not None
        chunks = rows.chunk(len(self._vision_ranks), dim=-1)
        parts = [loading.vision_part(chunk, rank) for chunk, rank in zip(chunks, self._vision_ranks, strict=True)]
        return _VisionTokens(parts[0], parts[1:])

    def _hidden_states(self, inputs: dict[str, Any]) -> Tensor:
        backbone = loading.text_backbone(self.model)

        def capture_output(module: nn.Module, args: Any, output: Any) -> None:
            raise _Captured(output[0])

        def capture_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            raise _Captured(args[0] if args else kwargs["hidden_states"])

        if self.layer == -1:
            handle = backbone.register_forward_hook(capture_output)
        else:
            layer = loading.text_layers(backbone)[self.layer]
            handle = layer.register_forward_pre_hook(capture_input, with_kwargs=True)
        try:
            self.model(**inputs, use_cache=False)
        except _Captured as captured:
            return captured.hidden
        finally:
            handle.remove()
        raise RuntimeError(f"{type(self.model).__name__} never ran its text backbone; it cannot serve as an encoder")
