"""Tiny random-weight models of every supported family, saved to a directory as hub weights are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from vla_rl.encoders.loading import without_video
from vla_rl.encoders.small import train_tokenizer

INSTRUCTIONS = ("open the drawer", "press the red button on the left side of the table", "go")
SIZE = 32
CHAT = (
    "{% for m in messages %}User: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": SIZE, "patch_size": 8}


@dataclass(frozen=True)
class Family:
    """How to build one family, and what it can do."""

    build: Callable[[], tuple[Any, Any]]
    vision_cache: bool = True
    lower_cache: bool = True
    joint_views: bool = True
    batched_pixels: bool = True
    used_weights: float = 0.7

    def save(self, directory: Path) -> Path:
        """Write model and processor to `directory`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, processor = self.build()
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
                else:
                    torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        return directory


def tokenizer(**specials: str) -> Any:
    """A tokenizer with extra special tokens as attributes."""
    result = train_tokenizer(INSTRUCTIONS)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=result.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="right",
        extra_special_tokens=specials,
    )
    return wrapped


def text(tok: Any, **more: Any) -> dict[str, Any]:
    """Text configuration shared by decoder-only models."""
    ids = {"pad_token_id": tok.pad_token_id, "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    return {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tok), **ids, **more}


def _siglip_pixels(**more: Any) -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, **more)


def _clip_pixels() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def _blip_pixels() -> Any:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    return BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})


