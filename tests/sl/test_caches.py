from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import INSTRUCTIONS, tiny_policy, toy_store

from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics, reencode
from vla_rl.encoders import LoRASettings, small_vlm
from vla_rl.heads import GaussianHead
from vla_rl.policy import VLAPolicy
from vla_rl.sl import caches
from vla_rl.sl.caches import CachedFeatures, CachedLower, CachedVision, feature_source
from vla_rl.sl.supervised import SLConfig, train_supervised


@pytest.fixture(scope="module")
def store(expert_path):
    with EpisodeStore(expert_path, mode="r") as store:
        yield store


def deep_policy(store) -> VLAPolicy:
    """Three text layers, with a trained-looking adapter on the last."""
    size = {"image_size": 32, "patch_size": 16, "width": 32, "vision_layers": 1, "text_layers": 3}
    encoder = small_vlm(INSTRUCTIONS, **size, heads=2)
    torch.manual_seed(0)
    encoder.add_lora(LoRASettings(r=4, alpha=8, top_layers=1))
    for name, weight in encoder.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.1)
    head = GaussianHead(encoder.feature_dim, 2, state_dim=2, width=16, num_queries=2, hidden_dim=16)
    return VLAPolicy(encoder, head, statistics=compute_statistics([store]))


def sampler_of(store, batch_size=16):
    return BalancedSampler([store], batch_size=batch_size, seed=0)


def test_an_adapter_on_top_runs_what_lies_below_once_per_row(store):
    policy, sampler = deep_policy(store), sampler_of(store)
    source = feature_source(policy, sampler, scope="lora")
    assert isinstance(source, CachedLower)
    language, tower = policy.encoder.model.model.language_model, policy.encoder.model.get_encoder(modality="image")
    parts = {"tower": tower, "below": language.layers[1].mlp, "top": language.layers[2].mlp}
    rows = dict.fromkeys(parts, 0)

    def count(name):
        def hook(module, args, output):
            rows[name] += len(output if isinstance(output, torch.Tensor) else output[0])

        return hook

    for name, part in parts.items():
        part.register_forward_hook(count(name))
    seen, sampled = set(), 0
    with policy.encoder.trainable("lora") as adapter:
        for _ in range(4):
            batch = sampler.sample()
            seen |= set(batch.row_id.tolist())
            sampled += len(batch)
            cached = source(batch)
            direct = policy.encoder.forward(batch.images, batch.instructions)
            for features in (cached, direct):
                assert torch.equal(features.mask, direct.mask)
            gradients = [
                torch.autograd.grad(features.tokens[features.mask].sin().mean(), adapter)
                for features in (cached, direct)
            ]
            for first, second in zip(*gradients, strict=True):
                torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)
    assert rows == {"tower": len(seen) + sampled, "below": len(seen) + sampled, "top": 2 * sampled}


def test_a_model_that_needs_its_pixels_falls_back_and_says_so(store):
    policy = deep_policy(store)
    policy.encoder.supports_vision_cache = False
    with pytest.warns(UserWarning, match="computed for every batch: PaliGemma.* takes no precomputed vision tokens"):
        source = feature_source(policy, sampler_of(store), scope="lora")
    batch = sampler_of(store).sample()
    expected = policy.encoder.forward(batch.images, batch.instructions)
    assert torch.equal(source(batch).tokens, expected.tokens)


def test_an_adapter_on_every_layer_keeps_vision_tokens_alone(store):
    policy = tiny_policy(statistics=compute_statistics([store]))
    policy.encoder.add_lora(LoRASettings(r=2, alpha=4))
    assert isinstance(feature_source(policy, sampler_of(store), scope="lora"), CachedVision)


@pytest.mark.parametrize("scope", ["head", "lora"])
def test_a_cache_in_a_file_holds_the_same_and_leaves_no_name(store, tmp_path, scope):
    policy = deep_policy(store)
    in_ram = feature_source(policy, sampler_of(store), scope=scope)
    in_file = feature_source(policy, sampler_of(store), scope=scope, directory=tmp_path / "cache", rows_at_once=7)
    batch = sampler_of(store).sample()
    torch.testing.assert_close(in_file(batch).tokens, in_ram(batch).tokens, rtol=1e-3, atol=1e-3)
    assert str(tmp_path / "cache") in Path("/proc/self/maps").read_text()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(("scope", "moved"), [("head", {"vision", "lower", "top"}), ("lora", {"vision", "lower"})])
def test_offloading_moves_what_is_not_needed_and_changes_no_number(store, monkeypatch, scope, moved):
    names = set()
    original = caches.moved_away

    def record(modules, device):
        assert device == torch.device("cpu")
        tower = policy.encoder.model.get_encoder(modality="image")
        layers = policy.encoder.model.model.language_model.layers
        inside = {id(child) for module in modules for child in module.modules()}
        parts = {"vision": tower, "lower": layers[1], "top": layers[2]}
        names.update(name for name, part in parts.items() if id(part) in inside)
        return original(modules, device)

    monkeypatch.setattr(caches, "moved_away", record)
    monkeypatch.setattr("vla_rl.encoders.lower.moved_away", record)
    losses = []
    for offload in (False, True):
        policy = deep_policy(store)
        losses.append(
            train_supervised(
                policy, sampler_of(store), config=SLConfig(steps=3, batch_size=16, scope=scope, offload=offload)
            )
        )
        assert bool(names) == offload
    assert names == moved
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    batch = sampler_of(store).sample()
    assert torch.isfinite(policy.encoder.encode(batch.images, batch.instructions).tokens).all()


@pytest.fixture
def own_store(tmp_path):
    return toy_store(tmp_path / "own", ("reach-red", "reach-blue"), episodes=2)


def test_features_that_a_store_holds_are_read_and_no_frame_is_encoded(own_store):
    policy = tiny_policy()
    reencode(own_store, policy.encoder)
    with EpisodeStore(own_store, mode="r") as store:
        policy.encoder.num_frames = policy.encoder.num_forwards = 0
        source, sampler = CachedFeatures(policy, sampler_of(store)), sampler_of(store)
        rows = set()
        for _ in range(5):
            batch = sampler.sample()
            rows |= set(batch.row_id.tolist())
            stored = source(batch)
            assert policy.encoder.num_frames == policy.encoder.num_forwards == 0
            fresh = tiny_policy().encoder.encode(batch.images, batch.instructions)
            width = fresh.tokens.shape[1]
            assert torch.equal(stored.mask[:, :width], fresh.mask) and not stored.mask[:, width:].any()
            torch.testing.assert_close(
                stored.tokens[:, :width][fresh.mask], fresh.tokens[fresh.mask], atol=5e-3, rtol=0
            )
    assert (source.num_read, source.num_computed) == (len(rows), 0)


def test_episodes_without_features_and_features_of_another_encoder_are_computed(own_store, tmp_path):
    policy = tiny_policy()
    reencode(own_store, policy.encoder)
    more = toy_store(tmp_path / "more", ("reach-green",), episodes=1)
    with EpisodeStore(own_store, mode="r") as old, EpisodeStore(more, mode="r") as new:
        sampler = BalancedSampler([old, new], batch_size=4, seed=0)
        source = CachedFeatures(policy, sampler)
        source.rows.fill()
        assert (source.num_read, source.num_computed) == (old.total_steps, new.total_steps)
        other = CachedFeatures(tiny_policy(seed=1), sampler)
        other(sampler.rows(np.arange(6)))
        assert (other.num_read, other.num_computed) == (0, 6)
