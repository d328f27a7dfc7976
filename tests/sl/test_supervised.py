import sys

import numpy as np
import pytest
import torch
from tiny import differing, parameters, tiny_policy

from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics
from vla_rl.encoders import LoRASettings
from vla_rl.sl.supervised import (
    CachedFeatures,
    SLConfig,
    SupervisedError,
    feature_source,
    random_shift,
    split,
    train_supervised,
)


@pytest.fixture(scope="module")
def store(expert_path):
    with EpisodeStore(expert_path, mode="r") as store:
        yield store


def make_sampler(store, *, batch_size=16, seed=0):
    return BalancedSampler([store], batch_size=batch_size, seed=seed)


def make_policy(store, *, lora=False, seed=0):
    policy = tiny_policy(seed=seed, statistics=compute_statistics([store]))
    if lora:
        torch.manual_seed(seed)
        policy.encoder.add_lora(LoRASettings(r=4, alpha=8))
    return policy


def loss_on(policy, batch):
    with torch.no_grad():
        features = policy.encoder.forward(batch.images, batch.instructions)
        state, actions = policy.normalize_state(batch.state), policy.normalize_action(batch.actions)
        return policy.head.supervised_loss(features, state, actions).item()


@pytest.mark.parametrize("scope", ["head", "lora", "text", "all"])
def test_a_few_steps_of_learning_reach_the_weights_of_the_scope_and_no_others(store, scope):
    policy = make_policy(store, lora=scope == "lora")
    fingerprint, encoder, head = policy.encoder.fingerprint, parameters(policy.encoder), parameters(policy.head)
    train_supervised(policy, make_sampler(store), config=SLConfig(steps=4, scope=scope, weight_decay=0.0))
    changed = differing(encoder, parameters(policy.encoder))
    vision = {name for name in encoder if "vision_tower" in name}
    adapter = {name for name in encoder if "lora_" in name}
    assert vision
    if scope == "head":
        assert changed == set()
    elif scope == "lora":
        assert changed and changed <= adapter
    elif scope == "text":
        assert changed and not changed & vision
    else:
        assert changed & vision and changed - vision
    assert (policy.encoder.fingerprint != fingerprint) == (scope != "head")
    assert "body.pool.queries" in differing(head, parameters(policy.head))
    assert not any(weight.requires_grad for weight in policy.encoder.parameters())


@pytest.mark.slow
def test_a_small_store_is_learned_by_heart(store):
    policy = make_policy(store)
    everything = BalancedSampler([store], batch_size=32, seed=0).rows(np.arange(store.total_steps))
    before = loss_on(policy, everything)
    config = SLConfig(
        steps=500, batch_size=32, scope="all", random_shift=0, learning_rate=3e-3, encoder_learning_rate=3e-3
    )
    reported = train_supervised(policy, make_sampler(store, batch_size=32), config=config)
    after = loss_on(policy, everything)
    assert before > 0.5  # targets have unit variance
    assert after < 0.02
    assert reported == pytest.approx(after, abs=0.02)


def test_the_head_alone_runs_the_vlm_once_per_row(store):
    policy = make_policy(store)
    frames = policy.encoder.num_frames
    source = CachedFeatures(policy, make_sampler(store))
    assert policy.encoder.num_frames == frames
    sampler = make_sampler(store, batch_size=200)
    seen = set()
    for _ in range(6):
        batch = sampler.sample()
        seen |= set(batch.row_id.tolist())
        source(batch)
        assert policy.encoder.num_frames - frames == len(seen)
    assert len(seen) > 0.9 * store.total_steps


def test_cached_features_are_those_of_the_encoder(store):
    policy, sampler = make_policy(store), make_sampler(store)
    source = CachedFeatures(policy, sampler)
    for _ in range(2):
        batch = sampler.sample()
        cached, fresh = source(batch), policy.encoder.encode(batch.images, batch.instructions)
        width = fresh.tokens.shape[1]
        assert torch.equal(cached.mask[:, :width], fresh.mask) and not cached.mask[:, width:].any()
        torch.testing.assert_close(cached.tokens[:, :width][fresh.mask], fresh.tokens[fresh.mask], atol=5e-3, rtol=0)
        assert cached.fingerprint == fresh.fingerprint


