"""Properties that hold for all inputs, not only for those that somebody thought of."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

sys.path.append(str(Path(__file__).parents[1] / "data"))

from episode_maker import assert_equal, make_episode
from tiny import tiny_policy

from vla_rl._observation import rgb_image, state_space
from vla_rl._vector_checks import CheckedEnv
from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics
from vla_rl.data.statistics import STD_FLOOR
from vla_rl.envs import VLAObservation
from vla_rl.intervals import wilson_interval
from vla_rl.rl.gae import gae

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(max_examples=100, deadline=None)
numbers = st.floats(-100, 100, width=32)


# GAE


@st.composite
def rollouts(draw):
    shape = (draw(st.integers(1, 7)), draw(st.integers(1, 3)))
    arrays = [torch.from_numpy(draw(hnp.arrays(np.float64, shape, elements=numbers))) for _ in range(3)]
    flags = [torch.from_numpy(draw(hnp.arrays(np.bool_, shape))) for _ in range(3)]
    terminated, truncated, valid = flags
    return *arrays, terminated, terminated | truncated, valid


@many
@given(rollouts(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_td_errors_up_to_the_end_of_the_episode(rollout, gamma, gae_lambda):
    rewards, values, next_values, terminated, done, valid = rollout
    advantages, returns = gae(*rollout, gamma=gamma, gae_lambda=gae_lambda)
    steps, count = rewards.shape
    for n in range(count):
        for t in range(steps):
            total, weight = 0.0, 1.0
            for k in range(t, steps):
                if not valid[k, n]:
                    break
                bootstrap = 0.0 if terminated[k, n] else gamma * float(next_values[k, n])
                total += weight * (float(rewards[k, n]) + bootstrap - float(values[k, n]))
                if done[k, n]:
                    break
                weight *= gamma * gae_lambda
            assert float(advantages[t, n]) == pytest.approx(total, abs=1e-6)
            expected = total + float(values[t, n]) if valid[t, n] else 0.0
            assert float(returns[t, n]) == pytest.approx(expected, abs=1e-6)


@many
@given(rollouts(), st.floats(0.1, 10))
def test_advantages_scale_with_rewards_and_values(rollout, factor):
    rewards, values, next_values, *flags = rollout
    once, _ = gae(*rollout, gamma=0.9, gae_lambda=0.8)
    scaled, _ = gae(rewards * factor, values * factor, next_values * factor, *flags, gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close(scaled, once * factor)


# Stores, samplers and statistics

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)


@st.composite
def episodes(draw, *, size=2, state=2):
    """Of one shape, so that they fit in one store."""
    return make_episode(
        draw(st.integers(0, 10**6)),
        steps=draw(st.integers(1, 6)),
        size=size,
        state=state,
        task=draw(words),
        instruction=draw(words),
        success=draw(st.booleans()),
        task_id=draw(st.integers(0, 2**40)),
        seed=draw(st.none() | st.integers(0, 2**62)),
    )


@few
@given(st.lists(episodes(), min_size=1, max_size=4))
def test_a_store_gives_back_what_it_was_given(tmp_path_factory, stored):
    path = tmp_path_factory.mktemp("store") / "store"
    with EpisodeStore(path) as store:
        for episode in stored:
            store.append(episode)
    again = EpisodeStore(path, mode="r")
    assert len(again) == len(stored)
    for first, second in zip(stored, again, strict=True):
        assert_equal(first, second)


@few
@given(st.lists(episodes(), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 2**32), st.integers(0, 3))
def test_a_sampler_draws_rows_of_the_store_and_goes_on_where_it_was(tmp_path_factory, stored, batch, seed, drawn):
    path = tmp_path_factory.mktemp("store") / "store"
    with EpisodeStore(path) as store:
        for episode in stored:
            store.append(episode)
        sampler, again = (BalancedSampler([store], batch_size=batch, seed=s) for s in (seed, seed + 1))
        for _ in range(drawn):
            sampler.sample()
        again.load_state_dict(sampler.state_dict())
        first, second = sampler.sample(), again.sample()
        everything = np.concatenate([episode.actions for episode in stored])
    np.testing.assert_array_equal(first.actions, second.actions)
    assert len(first) == batch
    assert all((everything == action).all(axis=1).any() for action in first.actions)


@few
@given(st.lists(episodes(), min_size=2, max_size=5), st.integers(1, 4))
def test_statistics_do_not_depend_on_how_episodes_are_spread_over_stores(tmp_path_factory, stored, cut):
    root = tmp_path_factory.mktemp("stores")
    parts = [part for part in (stored[:cut], stored[cut:]) if part]
    stores = []
    for number, part in enumerate(parts):
        stores.append(EpisodeStore(root / str(number)))
        for episode in part:
            stores[-1].append(episode)
    found = compute_statistics(stores)
    actions = np.concatenate([episode.actions for episode in stored]).astype(np.float64)
    states = np.concatenate([episode.observations["state"][:-1] for episode in stored]).astype(np.float64)
    for array, mean, std in (
        (actions, found.action_mean, found.action_std),
        (states, found.state_mean, found.state_std),
    ):
        np.testing.assert_allclose(mean, array.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(std, np.maximum(array.std(axis=0), STD_FLOOR), atol=1e-5)
    for store in stores:
        store.close()


# Normalisers


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@many
@given(
    hnp.arrays(np.float32, (5, 2), elements=st.floats(-1, 1, width=32)),
    hnp.arrays(np.float32, 2, elements=st.floats(-3, 3, width=32)),
    hnp.arrays(np.float32, 2, elements=st.floats(0.0078125, 8, width=32)),
)
def test_normalised_actions_come_back(policy, actions, mean, std):
    policy.action_mean.copy_(torch.from_numpy(mean))
    policy.action_std.copy_(torch.from_numpy(std))
    normal = policy.normalize_action(actions)
    np.testing.assert_allclose(normal.numpy() * std + mean, actions, atol=1e-4)
    np.testing.assert_allclose(policy.env_action(normal), actions, atol=1e-4)


# Spaces


boxes = st.builds(
    lambda shape, low, width: spaces.Box(low, low + width, shape, np.float32),
    st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    st.floats(-5, 5, width=16),
    st.floats(0.5, 5, width=16),
)
plain = boxes | st.builds(spaces.Discrete, st.integers(1, 5)) | st.builds(spaces.MultiBinary, st.integers(1, 4))
nested = st.dictionaries(st.sampled_from("abcd"), plain, min_size=1, max_size=3)


class Sampled(gym.Env):
    """Observations drawn from any space, with a picture beside them."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, parts):
        self.observation_space = spaces.Dict(camera=spaces.Box(0, 255, (4, 5, 3), np.uint8), robot=spaces.Dict(parts))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {"success": False}


