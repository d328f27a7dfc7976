import types

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from walks import TABLE, Conventional, Robot, Walk

from vla_rl.encoders.features import Features
from vla_rl.envs import EncodeObservation, VLAObservation


class WordEncoder:
    """Stands for a VLM: one token per word, [mean of the image, length of the word]; counts what it encodes."""

    feature_dim = 2
    fingerprint = "words"

    def __init__(self):
        self.frames = []

    def encode(self, images, instructions):
        self.frames.append(len(images))
        words = [text.split() for text in instructions]
        tokens = torch.zeros(len(images), max(map(len, words)), 2)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        for i, (image, row) in enumerate(zip(images, words, strict=True)):
            tokens[i, : len(row), 0] = float(image.mean())
            tokens[i, : len(row), 1] = torch.tensor([float(len(word)) for word in row])
            mask[i, : len(row)] = True
        return Features(tokens, mask, self.fingerprint)


def expected(image, task_id):
    tokens, mask = np.zeros((5, 2), np.float32), np.zeros(5, np.int8)
    words = TABLE[task_id].split()
    mask[: len(words)] = 1
    tokens[: len(words), 0] = image.mean()
    tokens[: len(words), 1] = [len(word) for word in words]
    return tokens, mask


def check_encoded(obs, raw):
    for i in range(len(raw["task_id"])):
        tokens, mask = expected(raw["image"][i], raw["task_id"][i])
        np.testing.assert_array_equal(obs["tokens"][i], tokens)
        np.testing.assert_array_equal(obs["mask"][i], mask)
    np.testing.assert_array_equal(obs["state"], raw["state"])
    np.testing.assert_array_equal(obs["task_id"], raw["task_id"])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_encode_observation_in_every_autoreset_mode(mode):
    fns = [lambda: Conventional(0, horizon=3), lambda: Conventional(2, horizon=4)]
    encoder = WordEncoder()
    envs, raw_envs = (SyncVectorEnv(fns, autoreset_mode=mode) for _ in range(2))
    encoded = EncodeObservation(envs, encoder)
    encoder.frames.clear()
    assert encoded.metadata["autoreset_mode"] is mode and encoded.instructions == TABLE
    obs, _ = encoded.reset(seed=0)
    raw, _ = raw_envs.reset(seed=0)
    check_encoded(obs, raw)
    assert encoded.observation_space.contains(obs) and "image" not in obs
    due = 2
    for _ in range(12):
        actions = np.zeros((2, 1), np.float32)
        (obs, _, _, truncated, infos), (raw, *_, raw_infos) = encoded.step(actions), raw_envs.step(actions)
        check_encoded(obs, raw)
        due += 2
        if mode is AutoresetMode.SAME_STEP and truncated.any():
            due += int(truncated.sum())
            for i in truncated.nonzero()[0]:
                one = {key: value[None] for key, value in infos["final_obs"][i].items() if key != "task_id"}
                final = raw_infos["final_obs"][i]
                check_encoded(
                    {**one, "task_id": np.array([final["task_id"]])},
                    {key: np.asarray(value)[None] for key, value in final.items()},
                )
        if mode is AutoresetMode.DISABLED and truncated.any():
            mask = truncated.copy()
            obs, _ = encoded.reset(seed=[5, 6], options={"reset_mask": mask.copy()})
            raw, _ = raw_envs.reset(seed=[5, 6], options={"reset_mask": mask})
            check_encoded(obs, raw)
            due += int(mask.sum())
    assert sum(encoder.frames) == due


def test_a_new_encoder_does_not_mix_with_kept_rows():
    encoder = WordEncoder()
    fns = [Conventional, Conventional]
    encoded = EncodeObservation(SyncVectorEnv(fns, autoreset_mode=AutoresetMode.DISABLED), encoder, max_tokens=5)
    encoded.reset(seed=0)
    encoder.fingerprint = "words, retrained"
    encoded.reset(seed=[1, 2], options={"reset_mask": np.array([True, False])})
    assert encoder.frames == [2, 2]


def test_encode_observation_refuses_what_it_cannot_encode():
    with pytest.raises(ValueError, match="needs image and task_id"):
        EncodeObservation(SyncVectorEnv([Walk]), WordEncoder())
    short = EncodeObservation(SyncVectorEnv([lambda: Conventional(2)]), WordEncoder(), max_tokens=4)
    with pytest.raises(ValueError, match="max_tokens is 4"):
        short.reset(seed=0)


def test_cameras_are_stacked_for_the_encoder():
    shapes = []

    def encode(images, instructions):
        shapes.append(images.shape)
        count = len(images)
        return Features(torch.zeros(count, 1, 2), torch.ones(count, 1, dtype=torch.bool), "")

    encoder = types.SimpleNamespace(feature_dim=2, fingerprint="", encode=encode)
    robot = lambda: VLAObservation(Robot(), instructions=["go"], image_key=["front", "wrist"], success_key=None)  # noqa: E731
    obs, _ = EncodeObservation(SyncVectorEnv([robot] * 2), encoder, max_tokens=1).reset(seed=0)
    assert shapes == [(2, 2, 4, 6, 3)] and set(obs) == {"tokens", "mask", "task_id"}
