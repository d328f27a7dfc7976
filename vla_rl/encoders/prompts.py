"""Instructions to model inputs: everything that a processor makes besides pixels, computed once and cached."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vla_rl.encoders.checkpoint import has_instruction

Size = tuple[int, int]
_KEPT_BATCHES, _KEPT_BYTES = 32, 128_000_000
_PROBES = ("go", "put the second red block that lies behind the open drawer on top of the blue one")


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class PromptInputs:
    """Builds and caches the text side of a processor's output for `(instruction, image size)`.

    The prompt goes through the chat template where the processor has one. Otherwise the image placeholder is put in
    front, unless `prompt` already contains it or the processor inserts it itself.

    Args:
        processor: A Hugging Face processor.
        image_token_id: The id that marks image positions in `input_ids`.
        prompt: Format string with the field `{instruction}`.
        accepted: Names of the inputs that the model's forward takes; others are dropped.
    """

    def __init__(self, processor: Any, *, image_token_id: int, prompt: str, accepted: frozenset[str]) -> None:
        if not has_instruction(prompt):
            raise ValueError(
                f"prompt {prompt!r} has no field {{instruction}}, or others beside it; write e.g. 'in: "
                "{instruction}', and braces of its own twice"
            )
        self.processor = processor
        self.image_token_id = image_token_id
        self.prompt = prompt
        self.accepted = accepted
        self.processor.tokenizer.padding_side = "right"
        token = getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None)
        token = token or processor.tokenizer.convert_ids_to_tokens(image_token_id)
        self.image_token = token if isinstance(token, str) else str(token)
        self._style: str | None = None
        self._cache: dict[tuple[str, Size, int], dict[str, Tensor]] = {}
        self._batches: OrderedDict[Any, dict[str, Tensor]] = OrderedDict()

    def _text(self, instruction: str, style: str, views: int) -> str:
        text = self.prompt.format(instruction=instruction)
        if style == "chat":
            content = [{"type": "image"}] * views + [{"type": "text", "text": text}]
            conversation = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return self.image_token * views + text if style == "token" else text

    def process(self, image: np.ndarray, instruction: str) -> dict[str, Tensor]:
        """Run the Hugging Face processor on one instruction and an image `[H, W, 3]` uint8, or views `[N, H, W, 3]`."""
        if self._style is None:
            self._style = self._choose_style(image if image.ndim == 3 else image[0])
        return self._process(image, instruction, self._style)

    def _process(self, image: np.ndarray, instruction: str, style: str) -> dict[str, Tensor]:
        text = self._text(instruction, style, 1 if image.ndim == 3 else len(image))
        bos = self.processor.tokenizer.bos_token
        # A chat template that writes the first token itself must not get a second one.
        options = {"add_special_tokens": False} if style == "chat" and bos and text.startswith(bos) else {}
        images = [image] if image.ndim == 3 else [list(image)]
        try:
            return dict(self.processor(images=images, text=[text], return_tensors="pt", **options))
        except TypeError as error:  # some take a picture in no other form than Pillow's
            try:
                from PIL import Image
            except ImportError:
                raise error from None
            images = [[Image.fromarray(view) for view in (image if image.ndim == 4 else image[None])]]
            return dict(self.processor(images=images, text=[text], return_tensors="pt", **options))

    def _choose_style(self, image: np.ndarray) -> str:
        if self.image_token in self.prompt:
            return "plain"
        if getattr(self.processor, "chat_template", None):
            return "chat"

        def image_tokens(style: str) -> int:
            try:
                ids = self._process(image, "go", style)["input_ids"]
            except (ValueError, IndexError, TypeError, KeyError):
                return 0
            return int((ids == self.image_token_id).sum())

        with _quiet():
            plain, token = image_tokens("plain"), image_tokens("token")
        if max(plain, token) == 0:
            raise ValueError(
                f"the processor {type(self.processor).__name__} put no image token {self.image_token!r} in the prompt; "
                "pass a prompt that contains the placeholder, or set the processor's chat_template"
            )
        return "plain" if 0 < plain != token else "token"

    def require_batches(self) -> None:
        """Make sure that prompts of different length can share a batch.

        Raises:
            ValueError: If they cannot.
        """
        name = type(self.processor).__name__
        try:
            rows = [self.get(text, (64, 64)) for text in _PROBES]
            batch = self.batch(_PROBES, (64, 64), torch.device("cpu"))
        except (IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{name} cannot batch: its inputs for a short and a long instruction do not stack ({error}); use a "
                "processor that returns tensors [1, M] of tokens per prompt"
            ) from error
        ids, lengths = batch.get("input_ids"), [row["input_ids"].shape[1] for row in rows]
        if ids is None or batch["attention_mask"].sum(1).tolist() != lengths:
            raise ValueError(
                f"{name} cannot batch: a short and a long instruction give no token ids [2, M] with a mask of their "
                "lengths; use a processor that returns input_ids and attention_mask"
            )

    def require_views(self) -> None:
        """Make sure that two images can share a prompt.

        Raises:
            ValueError: If they cannot.
        """
        self.get("go", (64, 64), views=2)

    def get(self, instruction: str, size: Size, *, views: int = 1) -> dict[str, Tensor]:
        """Every non-pixel input `[1, ...]` for one instruction and one image size `(H, W)`.

        Raises:
            ValueError: If there are several views, and the processor does not give each its own image tokens.
        """
        key = (instruction, size, views)
        if key not in self._cache:
            if views == 1:
                inputs = self.process(np.zeros((*size, 3), np.uint8), instruction)
            else:
                inputs = self._views((views, *size, 3), instruction)
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            self._cache[key] = {
                name: value
                for name, value in inputs.items()
                if name in self.accepted and name not in ("pixel_values", "labels") and isinstance(value, Tensor)
            }
        return self._cache[key]

    def _views(self, shape: tuple[int, ...], instruction: str) -> dict[str, Tensor]:
        """Inputs for several images in one prompt, checked by their number of image tokens."""
        name = type(self.processor).__name__
        one = int((self.get(instruction, (shape[1], shape[2]))["input_ids"] == self.image_token_id).sum())
        try:
            with _quiet():
                inputs = self.process(np.zeros(shape, np.uint8), instruction)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} takes no {shape[0]} images in one prompt ({error}); use views='separate'"
            ) from error
        found = int((inputs["input_ids"] == self.image_token_id).sum())
        if found != shape[0] * one:
            raise ValueError(
                f"{name} writes {found} image tokens for {shape[0]} images in one prompt, expected {shape[0]} x {one}; "
                "use views='separate'"
            )
        return inputs

    def batch(
        self, instructions: Sequence[str], size: Size, device: torch.device, *, views: int = 1
    ) -> dict[str, Tensor]:
        """Stack the inputs of several instructions, padded on the right: `{name: [B, ...]}` on `device`.

        The last batches are kept on their device, since a rollout asks for the same sentences at every step.
        """
        key = (tuple(instructions), size, device, views)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        rows = [self.get(instruction, size, views=views) for instruction in instructions]
        lengths = [row["input_ids"].shape[1] for row in rows]
        made = {name: self._stack(name, [row[name] for row in rows], lengths).to(device) for name in rows[0]}
        self._batches[key] = made
        while len(self._batches) > _KEPT_BATCHES or self._kept_bytes() > _KEPT_BYTES:
            self._batches.popitem(last=False)
        return made

    def _kept_bytes(self) -> int:
        return sum(value.nbytes for batch in self._batches.values() for value in batch.values())

    def _stack(self, name: str, values: list[Tensor], lengths: list[int]) -> Tensor:
        """Rows of one input in one batch; what runs along the prompt, `[1, M, ...]` or any `[1, L]`, is padded."""
        per_token = values[0].ndim > 2 and [value.shape[1] for value in values] == lengths
        if values[0].ndim != 2 and not per_token:
            return torch.cat(values)
        longest = max(value.shape[1] for value in values)
        pad = 0
        if name.endswith("input_ids"):
            source = getattr(self.processor, "qformer_tokenizer", None) if name.startswith("qformer") else None
            pad = (source or self.processor.tokenizer).pad_token_id or 0
        others = [0, 0] * (values[0].ndim - 2)
        return torch.cat([F.pad(value, (*others, 0, longest - value.shape[1]), value=pad) for value in values])
