"""A small vision-language model of a real class, built from config: what the examples train on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vla_rl.encoders.loading import require_transformers
from vla_rl.encoders.vlm import FrozenVLMEncoder


def small_vlm(
    instructions: Sequence[str],
    *,
    image_size: int = 64,
    patch_size: int = 16,
    width: int = 192,
    vision_layers: int = 4,
    text_layers: int = 3,
    heads: int = 6,
    vocab_size: int = 1024,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> FrozenVLMEncoder:
    """Build an untrained PaliGemma (SigLIP tower, Gemma text model, bidirectional prompt) of a few million weights.

    Its image tokens see the instruction, since the processor marks the whole prompt as prefix.

    Args:
        instructions: Texts from which the vocabulary is learned; others still tokenise, byte by byte if need be.
        image_size: Height and width in pixels that the model sees; frames of other sizes are resized.
        patch_size: Height and width of a vision patch in pixels.
        width: Hidden width D of both towers.
        vision_layers: Layers of the vision tower.
        text_layers: Layers of the text model.
        heads: Attention heads of each layer.
        vocab_size: Most entries of the learned vocabulary; PaliGemma's 1,153 tokens for image and places come on top.
        seed: Seed of the weights; the global random state is left alone.
        dtype: Type of the matrix products.

    Raises:
        ValueError: If `image_size` is no multiple of `patch_size`, or `width` none of `heads`.
    """
    if image_size % patch_size or width % heads:
        raise ValueError(
            f"image_size={image_size}, patch_size={patch_size}, width={width}, heads={heads}: expected image_size to "
            "be a multiple of patch_size and width one of heads; change one of the pair"
        )
    transformers = require_transformers()
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image_processor: Any = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    # The processor reads the number of image tokens from here.
    image_processor.image_seq_length = (image_size // patch_size) ** 2
    processor = transformers.PaliGemmaProcessor(image_processor, train_tokenizer(instructions, vocab_size=vocab_size))
    tokenizer = processor.tokenizer
    text = {
        "model_type": "gemma",
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": text_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
        "projection_dim": width,
        "vision_use_head": False,
    }
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=processor.image_token_id,
        hidden_size=width,
        projection_dim=width,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.PaliGemmaForConditionalGeneration(config)
    encoder = FrozenVLMEncoder(model, processor, dtype=dtype)
    encoder.image_size = (image_size, image_size)
    return encoder


def train_tokenizer(texts: Sequence[str], *, vocab_size: int = 1024) -> Any:
    """A byte-level BPE tokenizer learned from `texts`: frequent words become single tokens, and any text tokenises.

    Args:
        texts: What to learn from.
        vocab_size: Most entries, the 256 bytes and three special tokens included.
    """
    transformers = require_transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="right"
    )
