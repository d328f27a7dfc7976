"""The weights in the package: asked on new pictures, they answer."""

import numpy as np
import pytest
import torch
from parts import HELD_OUT
from scenes import SceneSampler
from texts import parse_location, write_pairs

from vla_rl import FrozenVLMEncoder

pytestmark = [pytest.mark.simulator, pytest.mark.slow]


@pytest.fixture(scope="module")
def samples():
    """Pictures under seeds that pretraining did not use, from the environment's own camera."""
    rng = np.random.default_rng(99)
    sampler = SceneSampler(size=64, exclude=HELD_OUT)
    return [sample for _ in range(6) for sample in sampler.session(rng, 16, camera="own")]


@pytest.fixture(scope="module")
def encoder():
    return FrozenVLMEncoder.from_pretrained("tiny", dtype=torch.float32)


@torch.no_grad()
def answer(encoder, picture, prompt, *, tokens):
    inputs = encoder.processor(images=picture, text=prompt, return_tensors="pt")
    output = encoder.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return encoder.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)


def test_it_points_at_the_gripper(encoder, samples):
    seen = [sample for sample in samples if sample.gripper.visible][:32]
    told = [parse_location(answer(encoder, sample.image, "where is the gripper", tokens=2)) for sample in seen]
    truth = np.array([sample.gripper.point for sample in seen])
    distances = [np.hypot(*(np.array(place) - point)) for place, point in zip(told, truth, strict=True) if place]
    always_the_middle = np.hypot(*(truth - np.median(truth, axis=0)).T)
    assert len(distances) > 25
    assert np.median(distances) < 0.08 and np.median(distances) < 0.6 * np.median(always_the_middle)


def test_it_tells_colours(encoder, samples):
    rng = np.random.default_rng(0)
    asked = [(sample, pair) for sample in samples for pair in write_pairs(sample, rng) if pair.kind == "colour"][:60]
    right = [pair.answer in answer(encoder, sample.image, pair.prompt, tokens=3) for sample, pair in asked]
    assert len(right) > 40 and np.mean(right) > 0.25  # ten colours


def test_it_is_small(encoder):
    assert 2e6 < sum(weight.numel() for weight in encoder.model.parameters()) < 8e6
