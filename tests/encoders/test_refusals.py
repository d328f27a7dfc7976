"""What cannot be an encoder is refused when it is made, with the reason."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from families import llava
from safetensors.torch import load_file, save_file

from vla_rl.encoders import FrozenVLMEncoder, small_vlm
from vla_rl.encoders.loading import load_model

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = {"image_size": 32, "patch_size": 16}


@pytest.fixture(scope="module")
def parts():
    encoder = small_vlm(("go",), image_size=32, width=32, vision_layers=1, text_layers=1, heads=2)
    return encoder.model, encoder.processor


def test_a_text_model_takes_no_images(parts):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM takes no pixel_values, so it cannot see"):
        FrozenVLMEncoder(model, parts[1])


def test_an_image_model_reads_no_instruction(parts):
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, **PIXELS))
    with pytest.raises(ValueError, match=r"SiglipVisionModel takes no input_ids, so it cannot .*read instructions"):
        FrozenVLMEncoder(model, parts[1])


def test_two_towers_beside_each_other_have_no_hidden_states_of_both(parts):
    config = transformers.CLIPConfig(
        text_config={**TEXT, "max_position_embeddings": 16}, vision_config={**VISION, **PIXELS}, projection_dim=16
    )
    with pytest.raises(ValueError, match=r"CLIPModel shows no hidden states|CLIPConfig names no image token"):
        FrozenVLMEncoder(transformers.CLIPModel(config), parts[1])


def test_a_directory_of_such_a_model_is_refused_too(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaConfig"):
        load_model(str(tmp_path), revision=None, trust_remote_code=False)


def test_a_model_saved_without_its_processor_is_refused(tmp_path, parts):
    parts[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model without its processor.*AutoProcessor.*save_pretrained\('"):
        FrozenVLMEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "image_processor"])
def test_half_a_processor_is_refused(parts, part):
    half = SimpleNamespace(**{name: getattr(parts[1], name) for name in {"tokenizer", "image_processor"} - {part}})
    with pytest.raises(ValueError, match=f"SimpleNamespace has no {part}"):
        FrozenVLMEncoder(parts[0], half)


class RaggedProcessor:
    """Gives lists of positions beside each other, of another length for every prompt, that no padding can align."""

    def __init__(self, inner):
        self.inner, self.tokenizer, self.image_processor = inner, inner.tokenizer, inner.image_processor
        self.image_token = inner.image_token

    def __call__(self, images, text, return_tensors, **options):
        inputs = self.inner(images=images, text=text, return_tensors=return_tensors, **options)
        length = inputs["input_ids"].shape[1]
        return {**inputs, "position_ids": torch.arange(length).expand(3, 1, length)}


class MasklessProcessor(RaggedProcessor):
    """Says that half of each prompt is padding."""

    def __call__(self, images, text, return_tensors, **options):
        inputs = dict(self.inner(images=images, text=text, return_tensors=return_tensors, **options))
        inputs["attention_mask"] = torch.arange(inputs["input_ids"].shape[1])[None] % 2
        return inputs


@pytest.mark.parametrize(
    ("kind", "message"), [(RaggedProcessor, "do not stack"), (MasklessProcessor, "a mask of their lengths")]
)
def test_a_processor_that_cannot_batch_is_refused(kind, message):
    model, processor = llava()
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot batch: .*{message}"):
        FrozenVLMEncoder(model, kind(processor))


def test_a_prompt_without_an_image_is_refused(parts, monkeypatch):
    class Blind(RaggedProcessor):
        def __call__(self, images, text, return_tensors, **options):
            ids = torch.arange(3)[None]
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1, 3, 32, 32)}

    with pytest.raises(ValueError, match="Blind put no image token"):
        FrozenVLMEncoder(parts[0], Blind(parts[1]))


@pytest.mark.parametrize("arguments", [{"views": "both"}, {"truncate_layers": 2}, {"truncate_layers": 0}, {"layer": 1}])
def test_settings_that_the_model_has_not_are_refused(arguments):
    encoder = small_vlm(("go",), image_size=32, width=32, vision_layers=1, text_layers=1, heads=2)
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.*expected"):
        FrozenVLMEncoder(encoder.model, encoder.processor, **arguments)


def test_no_layers_is_not_taken_for_all_layers(tmp_path, parts):
    for part in parts:
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="truncate_layers=0, expected 1 to 1"):
        FrozenVLMEncoder.from_pretrained(tmp_path, truncate_layers=0)


def test_a_folder_that_is_not_there_and_a_type_by_name_are_refused(tmp_path):
    for missing in (tmp_path / "nothing", "./nothing", "runs/demo/nothing"):
        with pytest.raises(FileNotFoundError, match=r"nothing is no directory.*hub id 'org/name'"):
            FrozenVLMEncoder.from_pretrained(missing)
    with pytest.raises(TypeError, match=r"dtype='bfloat16', expected .* torch.bfloat16"):
        FrozenVLMEncoder.from_pretrained("org/name", dtype="bfloat16")


def test_lower_hidden_states_of_other_instructions_are_refused():
    from vla_rl.encoders import LoRASettings

    encoder = small_vlm(("go", "open it"), image_size=32, width=32, vision_layers=1, text_layers=2, heads=2)
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="no text layer lies below the adapter"):
        encoder.encode_lower(frames, ["go", "go"])
    encoder.add_lora(LoRASettings(r=2, alpha=2, top_layers=1))
    lower = encoder.encode_lower(frames, ["go", "go"])
    with pytest.raises(ValueError, match=r"for 2 instructions of up to \d+ tokens"):
        encoder.forward(None, ["go", "put the bowl beside the plate"], lower=lower)
    with pytest.raises(ValueError, match="exactly one"):
        encoder.forward(frames, ["go", "go"], lower=lower)


def test_a_saved_encoder_runs_no_code_unasked(tmp_path):
    encoder = small_vlm(["open the drawer"], image_size=32, width=48, vision_layers=1, text_layers=1, heads=2)
    encoder.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "encoder.json").read_text())
    (tmp_path / "saved" / "encoder.json").write_text(json.dumps(settings | {"trust_remote_code": True}))
    with pytest.raises(ValueError, match="trust_remote_code=True if you trust it"):
        FrozenVLMEncoder.from_pretrained(tmp_path / "saved")
    again = FrozenVLMEncoder.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.fingerprint == encoder.fingerprint


def test_a_checkpoint_that_lacks_weights_is_no_encoder(tmp_path):
    encoder = small_vlm(["open the drawer"], image_size=32, width=48, vision_layers=1, text_layers=1, heads=2)
    encoder.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name)
    save_file({key.replace(name, f"{name}_old"): value for key, value in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, such as .*q_proj"):
        FrozenVLMEncoder.from_pretrained(tmp_path / "saved")