@few
@given(nested, st.integers(0, 2**31 - 1))
def test_any_dict_of_numbers_becomes_the_convention(parts, seed):
    env = VLAObservation(
        Sampled(parts), instructions=["go"], image_key="camera", state_key=[f"robot/{key}" for key in sorted(parts)]
    )
    obs, info = env.reset(seed=seed)
    assert env.observation_space.contains(obs)
    assert obs["image"].shape == (4, 5, 3) and obs["image"].dtype == np.uint8
    assert obs["state"].shape == (sum(spaces.flatdim(part) for part in parts.values()),)
    assert info["success"] is False and info["instruction"] == "go"
    obs, _, _, _, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs) and info["success"] is False


@few
@given(nested)
def test_the_state_holds_the_flattened_samples(parts):
    box = state_space(list(parts.values()), None)
    sample = [spaces.flatten(part, part.sample()) for part in parts.values()]
    assert box.shape == (sum(map(len, sample)),)
    assert box.contains(np.concatenate(sample).astype(np.float32).clip(box.low, box.high))


@few
@given(nested, st.integers(0, 2**31 - 1))
def test_what_lies_in_a_space_passes_the_check_of_env_outputs(parts, seed):
    env = CheckedEnv(Sampled(parts), number=0)
    env.reset(seed=seed)
    for _ in range(3):
        env.step(env.action_space.sample())


@many
@given(hnp.arrays(np.uint8, st.tuples(st.integers(4, 9), st.integers(4, 9), st.sampled_from([1, 3, 4]))))
def test_pictures_of_any_kind_become_rgb(image):
    rgb = rgb_image(image)
    assert rgb.shape == (*image.shape[:2], 3) and rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb, image.repeat(3, axis=2) if image.shape[2] == 1 else image[:, :, :3])
    floats = image[:, :, :3].astype(np.float32) / 255
    np.testing.assert_array_equal(rgb_image(floats, low=0.0, high=1.0), rgb)


# Intervals


@many
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_intervals_hold_the_rate_and_mirror(pair):
    successes, n = pair
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n + 1e-9 and successes / n - 1e-9 <= high <= 1
    mirrored = wilson_interval(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
