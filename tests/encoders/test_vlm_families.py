"""Every supported model family, tiny, through the code that loads hub weights."""

import numpy as np
import pytest
import torch
from families import FAMILIES, INSTRUCTIONS, SIZE

from vla_rl.encoders import FrozenVLMEncoder, LoRASettings
from vla_rl.encoders.loading import load_model, text_backbone, text_layers
from vla_rl.encoders.lower import why_no_lower_cache

EXACT = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    if request.param == "smolvlm":
        # transformers demands this package for spelling out numbers of video frames, which never happens here.
        import transformers.models.smolvlm.processing_smolvlm as module

        module.num2words = module.num2words or str
    path = FAMILIES[request.param].save(tmp_path_factory.mktemp(request.param))
    return request.param, path


@pytest.fixture
def encoder(family):
    torch.set_num_threads(1)
    encoder = FrozenVLMEncoder.from_pretrained(family[1])
    encoder.feature_dtype = torch.float32
    return encoder


def frames(count: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def reference(encoder: FrozenVLMEncoder, frame: np.ndarray, instruction: str) -> torch.Tensor:
    """The last hidden states by transformers alone: its processor, the whole model, no hook, no padding."""
    inputs = encoder._prompts.process(frame, instruction)
    inputs.pop("labels", None)
    text = encoder.model.config.get_text_config()
    encoder_decoder = text.is_encoder_decoder or encoder.model.config.is_encoder_decoder
    if encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        output = encoder.model(**inputs, output_hidden_states=True)
    output = getattr(output, "language_model_outputs", None) or output
    return (output.encoder_last_hidden_state if encoder_decoder else output.hidden_states[-1])[0]


def test_features_are_the_last_hidden_states_whatever_else_is_in_the_batch(encoder):
    images = frames(3)
    features = encoder.encode(images, INSTRUCTIONS)
    lengths = features.mask.sum(1).tolist()
    assert features.tokens.shape == (3, max(lengths), encoder.feature_dim)
    assert len(set(lengths)) == 3
    assert torch.isfinite(features.tokens[features.mask]).all()
    for row, instruction in enumerate(INSTRUCTIONS):
        expected = reference(encoder, images[row], instruction)
        assert features.mask[row].tolist() == [True] * len(expected) + [False] * (max(lengths) - len(expected))
        torch.testing.assert_close(features.tokens[row, : len(expected)], expected, **EXACT)
        alone = encoder.encode(images[row : row + 1], [instruction])
        torch.testing.assert_close(alone.tokens[0], expected, **EXACT)


def test_image_and_instruction_matter(encoder):
    images = frames(2)
    twice = encoder.encode(np.stack([images[0], images[0]]), ["open the drawer", "press the red"])
    other = encoder.encode(images, ["open the drawer"] * 2)
    assert (twice.tokens[0, -1] - twice.tokens[1, -1]).abs().max() > 1e-3
    assert (other.tokens[0] - other.tokens[1]).abs().max() > 1e-3


def test_frames_are_resized_as_the_processor_does(family, encoder):
    images = frames(2, 44)
    assert encoder.encode(images, ["go", "go"]).tokens.shape[0] == 2
    assert encoder._pixels.uses_torch((44, 44)) == FAMILIES[family[0]].batched_pixels
    expected = torch.cat([encoder._prompts.process(image, "go")["pixel_values"] for image in images])
    actual = encoder._pixels(torch.from_numpy(images))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 0.02
    assert (actual - expected).abs().mean() < 0.002


def test_views_are_encoded_singly_and_joined(encoder):
    images = frames(4).reshape(2, 2, SIZE, SIZE, 3)
    features = encoder.encode(images, INSTRUCTIONS[:2])
    left = encoder.encode(images[:, 0], INSTRUCTIONS[:2])
    right = encoder.encode(images[:, 1], INSTRUCTIONS[:2])
    torch.testing.assert_close(features.tokens, torch.cat([left.tokens, right.tokens], dim=1), **EXACT)
    assert torch.equal(features.mask, torch.cat([left.mask, right.mask], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_vision_tokens_give_the_same_bits(family, dtype):
    encoder = FrozenVLMEncoder.from_pretrained(family[1], dtype=dtype)
    images = frames(2)
    assert encoder.supports_vision_cache == FAMILIES[family[0]].vision_cache
    if not encoder.supports_vision_cache:
        with pytest.raises(NotImplementedError, match="pass images"):
            encoder.encode_vision(images)
        return
    expected = encoder.forward(images, INSTRUCTIONS[:2])
    vision = encoder.encode_vision(images)
    fresh = FrozenVLMEncoder.from_pretrained(family[1], dtype=dtype)
    fresh.image_size = (SIZE, SIZE)
    for taker in (encoder, fresh):
        assert torch.equal(taker.forward(None, INSTRUCTIONS[:2], vision=vision).tokens, expected.tokens)
    views = encoder.encode_vision(images[:, None])
    assert views.shape == (2, 1, *vision.shape[1:])
    assert torch.equal(encoder.forward(None, INSTRUCTIONS[:2], vision=views).tokens, expected.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_from_kept_lower_hidden_states_are_bit_equal(family, dtype):
    encoder = FrozenVLMEncoder.from_pretrained(family[1], dtype=dtype)
    encoder.add_lora(LoRASettings(r=2, alpha=4, top_layers=1))
    images = frames(3)
    reason = why_no_lower_cache(encoder, images, INSTRUCTIONS)
    if not FAMILIES[family[0]].vision_cache:
        assert "takes no precomputed vision tokens" in reason
        return
    if not FAMILIES[family[0]].lower_cache:
        assert "does not run without its first 1 text layers" in reason
        return
    assert reason is None
    with encoder.trainable("lora") as parameters:
        for parameter in parameters:
            parameter.data.normal_(0, 0.1)
        lower = torch.nn.functional.pad(encoder.encode_lower(images, INSTRUCTIONS), (0, 0, 0, 2), value=7.0)
        results = []
        for arguments in ({"images": images}, {"images": None, "lower": lower}):
            encoder.zero_grad()
            tokens = encoder.forward(instructions=INSTRUCTIONS, **arguments).tokens
            tokens.square().sin().mean().backward()
            results.append([tokens.detach(), *(parameter.grad.clone() for parameter in parameters)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in results[0][1:])


def test_truncated_is_what_transformers_builds_with_fewer_layers(family, encoder, tmp_path):
    images = frames(2)
    truncated = FrozenVLMEncoder.from_pretrained(family[1], truncate_layers=1)
    truncated.feature_dtype = torch.float32
    assert sum(p.numel() for p in truncated.parameters()) < sum(p.numel() for p in encoder.parameters())

    text = encoder.model.config.get_text_config()
    names = {"num_hidden_layers", "num_layers", "encoder_layers"} & set(vars(text))
    overrides = dict.fromkeys(names, 1) | ({"layer_types": text.layer_types[:1]} if "layer_types" in vars(text) else {})
    config = type(encoder.model.config).from_pretrained(family[1])
    for name, value in overrides.items():
        setattr(config.get_text_config(), name, value)
    model = type(encoder.model).from_pretrained(family[1], config=config)
    assert len(text_layers(text_backbone(model))) == 1
    expected = FrozenVLMEncoder(model, encoder.processor)
    expected.feature_dtype = torch.float32
    tokens = truncated.encode(images, INSTRUCTIONS[:2]).tokens
    assert torch.equal(tokens, expected.encode(images, INSTRUCTIONS[:2]).tokens)

    for path, full in ((tmp_path / "source", False), (tmp_path / "weights", True)):
        if full:
            truncated.source = None
        truncated.save_pretrained(path)
        assert (path / "model").exists() == full
        again = FrozenVLMEncoder.from_pretrained(path)
        assert again.fingerprint == truncated.fingerprint
        assert len(text_layers(text_backbone(again.model))) == 1
    assert len(text_layers(text_backbone(load_model(path / "model", revision=None, trust_remote_code=False)))) == 1


def test_joint_views_share_a_prompt_each_at_its_own_image_tokens(family):
    images = frames(6).reshape(2, 3, SIZE, SIZE, 3)
    if not FAMILIES[family[0]].joint_views:
        with pytest.raises(ValueError, match=r"in one prompt.*views='separate'"):
            FrozenVLMEncoder.from_pretrained(family[1], views="joint")
        return
    inputs, separate = (
        FrozenVLMEncoder.from_pretrained(family[1], views=views, layer=0) for views in ("joint", "separate")
    )
    inputs.feature_dtype = separate.feature_dtype = torch.float32
    features = inputs.encode(images, INSTRUCTIONS[:2])
    assert inputs.num_frames == 6 and inputs.num_forwards == 1
    for row, instruction in enumerate(INSTRUCTIONS[:2]):
        ids = inputs._prompts.get(instruction, (SIZE, SIZE), views=3)["input_ids"][0]
        at = ids == inputs._prompts.image_token_id
        single = separate._prompts.get(instruction, (SIZE, SIZE))["input_ids"][0] == inputs._prompts.image_token_id
        alone = [separate.encode(images[row, view : view + 1], [instruction]).tokens[0, single] for view in range(3)]
        torch.testing.assert_close(features.tokens[row, : len(ids)][at], torch.cat(alone), **EXACT)
    joint = FrozenVLMEncoder.from_pretrained(family[1], views="joint")
    whole = joint.forward(images, INSTRUCTIONS[:2])
    assert whole.tokens.shape[1] < separate.encode(images, INSTRUCTIONS[:2]).tokens.shape[1]
    if joint.supports_vision_cache:
        vision = joint.encode_vision(images)
        assert torch.equal(joint.forward(None, INSTRUCTIONS[:2], vision=vision).tokens, whole.tokens)
    assert joint.fingerprint != FrozenVLMEncoder.from_pretrained(family[1]).fingerprint


def test_lora_starts_as_identity_learns_and_freezes_again(family, encoder, tmp_path):
    images = frames(2)
    before, print_before = encoder.encode(images, INSTRUCTIONS[:2]), encoder.fingerprint
    encoder.add_lora(LoRASettings(r=2, alpha=4, top_layers=1))
    assert torch.equal(encoder.encode(images, INSTRUCTIONS[:2]).tokens, before.tokens)
    with encoder.trainable("lora") as parameters:
        assert {id(p) for p in parameters} == {id(p) for p in encoder.parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            encoder.forward(images, INSTRUCTIONS[:2]).tokens.square().sin().mean().backward()
            optimizer.step()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    assert not any(p.requires_grad for p in encoder.parameters())
    after = encoder.encode(images, INSTRUCTIONS[:2])
    assert (after.tokens - before.tokens).abs().max() > 1e-6
    assert encoder.fingerprint != print_before

    encoder.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model").exists()
    loaded = FrozenVLMEncoder.from_pretrained(tmp_path / "adapter")
    loaded.feature_dtype = torch.float32
    assert loaded.fingerprint == encoder.fingerprint
    assert torch.equal(loaded.encode(images, INSTRUCTIONS[:2]).tokens, after.tokens)


def test_all_weights_train_and_travel_with_the_checkpoint(family, tmp_path):
    encoder = FrozenVLMEncoder.from_pretrained(family[1], dtype=torch.bfloat16)
    images = frames(2)
    print_before = encoder.fingerprint
    with encoder.trainable("all") as parameters:
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        encoder.forward(images, INSTRUCTIONS[:2]).tokens.square().sin().mean().backward()
        assert all(p.grad is not None for p in text_backbone(encoder.model).parameters())
        assert sum(p.grad is not None for p in parameters) > FAMILIES[family[0]].used_weights * len(parameters)
        optimizer.step()
        with torch.no_grad():
            during = encoder.forward(images, INSTRUCTIONS[:2]).tokens
    assert not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(encoder.forward(images, INSTRUCTIONS[:2]).tokens, during)
    assert encoder.fingerprint != print_before
    encoder.save_pretrained(tmp_path / "full")
    loaded = FrozenVLMEncoder.from_pretrained(tmp_path / "full")
    assert loaded.compute_dtype == torch.bfloat16
    assert loaded.fingerprint == encoder.fingerprint
    assert torch.equal(loaded.forward(images, INSTRUCTIONS[:2]).tokens, during)


def test_forwards_and_frames_are_counted(encoder):
    encoder.encode(frames(3), INSTRUCTIONS)
    encoder.encode(frames(4).reshape(2, 2, SIZE, SIZE, 3), INSTRUCTIONS[:2])
    assert (encoder.num_forwards, encoder.num_frames) == (2, 7)


def test_train_mode_changes_nothing(encoder):
    images = frames(2)
    expected = encoder.encode(images, INSTRUCTIONS[:2]).tokens
    encoder.train()
    assert torch.equal(encoder.encode(images, INSTRUCTIONS[:2]).tokens, expected)
    encoder.model.train()
    assert torch.equal(encoder.encode(images, INSTRUCTIONS[:2]).tokens, expected)