def test_cached_features_of_a_changed_encoder_are_refused(store):
    policy, sampler = make_policy(store), make_sampler(store)
    source = CachedFeatures(policy, sampler)
    source(sampler.sample())
    before = policy.encoder.fingerprint
    with policy.encoder.trainable("all") as weights:
        weights[0].data.mul_(1.01)
    with pytest.raises(SupervisedError, match=rf"features are of encoder {before}.*now {policy.encoder.fingerprint}"):
        source(sampler.sample())


def test_vision_tokens_from_the_cache_give_the_loss_of_the_images(store):
    policy, sampler = make_policy(store, lora=True), make_sampler(store)
    with policy.encoder.trainable("lora") as adapter:
        for weight in adapter:
            weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        source = feature_source(policy, sampler, scope="lora")
        for _ in range(2):
            batch = sampler.sample()
            state, actions = policy.normalize_state(batch.state), policy.normalize_action(batch.actions)
            cached = policy.head.supervised_loss(source(batch), state, actions)
            images = policy.head.supervised_loss(
                policy.encoder.forward(batch.images, batch.instructions), state, actions
            )
            torch.testing.assert_close(cached, images, rtol=1e-4, atol=1e-5)
            gradients = [torch.autograd.grad(loss, adapter, retain_graph=True) for loss in (cached, images)]
            for first, second in zip(*gradients, strict=True):
                torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_lora_runs_the_vision_tower_once_per_row(store):
    policy, sampler = make_policy(store, lora=True), make_sampler(store)
    encoded = []
    original = policy.encoder.encode_vision
    policy.encoder.encode_vision = lambda images: encoded.append(len(images)) or original(images)
    source = feature_source(policy, sampler, scope="lora")
    seen = set()
    for _ in range(5):
        batch = sampler.sample()
        seen |= set(batch.row_id.tolist())
        source(batch)
    assert sum(encoded) == len(seen) < 5 * 16


def test_random_shift_by_hand():
    images = torch.arange(4 * 5 * 5 * 3, dtype=torch.uint8).view(4, 5, 5, 3)
    shifted = random_shift(images, 2, generator=torch.Generator().manual_seed(3))
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    places = []
    for image, framed in zip(shifted.numpy(), padded, strict=True):
        crops = {(y, x): framed[y : y + 5, x : x + 5] for y in range(5) for x in range(5)}
        found = [place for place, crop in crops.items() if np.array_equal(crop, image)]
        assert len(found) == 1
        places.append(found[0])
    assert len(set(places)) > 1  # each image by its own
    assert random_shift(images, 0) is images


