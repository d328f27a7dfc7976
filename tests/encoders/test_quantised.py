"""Weights in 8 or 4 bits by bitsandbytes, which runs on a CPU too: features, stage 2 on top, and the way to disk."""

import json

import numpy as np
import pytest
import torch
from tiny import HEAD, INSTRUCTIONS, differing, parameters
from transformers import BitsAndBytesConfig

from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics
from vla_rl.encoders import FrozenVLMEncoder, LoRASettings, small_vlm
from vla_rl.heads import GaussianHead
from vla_rl.policy import VLAPolicy
from vla_rl.sl.supervised import SLConfig, feature_source, train_supervised

pytest.importorskip("bitsandbytes")
TEXTS = list(INSTRUCTIONS[:2])


def config(bits: int, **more) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32, **more
    )


def frames(count=2):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small VLM, saved as an encoder (`source` None) and as a model of the hub (`source` its folder)."""
    # On a CPU, 4 bits want sizes in multiples of 64.
    encoder = small_vlm(INSTRUCTIONS, image_size=32, patch_size=16, width=192, vision_layers=1, text_layers=2, heads=2)
    path = tmp_path_factory.mktemp("whole")
    encoder.save_pretrained(path / "encoder")
    for part in (encoder.model, encoder.processor):
        part.save_pretrained(path / "model")
    return encoder, path


def error_of(encoder, whole):
    actual, expected = encoder.encode(frames(), TEXTS), whole.encode(frames(), TEXTS)
    difference = (actual.tokens - expected.tokens)[expected.mask].float()
    return float(difference.std() / expected.tokens[expected.mask].float().std())


def test_features_stay_close_and_closer_with_more_bits(whole):
    encoder, path = whole
    errors = {}
    for bits in (8, 4):
        quantised = FrozenVLMEncoder.from_pretrained(path / "encoder", quantization_config=config(bits))
        errors[bits] = error_of(quantised, encoder)
        assert sum(not weight.is_floating_point() for weight in quantised.model.parameters()) > 10
        assert quantised.fingerprint != encoder.fingerprint
        with pytest.raises(ValueError, match="quantised weights cannot learn"):
            quantised.add_lora(LoRASettings(r=2, alpha=4))
            with quantised.trainable("text"):
                pass
    assert 1e-4 < errors[8] < 0.1
    assert errors[8] < errors[4] < 0.4


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.1), (4, 1e-3)])
def test_gradients_pass_through_quantised_layers_as_through_the_weights_they_stand_for(whole, bits, tolerance):
    _, path = whole
    encoders = [FrozenVLMEncoder.from_pretrained(path / "encoder", quantization_config=config(bits)) for _ in "ab"]
    encoders[1].model.dequantize()
    gradients = []
    for encoder in encoders:
        encoder.encode(frames(), TEXTS)  # without gradients first, as a rollout does
        torch.manual_seed(0)
        encoder.add_lora(LoRASettings(r=2, alpha=4))
        with encoder.trainable("lora") as adapter:
            for weight in adapter:
                weight.data.normal_(0, 0.1)
            encoder.forward(frames(), TEXTS).tokens.sin().mean().backward()
            gradients.append([weight.grad.clone() for weight in adapter])
    for quantised, exact in zip(*gradients, strict=True):
        assert exact.norm() > 0 and (quantised - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("saved_as", ["encoder", "model"])
def test_stage_2_on_quantised_weights_and_back_from_disk(whole, expert_path, tmp_path, bits, saved_as):
    _, path = whole
    torch.manual_seed(0)
    encoder = FrozenVLMEncoder.from_pretrained(
        path / saved_as, quantization_config=config(bits), lora=LoRASettings(r=4, alpha=8, top_layers=1)
    )
    with EpisodeStore(expert_path, mode="r") as store:
        statistics, sampler = compute_statistics([store]), BalancedSampler([store], batch_size=16, seed=0)
        policy = VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 2, state_dim=2, **HEAD), statistics=statistics)
        source = type(feature_source(policy, sampler, scope="lora", rows_at_once=16)).__name__
        before, losses = parameters(encoder), []
        train_supervised(
            policy,
            sampler,
            config=SLConfig(steps=30, batch_size=16, scope="lora", encoder_learning_rate=3e-3, learning_rate=3e-3),
            on_step=lambda _, loss: losses.append(loss),
        )
        obs = {key: value[:2] for key, value in store[0].observations.items()}
    assert source == "CachedLower"  # quantised layers below the adapter run once per frame
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    changed = differing(before, parameters(encoder))
    assert changed and all("lora_" in name for name in changed)

    policy.save_pretrained(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "encoder" / "encoder.json").read_text())
    assert settings["weights"] == (saved_as == "encoder") and settings["quantization"][f"_load_in_{bits}bit"]
    again = VLAPolicy.from_pretrained(tmp_path / "a")
    assert again.encoder.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(again.act(obs, TEXTS), policy.act(obs, TEXTS))
    again.save_pretrained(tmp_path / "b")
    third = VLAPolicy.from_pretrained(tmp_path / "b")
    np.testing.assert_array_equal(third.act(obs, TEXTS), policy.act(obs, TEXTS))


def test_saved_quantisation_can_be_left_out(whole, tmp_path):
    encoder, path = whole
    quantised = FrozenVLMEncoder.from_pretrained(path / "model", quantization_config=config(4))
    quantised.save_pretrained(tmp_path / "saved")
    loaded = FrozenVLMEncoder.from_pretrained(tmp_path / "saved", quantization_config=False)
    assert all(weight.is_floating_point() for weight in loaded.model.parameters())
    assert error_of(loaded, encoder) == 0 < error_of(quantised, encoder)


def test_nonsense_for_a_quantisation_is_refused(whole, tmp_path):
    _, path = whole
    quantised = FrozenVLMEncoder.from_pretrained(path / "model", quantization_config=config(8))
    quantised.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "encoder.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization": {"quant_method": "magic"}}))
    with pytest.raises(ValueError, match="describes no quantisation of weights"):
        FrozenVLMEncoder.from_pretrained(tmp_path / "saved")