def paligemma(kind: str) -> tuple[Any, Any]:
    pixels = _siglip_pixels()
    pixels.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(pixels, tokenizer())
    config = transformers.PaliGemmaConfig(
        text_config=text(processor.tokenizer, model_type=kind),
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def idefics(name: str) -> tuple[Any, Any]:
    module = __import__(f"transformers.models.{name.lower()}.image_processing_pil_{name.lower()}", fromlist=["x"])
    tok = tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    pixels = getattr(module, f"{name}ImageProcessorPil")(
        size={"longest_edge": 4 * SIZE}, max_image_size={"longest_edge": SIZE}
    )
    processor_class = getattr(transformers, f"{name}Processor")
    parts = {"image_processor": pixels, "tokenizer": tok, "image_seq_len": 4}
    parts["chat_template"] = CHAT.replace("IMAGE", "<image>")
    if "video_processor" in processor_class.get_attributes():
        processor = without_video(processor_class)(video_processor=None, **parts)
    else:
        processor = processor_class(**parts)
    config = getattr(transformers, f"{name}Config")(
        text_config=text(tok, model_type="llama"),
        vision_config=VISION,
        image_token_id=tok.image_token_id,
        pad_token_id=tok.pad_token_id,
        scale_factor=2,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def gemma3() -> tuple[Any, Any]:
    tok = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    pixels = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor = transformers.Gemma3Processor(
        pixels, tok, chat_template=CHAT.replace("IMAGE", "<start_of_image>"), image_seq_length=4
    )
    config = transformers.Gemma3Config(
        text_config=text(tok, sliding_window=64, layer_types=["sliding_attention", "full_attention"]),
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=tok.image_token_id,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def qwen(name: str) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tok = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    pixels = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=SIZE * SIZE, max_pixels=SIZE * SIZE)
    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = without_video(getattr(transformers, f"{name}Processor"))(
        image_processor=pixels, tokenizer=tok, video_processor=None, chat_template=chat
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if name == "Qwen2VL":
        del vision["intermediate_size"], vision["out_hidden_size"]
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    elif name == "Qwen2_5_VL":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    else:
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = getattr(transformers, f"{name.replace('Processor', '')}Config")(
        text_config=text(tok, rope_parameters=rope),
        vision_config=vision,
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        vision_start_token_id=tok.vision_start_token_id,
        vision_end_token_id=tok.vision_end_token_id,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def llava(name: str = "Llava") -> tuple[Any, Any]:
    tok = tokenizer(image_token="<image>")
    processor = transformers.LlavaProcessor(
        _clip_pixels(), tok, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = getattr(transformers, f"{name}Config")(
        text_config=text(tok, model_type="llama"),
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=tok.image_token_id,
        **({"vision_feature_layer": [-1, -2]} if name == "VipLlava" else {}),
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def aya_vision() -> tuple[Any, Any]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = (
        "<image>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE",
        "TILE_GLOBAL",
    )
    tok = tokenizer(**{f"special_{index}": name for index, name in enumerate(names)})
    processor = transformers.AyaVisionProcessor(
        GotOcr2ImageProcessorPil(size={"height": SIZE, "width": SIZE}, crop_to_patches=True),
        tok,
        patch_size=8,
        img_size=SIZE,
        downsample_factor=2,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    config = transformers.AyaVisionConfig(
        text_config=text(tok, model_type="cohere2", layer_types=["sliding_attention", "full_attention"]),
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=tok.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return transformers.AyaVisionForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tok = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    processor = without_video(transformers.InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(size={"height": SIZE, "width": SIZE}, crop_to_patches=True),
        tokenizer=tok,
        video_processor=None,
        image_seq_length=4,
        chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    config = transformers.InternVLConfig(
        text_config=text(tok, model_type="qwen2"),
        vision_config={**VISION, "image_size": [SIZE, SIZE], "patch_size": [8, 8]},
        image_token_id=tok.context_image_token_id,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def blip(name: str, kind: str) -> tuple[Any, Any]:
    tok = tokenizer()
    parts = {"image_processor": _blip_pixels(), "tokenizer": tok, "num_query_tokens": 4}
    if name == "InstructBlip":
        parts["qformer_tokenizer"] = tokenizer()
    processor = getattr(transformers, f"{name}Processor")(**parts)
    qformer = {**SMALL, "encoder_hidden_size": 32, "vocab_size": len(tok)}
    if kind == "opt":
        language = {"model_type": "opt", "vocab_size": len(tok), "hidden_size": 32, "word_embed_proj_dim": 32}
        language |= {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": tok.pad_token_id}
    else:
        language = {"model_type": "t5", "vocab_size": len(tok), "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2}
        language |= {"num_heads": 4, "pad_token_id": tok.pad_token_id, "decoder_start_token_id": tok.pad_token_id}
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION,
        qformer_config=qformer,
        text_config=language,
        num_query_tokens=4,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def florence2() -> tuple[Any, Any]:
    tok = tokenizer(image_token="<image>")
    pixels = _clip_pixels()
    pixels.image_seq_length = 17
    processor = transformers.Florence2Processor(pixels, tok)
    vision = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]}
    vision |= {"patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4]}
    vision |= {"window_size": 4, "projection_dim": 32, "max_position_embeddings": 8, "drop_path_rate": 0.1}
    language = {"model_type": "bart", "vocab_size": len(tok), "d_model": 32, "encoder_layers": 2, "decoder_layers": 1}
    language |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4}
    language |= {"decoder_attention_heads": 4, "pad_token_id": tok.pad_token_id, "is_encoder_decoder": True}
    config = transformers.Florence2Config(
        text_config=language, vision_config=vision, image_token_id=tok.image_token_id, is_encoder_decoder=True
    )
    return transformers.Florence2ForConditionalGeneration(config), processor


def llava_tiles(name: str) -> tuple[Any, Any]:
    """A LLaVA that cuts a picture into tiles and adds a token at the end of each row of patches."""
    tok = tokenizer(image_token="<image>")
    module = f"transformers.models.{name}.image_processing_pil_{name}"
    stem = {"llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[name]
    size = {"height": SIZE, "width": SIZE}
    tiles = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
    next_size = {"size": {"shortest_edge": SIZE}, "crop_size": size}
    pixels = getattr(__import__(module, fromlist=["x"]), f"{stem}ImageProcessorPil")(
        image_grid_pinpoints=tiles, **(next_size if name == "llava_next" else {"size": size})
    )
    processor_class = getattr(transformers, f"{stem}Processor")
    parts = {"image_processor": pixels, "tokenizer": tok, "chat_template": CHAT.replace("IMAGE", "<image>\n")}
    if name == "llava_next":
        strategy, kind = "default", "clip_vision_model"
        processor = processor_class(
            patch_size=8, vision_feature_select_strategy=strategy, num_additional_image_tokens=1, **parts
        )
    else:
        strategy, kind = "full", "siglip_vision_model"
        processor = without_video(processor_class)(
            video_processor=None, num_image_tokens=16, vision_feature_select_strategy=strategy, **parts
        )
    config = getattr(transformers, f"{stem}Config")(
        text_config=text(tok, model_type="llama" if name == "llava_next" else "qwen2"),
        vision_config={**VISION, "model_type": kind, "projection_dim": 32},
        image_token_index=tok.image_token_id,
        image_grid_pinpoints=tiles,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    return getattr(transformers, f"{stem}ForConditionalGeneration")(config), processor


def idefics2() -> tuple[Any, Any]:
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    tok = tokenizer(
        image_token="<image>", image_boundary_token="<fake_token_around_image>", end_of_utterance="<end_of_utterance>"
    )
    pixels = Idefics2ImageProcessorPil(size={"shortest_edge": SIZE, "longest_edge": SIZE}, do_image_splitting=False)
    processor = transformers.Idefics2Processor(pixels, tok, 4, chat_template=CHAT.replace("IMAGE", "<image>"))
    resampler = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
    config = transformers.Idefics2Config(
        text_config=text(tok, model_type="mistral", sliding_window=None),
        vision_config=VISION,
        perceiver_config={**resampler, "resampler_head_dim": 8, "num_key_value_heads": 2},
        image_token_id=tok.image_token_id,
    )
    return transformers.Idefics2ForConditionalGeneration(config), processor


def ovis2() -> tuple[Any, Any]:
    from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tok = tokenizer(**{f"mark_{i}": name for i, name in enumerate(("<image>", "<IMG_ATOM>", *marks))})
    processor = transformers.Ovis2Processor(
        Ovis2ImageProcessorPil(size={"height": SIZE, "width": SIZE}),
        tok,
        image_seq_length=4,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    config = transformers.Ovis2Config(
        text_config=text(tok, model_type="qwen2"),
        vision_config={**VISION, "hidden_stride": 2, "vocab_size": 32, "num_visual_indicator_tokens": 5},
        image_token_id=tok.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tok.convert_tokens_to_ids(list(marks)),
        vocab_size=len(tok),
        hidden_size=32,
    )
    return transformers.Ovis2ForConditionalGeneration(config), processor


def deepseek_vl() -> tuple[Any, Any]:
    from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

    tok = tokenizer(image_token="<image_placeholder>")
    processor = transformers.DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size={"height": SIZE, "width": SIZE}),
        tok,
        chat_template=CHAT.replace("IMAGE", "<image_placeholder>"),
        num_image_tokens=16,
    )
    config = transformers.DeepseekVLConfig(
        text_config=text(tok, model_type="llama"),
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_id=tok.image_token_id,
    )
    return transformers.DeepseekVLForConditionalGeneration(config), processor


def janus() -> tuple[Any, Any]:
    """Understands pictures with one tower and draws them with another, which never runs here."""
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    tok = tokenizer(image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
    processor = transformers.JanusProcessor(
        JanusImageProcessorPil(size={"height": SIZE, "width": SIZE}),
        tok,
        chat_template=CHAT.replace("IMAGE", "<image_placeholder>"),
        num_image_tokens=16,
    )
    painter = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "num_res_blocks": 1}
    painter |= {"channel_multiplier": [1, 1], "projection_dim": 32, "image_token_embed_dim": 32}
    config = transformers.JanusConfig(
        text_config=text(tok, model_type="llama"),
        vision_config={**VISION, "mlp_ratio": 2.0, "projection_dim": 32, "num_image_tokens": 16},
        vq_config=painter,
        image_token_id=tok.image_token_id,
    )
    return transformers.JanusForConditionalGeneration(config), processor


def glm4v() -> tuple[Any, Any]:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    tok = tokenizer(
        image_token="<|image|>",
        video_token="<|video|>",
        begin_image="<|begin_of_image|>",
        end_image="<|end_of_image|>",
        begin_video="<|begin_of_video|>",
        end_video="<|end_of_video|>",
    )
    pixels = Glm4vImageProcessorPil(patch_size=8, size={"shortest_edge": SIZE * SIZE, "longest_edge": 2 * SIZE * SIZE})
    chat = CHAT.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>")
    processor = without_video(transformers.Glm4vProcessor)(
        image_processor=pixels, tokenizer=tok, video_processor=None, chat_template=chat
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "image_size": SIZE}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    marks = ("image_start", "image_end", "video_start", "video_end")
    names = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    config = transformers.Glm4vConfig(
        text_config=text(tok, rope_parameters=rope),
        vision_config=vision | {"patch_size": 8, "out_hidden_size": 32},
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        **{f"{mark}_token_id": tok.convert_tokens_to_ids(name) for mark, name in zip(marks, names, strict=True)},
    )
    return transformers.Glm4vForConditionalGeneration(config), processor


def mllama() -> tuple[Any, Any]:
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    tok = tokenizer(image_token="<|image|>", python_token="<|python_tag|>")
    processor = transformers.MllamaProcessor(
        MllamaImageProcessorPil(size={"height": SIZE, "width": SIZE}, max_image_tiles=4),
        tok,
        chat_template=CHAT.replace("IMAGE", "<|image|>"),
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 4, "image_size": SIZE, "patch_size": 8, "intermediate_layers_indices": [1]}
    config = transformers.MllamaConfig(
        text_config=text(tok, cross_attention_layers=[1]),
        vision_config=vision | {"vision_output_dim": 64},
        image_token_index=tok.image_token_id,
    )
    return transformers.MllamaForConditionalGeneration(config), processor


FAMILIES: dict[str, Family] = {
    "paligemma": Family(lambda: paligemma("gemma")),
    "paligemma2": Family(lambda: paligemma("gemma2")),
    "smolvlm": Family(lambda: idefics("SmolVLM")),
    "idefics3": Family(lambda: idefics("Idefics3")),
    "gemma3": Family(gemma3),
    "qwen2_vl": Family(lambda: qwen("Qwen2VL")),
    "qwen2_5_vl": Family(lambda: qwen("Qwen2_5_VL")),
    "qwen3_vl": Family(lambda: qwen("Qwen3VL")),
    "llava": Family(llava),
    "vipllava": Family(lambda: llava("VipLlava")),
    "internvl": Family(internvl),
    "aya_vision": Family(aya_vision),
    "blip2_opt": Family(lambda: blip("Blip2", "opt"), joint_views=False),
    "blip2_t5": Family(lambda: blip("Blip2", "t5"), lower_cache=False, joint_views=False),
    "instructblip": Family(lambda: blip("InstructBlip", "opt"), vision_cache=False, joint_views=False),
    "florence2": Family(florence2, vision_cache=False, joint_views=False),
    "llava_next": Family(lambda: llava_tiles("llava_next"), batched_pixels=False),
    "llava_onevision": Family(lambda: llava_tiles("llava_onevision"), joint_views=False, batched_pixels=False),
    "idefics2": Family(idefics2),
    "ovis2": Family(ovis2, vision_cache=False),
    "deepseek_vl": Family(deepseek_vl),
    "janus": Family(janus, used_weights=0.2),
    "glm4v": Family(glm4v),
    "mllama": Family(mllama, vision_cache=False, batched_pixels=False),
}
__all__ = ["FAMILIES", "INSTRUCTIONS", "SIZE", "Family"]