def test_random_shift_reaches_every_place_and_draws_from_its_generator():
    images = torch.arange(300 * 3 * 3 * 3).remainder(251).to(torch.uint8).view(300, 3, 3, 3)
    first, again, other = (random_shift(images, 1, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    rows = {image[1, 1, 0].item() - original[1, 1, 0].item() for image, original in zip(first, images, strict=True)}
    assert {dy * 9 + dx * 3 for dy in (-1, 0, 1) for dx in (-1, 0, 1)} <= rows


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(store):
    weights = []
    for seed in (0, 0, 1):
        policy = make_policy(store)
        config = SLConfig(steps=5, scope="all", random_shift=2)
        train_supervised(policy, make_sampler(store), config=config, seed=seed)
        weights.append(parameters(policy))
    assert not differing(weights[0], weights[1])
    assert differing(weights[0], weights[2])


@pytest.mark.parametrize("steps", [1, 2, 10, 11])
def test_any_number_of_steps_runs(store, steps):
    losses = []
    policy = make_policy(store)
    result = train_supervised(
        policy,
        make_sampler(store),
        config=SLConfig(steps=steps, scope="head"),
        on_step=lambda step, loss: losses.append((step, loss)),
    )
    assert [step for step, _ in losses] == list(range(steps))
    assert result == pytest.approx(losses[-1][1])


def test_a_loss_that_is_not_finite_stops_the_training(store):
    policy = make_policy(store)
    with torch.no_grad():
        policy.head.mean.bias[0] = float("nan")
    with pytest.raises(SupervisedError, match=r"loss is nan at step 0.*learning rates"):
        train_supervised(policy, make_sampler(store), config=SLConfig(steps=2, scope="head"))


def test_lora_without_an_adapter_is_refused(store):
    with pytest.raises(ValueError, match="no LoRA adapter"):
        train_supervised(make_policy(store), make_sampler(store), config=SLConfig(steps=2, scope="lora"))


def test_an_interrupted_training_leaves_the_encoder_frozen(store):
    policy = make_policy(store)

    def interrupt(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_supervised(policy, make_sampler(store), config=SLConfig(steps=3, scope="all"), on_step=interrupt)
    assert not any(weight.requires_grad for weight in policy.encoder.parameters())
    with policy.encoder.trainable("all"):
        pass


def gradients_of_one_step(store, monkeypatch, **config):
    """Gradients of head and encoder as the optimiser sees them, by name."""
    seen = {}
    policy = make_policy(store, lora=config.get("scope") == "lora")

    def record(weights, limit):
        names = {id(weight): name for name, weight in policy.named_parameters()}
        seen.update({names[id(weight)]: weight.grad.clone() for weight in weights if weight.grad is not None})
        return torch.zeros(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    config = SLConfig(steps=1, batch_size=16, random_shift=0, **config)
    loss = train_supervised(policy, make_sampler(store), config=config)
    return loss, seen


@pytest.mark.parametrize("scope", ["head", "lora", "all"])
def test_accumulated_gradients_are_those_of_the_whole_batch(store, monkeypatch, scope):
    loss, whole = gradients_of_one_step(store, monkeypatch, scope=scope)
    parts_loss, parts = gradients_of_one_step(store, monkeypatch, scope=scope, gradient_accumulation=5)
    assert parts_loss == pytest.approx(loss, rel=1e-5)
    assert whole.keys() == parts.keys() and any("encoder" in name for name in whole) == (scope != "head")
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("optimizer", "adam", "one of 'adamw', 'adamw8bit'"),
        ("scope", "LoRA", "one of 'head', 'lora', 'text', 'all'"),
        ("warmup_fraction", 1, "a number from 0 to below 1"),
        ("random_shift", -1, "at least 0"),
        ("steps", -1, "at least 0"),
        ("learning_rate", -0.001, "at least 0"),
        ("max_grad_norm", 0, "a number above 0"),
    ],
)
def test_settings_that_are_none_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}={value!r}; expected {expected}"):
        SLConfig(**{name: value})


def test_a_batch_splits_into_all_of_its_rows():
    parts = split(7, 3)
    assert sorted(part.stop - part.start for part in parts) == [2, 2, 3]
    assert [row for part in parts for row in range(7)[part]] == list(range(7))


@pytest.mark.parametrize("parts", [0, 17])
def test_more_parts_than_rows_are_refused(store, parts):
    with pytest.raises(ValueError, match="expected 1 to the batch size, 16"):
        train_supervised(
            make_policy(store), make_sampler(store), config=SLConfig(batch_size=16, gradient_accumulation=parts)
        )


@pytest.mark.parametrize("scope", ["lora", "all"])
def test_checkpointing_gives_the_same_gradients_from_less_memory(store, monkeypatch, scope):
    sizes, results = [], []
    for checkpointing in (False, True):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.nbytes) or t, lambda t: t):
            results.append(gradients_of_one_step(store, monkeypatch, scope=scope, gradient_checkpointing=checkpointing))
        sizes.append(sum(held))
    assert sizes[1] < 0.8 * sizes[0]
    (loss, plain), (again, checkpointed) = results
    assert loss == again
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in plain.items())


def test_checkpointing_ends_with_the_training(store):
    policy = make_policy(store)
    train_supervised(policy, make_sampler(store), config=SLConfig(steps=1, scope="all", gradient_checkpointing=True))
    assert not policy.encoder.model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in policy.encoder.model.modules())


def test_an_8_bit_optimiser_without_its_package_is_refused(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ImportError, match=r"adamw8bit.*pip install 'vla-rl\[quantize\]'"):
        train_supervised(make_policy(store), make_sampler(store), config=SLConfig(scope="head", optimizer="adamw8bit"))


def test_an_8_bit_optimiser_learns_about_as_the_other(store):
    pytest.importorskip("bitsandbytes")
    final = {}
    for optimizer in ("adamw", "adamw8bit"):
        losses = []
        config = SLConfig(steps=40, batch_size=32, scope="all", random_shift=0, optimizer=optimizer)
        train_supervised(
            make_policy(store),
            make_sampler(store),
            config=config,
            on_step=lambda _, loss, into=losses: into.append(loss),
        )
        final[optimizer] = np.mean(losses[-5:])
        assert final[optimizer] < 0.8 * np.mean(losses[:5])
    assert final["adamw"] != final["adamw8bit"]
    assert final["adamw"] == pytest.approx(final["adamw8bit"], rel=0.1)
