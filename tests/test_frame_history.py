from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny import INSTRUCTIONS, tiny_policy, toy_env

from vla_rl.collect import run_expert
from vla_rl.data import BalancedSampler, EpisodeStore
from vla_rl.envs import EncodeObservation, FrameHistory
from vla_rl.vector import WorkerVectorEnv


class Numbered(gym.Env):
    """Frame k of episode e shows 10 e + k; episodes have `length` steps."""

    instructions = ("count",)

    def __init__(self, length):
        image = spaces.Box(0, 255, (2, 2, 3), np.uint8)
        self.observation_space = spaces.Dict({"image": image, "image_hand": image, "task_id": spaces.Discrete(1)})
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.length, self.episode, self.count = length, -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.count = self.episode + 1, 0
        return self.look(), {"success": False}

    def step(self, action):
        self.count += 1
        return self.look(), 0.0, False, self.count >= self.length, {"success": False}

    def look(self):
        number = 10 * self.episode + self.count
        picture = np.full((2, 2, 3), number, np.uint8)
        return {"image": picture, "image_hand": picture + np.uint8(100), "task_id": 0}


def shown(obs, row=None):
    """The numbers that the views of one environment show, oldest first."""
    keys = sorted(key for key in obs if key.startswith("image_t"))
    values = [obs[key] if row is None else obs[key][row] for key in keys]
    assert all((value == value.flat[0]).all() for value in values)
    return [int(value.flat[0]) for value in values]


def test_a_history_begins_with_its_first_frame_repeated():
    env = FrameHistory(Numbered(5), 3)
    obs, _ = env.reset()
    assert list(obs) == [f"image{hand}_t{i}" for hand in ("", "_hand") for i in range(3)] + ["task_id"]
    seen = [shown(obs)] + [shown(env.step(env.action_space.sample())[0]) for _ in range(3)]
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]
    obs, _ = env.reset()  # in the middle of the episode
    assert shown(obs) == [10, 10, 10] and int(obs["image_hand_t0"].flat[0]) == 110
    many = FrameHistory(Numbered(5), 12).observation_space
    assert [key for key in many if key < "image_h" or key > "image_i"][:12] == [f"image_t{i:02}" for i in range(12)]
    check_env(FrameHistory(toy_env().unwrapped, 2), skip_render_check=True)
    for env, length in ((toy_env(), 1), (gym.make("Pendulum-v1"), 3)):
        with pytest.raises(ValueError, match="give a length of 2"):
            FrameHistory(env, length)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("workers", [None, 0, 1])
def test_no_frame_of_the_episode_before_is_seen_after_a_reset(mode, workers):
    lengths = (3, 4)
    fns = [partial(lambda length: FrameHistory(Numbered(length), 3), length) for length in lengths]
    if workers is None:
        env = SyncVectorEnv(fns, autoreset_mode=mode)
    else:
        env = WorkerVectorEnv(fns, num_workers=workers, autoreset_mode=mode)
    obs, _ = env.reset()
    place = [[0, 0], [0, 0]]  # episode and step of each environment
    expected = lambda episode, step: [10 * episode + max(0, step - back) for back in (2, 1, 0)]  # noqa: E731
    ended = np.zeros(2, dtype=bool)
    for _ in range(13):
        assert [shown(obs, row) for row in range(2)] == [expected(*at) for at in place]
        before, (obs, _, terminated, truncated, infos) = ended, env.step(np.zeros((2, 1), np.float32))
        ended = terminated | truncated
        for row, at in enumerate(place):
            if mode is AutoresetMode.NEXT_STEP and before[row]:
                at[:] = [at[0] + 1, 0]
                continue
            at[1] += 1
            assert ended[row] == (at[1] == lengths[row])
            if ended[row] and mode is AutoresetMode.SAME_STEP:
                assert shown(infos["final_obs"][row]) == expected(*at)
                at[:] = [at[0] + 1, 0]
        if mode is AutoresetMode.DISABLED and ended.any():
            obs, _ = env.reset(options={"reset_mask": ended.copy()})
            for row in np.flatnonzero(ended):
                place[row] = [place[row][0] + 1, 0]
    env.close()


def test_every_frame_of_the_history_is_encoded(tmp_path):
    policy = tiny_policy()
    policy.encoder.feature_dtype = torch.float32
    env = FrameHistory(toy_env(horizon=6), 3)
    rng = np.random.default_rng(0)
    episode = run_expert(env, lambda _: rng.uniform(-1, 1, 2), task="reach-red", seed=0, noise=0.0)
    with EpisodeStore(tmp_path / "store") as store:
        store.append(episode)
        batch = BalancedSampler([store], batch_size=4, seed=0).rows(np.array([3]))
    frames = [episode.observations[f"image_t{i}"][3] for i in range(3)]
    assert batch.images.shape == (1, 3, 32, 32, 3) and not np.array_equal(frames[0], frames[2])
    np.testing.assert_array_equal(frames[0], episode.observations["image_t2"][1])
    features = policy.encode({f"image_t{i}": frame[None] for i, frame in enumerate(frames)}, INSTRUCTIONS[:1])
    single = [policy.encode({"image": frame[None]}, INSTRUCTIONS[:1]).tokens for frame in frames]
    np.testing.assert_allclose(features.tokens, np.concatenate(single, axis=1), atol=1e-5)

    envs = EncodeObservation(SyncVectorEnv([lambda: FrameHistory(toy_env(), 3)] * 2), policy.encoder)
    obs, _ = envs.reset(seed=0)
    first, _ = toy_env().reset(seed=1)
    alone = policy.encode(
        {"image": first["image"][None]}, [toy_env().get_wrapper_attr("instructions")[first["task_id"]]]
    )
    length = alone.tokens.shape[1]
    assert obs["mask"][1].sum() == 3 * length
    views = obs["tokens"][1][obs["mask"][1] > 0].reshape(3, length, -1)
    for view in views:
        np.testing.assert_allclose(view, alone.tokens[0], atol=1e-5)
