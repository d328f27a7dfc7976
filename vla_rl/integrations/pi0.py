"""transformers' pi0 as a source of features: the VLM inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vla_rl.encoders import FrozenVLMEncoder


def pi0_encoder(model: Any, processor: Any, **kwargs: Any) -> FrozenVLMEncoder:
    """The VLM inside transformers' `PI0ForConditionalGeneration` as an encoder, sharing its weights.

    Features are the hidden states of the prefix (images and instruction) that pi0's action expert attends to. LoRA and
    everything else of `FrozenVLMEncoder` work on them; saving writes the VLM alone.

    Args:
        model: the pi0 model.
        processor: its processor; its image processor and tokenizer are taken.
        kwargs: of `FrozenVLMEncoder`, such as `dtype`; pi0 itself sees several cameras together, `views="joint"`.
    """
    import transformers

    from vla_rl.encoders import FrozenVLMEncoder

    with torch.device("meta"):
        vlm: Any = transformers.PaliGemmaForConditionalGeneration(model.config.vlm_config)
    vlm.model = model.model.vlm
    vlm.lm_head.weight = vlm.get_input_embeddings().weight
    return FrozenVLMEncoder(
        vlm, transformers.PaliGemmaProcessor(processor.image_processor, processor.tokenizer), **kwargs
    )
