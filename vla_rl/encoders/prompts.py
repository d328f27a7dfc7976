"""Instructions to model inputs: everything that a processor makes besides pixels, computed once and cached."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


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
        if "{instruction}" not in prompt:
            raise ValueError(f"prompt {prompt!r} has no field {{instruction}}; write e.g. 'in: {{instruction}}'")
        self.processor = processor
        self.image_token_id = image_token_id
        self.prompt = prompt
        self.accepted = accepted
        self.processor.tokenizer.padding_side = "right"
        token = getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None)
        token = token or processor.tokenizer.convert_ids_to_tokens(image_token_id)
        self.image_token = token if isinstance(token, str) else str(token)
        self._style: str | None = None
        self._cache: dict[tuple[str, Size], dict[str, Tensor]] = {}

    def _text(self, instruction: str, style: str) -> str:
        text = self.prompt.format(instruction=instruction)
        if style == "chat":
            content = [{"type": "image"}, {"type": "text", "text": text}]
            conversation = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return self.image_token + text if style == "token" else text

    def process(self, image: np.ndarray, instruction: str) -> dict[str, Tensor]:
        """Run the Hugging Face processor on one image `[H, W, 3]` uint8 and one instruction."""
        if self._style is None:
            self._style = self._choose_style(image)
        return self._process(image, instruction, self._style)

    def _process(self, image: np.ndarray, instruction: str, style: str) -> dict[str, Tensor]:
        text = self._text(instruction, style)
        bos = self.processor.tokenizer.bos_token
        # A chat template that writes the first token itself must not get a second one.
        options = {"add_special_tokens": False} if style == "chat" and bos and text.startswith(bos) else {}
        return dict(self.processor(images=[image], text=[text], return_tensors="pt", **options))

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

    def get(self, instruction: str, size: Size) -> dict[str, Tensor]:
        """Every non-pixel input `[1, ...]` for one instruction and one image size `(H, W)`."""
        key = (instruction, size)
        if key not in self._cache:
            inputs = self.process(np.zeros((*size, 3), dtype=np.uint8), instruction)
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            self._cache[key] = {
                name: value
                for name, value in inputs.items()
                if name in self.accepted and name not in ("pixel_values", "labels") and isinstance(value, Tensor)
            }
        return self._cache[key]

    def batch(self, instructions: Sequence[str], size: Size, device: torch.device) -> dict[str, Tensor]:
        """Stack the inputs of several instructions, padded on the right: `{name: [B, ...]}` on `device`."""
        rows = [self.get(instruction, size) for instruction in instructions]
        return {name: self._stack(name, [row[name] for row in rows]).to(device) for name in rows[0]}

    def _stack(self, name: str, values: list[Tensor]) -> Tensor:
        if values[0].ndim != 2:
            return torch.cat(values)
        longest = max(value.shape[1] for value in values)
        pad = 0
        if name.endswith("input_ids"):
            source = getattr(self.processor, "qformer_tokenizer", None) if name.startswith("qformer") else None
            pad = (source or self.processor.tokenizer).pad_token_id or 0
        return torch.cat([F.pad(value, (0, longest - value.shape[1]), value=pad) for value in values])
