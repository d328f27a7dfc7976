from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny import INSTRUCTIONS, tiny_policy, toy_env
from torch import nn

from vla_rl.data.lerobot_layout import feature_name
from vla_rl.encoders import FrozenVLMEncoder
from vla_rl.envs import EncodeObservation
from vla_rl.heads import ActionHead
from vla_rl.integrations.lerobot import (
    LeRobotBase,
    LeRobotEncoder,
    LeRobotPolicy,
    from_batch,
    states_of,
    to_batch,
)
from vla_rl.integrations.openvla import openvla_encoder
from vla_rl.integrations.pi0 import pi0_encoder
from vla_rl.integrations.residual import ResidualActions
from vla_rl.policy import VLAPolicy


def observations(batch=3, *keys):
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8) for key in keys or ("image",)}
    return {**images, "state": rng.standard_normal((batch, 2)).astype(np.float32)}


def test_batches_there_and_back():
    obs = observations(3, "image_top", "image_wrist")
    batch = to_batch(obs, INSTRUCTIONS, cameras={"image_top": "front"})
    assert set(batch) == {"observation.images.front", "observation.images.wrist", "observation.state", "task"}
    front = batch["observation.images.front"]
    assert front.shape == (3, 3, 32, 32) and front.dtype == torch.float32
    assert front[1, 2, 3, 4] == np.float32(obs["image_top"][1, 3, 4, 2]) / np.float32(255)
    again, sentences = from_batch(batch, cameras={"image_top": "front"})
    with pytest.raises(KeyError, match=r"cameras names \['image_side'\], but the observation has .*'image_top'"):
        to_batch(obs, INSTRUCTIONS, cameras={"image_side": "front"})
    with pytest.raises(KeyError, match=r"cameras names LeRobot's \['side'\], but the batch has the cameras .*'front'"):
        from_batch(batch, cameras={"image_top": "side"})
    assert sentences == list(INSTRUCTIONS) and again.keys() == obs.keys()
    for key, value in obs.items():
        np.testing.assert_array_equal(again[key], value)
    one, sentences = from_batch({**to_batch(observations(), INSTRUCTIONS), "task": "go"})
    assert "image" in one and sentences == ["go"] * 3
    with pytest.raises(KeyError, match=r"observation\.images\.<camera> and task"):
        from_batch({"observation.state": torch.zeros(1, 2)})


def test_liberos_cameras_there_and_back():
    obs = observations(3, "image", "image_wrist_image")
    batch = to_batch(obs, INSTRUCTIONS)
    assert {"observation.images.image", "observation.images.wrist_image"} < batch.keys()
    again, _ = from_batch(batch)
    assert again.keys() == obs.keys()
    for key, value in obs.items():
        np.testing.assert_array_equal(again[key], value)
    batch["observation.images.image_wrist_image"] = batch["observation.images.image"]
    with pytest.raises(ValueError, match="would both be 'image_wrist_image'; give cameras="):
        from_batch(batch)


def test_a_main_camera_beside_the_others_as_a_data_set_has_it():
    """What `export lerobot` writes of `image` and `image_wrist_image`."""
    obs = observations(3, "image", "image_wrist_image")
    batch = to_batch(obs, INSTRUCTIONS)
    batch["observation.image"] = batch.pop("observation.images.image")
    assert {feature_name(key) for key in ("image", "image_wrist_image")} < batch.keys()
    again, _ = from_batch(batch)
    assert again.keys() == obs.keys()
    for key, value in obs.items():
        np.testing.assert_array_equal(again[key], value)


def test_our_policy_with_lerobots_interface():
    policy = tiny_policy()
    exported, obs = LeRobotPolicy(policy), observations()
    batch = to_batch(obs, INSTRUCTIONS)
    exported.reset()
    action = exported.select_action(batch)
    assert action.dtype == torch.float32
    np.testing.assert_array_equal(action, policy.act(obs, INSTRUCTIONS))
    np.testing.assert_array_equal(exported.predict_action_chunk(batch)[:, 0], action)
    wanted = torch.rand(3, 1, 2)
    loss, figures = exported({**batch, "action": wanted})
    state = torch.from_numpy(obs["state"])
    with torch.no_grad():
        mean = policy.head.predict(policy.encode(obs, INSTRUCTIONS), state)
    torch.testing.assert_close(loss.detach(), (mean - wanted[:, 0]).square().mean())
    assert figures == {"loss": pytest.approx(float(loss))}
    loss.backward()
    assert all(weight.grad is None for weight in policy.encoder.parameters())
    assert policy.head.mean.weight.grad.abs().max() > 0


class ThreeSteps(ActionHead):
    """A chunk of three actions: the state, half of it, a quarter."""

    chunk = 3

    def config(self):
        return {"action_dim": 6, "state_dim": 2}

    def predict(self, features, state):
        return torch.cat([state, state / 2, state / 4], dim=-1)


def test_a_chunk_is_used_up_before_the_policy_looks_again():
    policy = VLAPolicy(tiny_policy().encoder, ThreeSteps())
    exported = LeRobotPolicy(policy)
    first, second = observations(), observations()
    first["state"], second["state"] = np.full((3, 2), 0.8, np.float32), np.full((3, 2), 0.4, np.float32)
    batches = [to_batch(obs, INSTRUCTIONS) for obs in (first, second)]
    frames = policy.encoder.num_frames
    played = [float(exported.select_action(batches[step > 0])[0, 0]) for step in range(4)]
    assert played == pytest.approx([0.8, 0.4, 0.2, 0.4]) and policy.encoder.num_frames - frames == 6
    exported.reset()
    assert float(exported.select_action(batches[0])[0, 0]) == pytest.approx(0.8)


class Chunker(nn.Module):
    """Stands for an ACT-style policy: action k of a chunk is (mean of the image, 0.1 k)."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 5)
        self.asked, self.resets = [], 0

    def reset(self):
        self.resets += 1

    def predict_action_chunk(self, batch):
        pixels = batch["observation.images.image"]
        self.asked.append(len(pixels))
        self.encoder(pixels.flatten(2).transpose(1, 2)[:, :4])
        mean = pixels.mean(dim=(1, 2, 3))
        return torch.stack([torch.stack([mean, torch.full_like(mean, 0.1 * k)], -1) for k in range(3)], dim=1)


def test_every_environment_uses_up_its_own_chunk():
    policy = Chunker()
    base = LeRobotBase(policy, n_action_steps=2, postprocess=lambda actions: 10 * actions)
    assert policy.resets == 1
    obs = {"image": np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 51, 255)])}
    nobody = np.zeros(3, dtype=bool)
    np.testing.assert_allclose(base.actions(obs, INSTRUCTIONS), [[0, 0], [2, 0], [10, 0]], atol=1e-5)
    # Environment 1 starts again, the others play the second action of their chunks.
    started = np.array([False, True, False])
    np.testing.assert_allclose(base.actions(obs, INSTRUCTIONS, started=started), [[0, 1], [2, 0], [10, 1]], atol=1e-5)
    # Environment 1 plays its second action; the others need a new chunk, of which 2 is not asked for.
    active = np.array([True, True, False])
    last = base.actions(obs, INSTRUCTIONS, started=nobody, active=active)
    np.testing.assert_allclose(last, [[0, 0], [2, 1], [0, 0]], atol=1e-5)
    np.testing.assert_allclose(base.actions(obs, INSTRUCTIONS, started=nobody)[2], [10, 0], atol=1e-5)
    assert policy.asked == [3, 1, 1, 2]
    with pytest.raises(TypeError, match="Linear has no predict_action_chunk"):
        LeRobotBase(nn.Linear(1, 1))


class Always(Chunker):
    """Wants to go (0.5, -0.5) first, then (0.1, 0.1)."""

    def predict_action_chunk(self, batch):
        count = len(batch["observation.images.image"])
        return torch.tensor([[0.5, -0.5], [0.1, 0.1]]).expand(count, 2, 2)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_residual_corrects_the_base_in_every_autoreset_mode(mode):
    fns = [partial(toy_env, horizon=3), partial(toy_env, horizon=4)]
    env = ResidualActions(SyncVectorEnv(fns, autoreset_mode=mode), LeRobotBase(Always(), n_action_steps=2), scale=0.5)
    twin = SyncVectorEnv(fns, autoreset_mode=mode)
    obs, _ = env.reset(seed=0)
    raw, _ = twin.reset(seed=0)
    assert env.observation_space.contains(obs) and obs["state"].shape == (2, 4)
    plan = np.array([[0.5, -0.5], [0.1, 0.1]], np.float32)
    age = np.zeros(2, dtype=int)
    correction = np.array([[0.2, 0.0], [0.0, -2.0]], np.float32)
    done = np.zeros(2, dtype=bool)
    for _ in range(12):
        np.testing.assert_array_equal(obs["state"], np.concatenate([raw["state"], plan[age % 2]], axis=1))
        executed = np.clip(plan[age % 2] + 0.5 * correction, -1, 1)
        before = done
        obs, reward, terminated, truncated, infos = env.step(correction)
        raw, raw_reward, _, _, raw_infos = twin.step(executed)
        np.testing.assert_array_equal(reward, raw_reward)
        done = terminated | truncated
        age = age + 1
        if mode is AutoresetMode.SAME_STEP:
            age[done] = 0
            for i in done.nonzero()[0]:
                final = infos["final_obs"][i]["state"]
                np.testing.assert_array_equal(final, [*raw_infos["final_obs"][i]["state"], 0.5, -0.5])
        elif mode is AutoresetMode.NEXT_STEP:
            age[before] = 0
        elif done.any():
            obs, _ = env.reset(seed=[7, 8], options={"reset_mask": done.copy()})
            raw, _ = twin.reset(seed=[7, 8], options={"reset_mask": done.copy()})
            age[done] = 0


def test_a_residual_under_encoded_observations():
    policy = tiny_policy(state_dim=4)
    base = LeRobotBase(Always())
    env = EncodeObservation(ResidualActions(SyncVectorEnv([toy_env] * 2), base), policy.encoder)
    obs, _ = env.reset(seed=0)
    assert obs["state"].shape == (2, 4) and obs["tokens"].shape[0] == 2
    np.testing.assert_allclose(obs["state"][:, 2:], [[0.5, -0.5]] * 2)
    with pytest.raises(ValueError, match="as VLAObservation gives it"):
        ResidualActions(SyncVectorEnv([lambda: __import__("gymnasium").make("Pendulum-v1")]), base)


def test_a_base_for_another_robot_is_refused():
    class Narrow(Always):
        def predict_action_chunk(self, batch):
            return super().predict_action_chunk(batch)[..., :1]

    env = ResidualActions(SyncVectorEnv([toy_env] * 2), LeRobotBase(Narrow()))
    with pytest.raises(ValueError, match=r"gave actions \[2, 1\], the environments take \[2, 2\]"):
        env.reset(seed=0)


def test_images_in_0_to_255_as_floats_are_refused():
    batch = to_batch(observations(), INSTRUCTIONS)
    assert from_batch(batch)[0]["image"].max() == observations()["image"].max() > 1
    batch["observation.images.image"] *= 255
    with pytest.raises(ValueError, match=r"observation.images.image is float up to 255, expected 0..1"):
        from_batch(batch)


def test_tokens_whose_first_dimension_is_not_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"embed gave tokens \[4, 1, 5\] for 1 observations, expected \[1, M, D\]"):
        LeRobotEncoder(Chunker(), states_of("encoder", batch_first=False), image_size=(32, 32))


def test_inner_states_of_a_policy_as_features():
    torch.manual_seed(0)
    policy = Chunker()
    encoder = LeRobotEncoder(policy, states_of("encoder"), image_size=(32, 32))
    obs = observations()
    features = encoder.encode(obs["image"], INSTRUCTIONS)
    pixels = torch.from_numpy(obs["image"][:, 0, :4]).float() / 255  # the first four pixels of the first row
    torch.testing.assert_close(features.tokens.float(), policy.encoder(pixels), atol=2e-3, rtol=0)
    assert features.mask.all() and features.fingerprint == encoder.fingerprint and encoder.feature_dim == 5
    assert encoder.num_frames == 4 and not any(weight.requires_grad for weight in policy.parameters())
    envs = EncodeObservation(SyncVectorEnv([toy_env] * 2), encoder)
    encoded, _ = envs.reset(seed=0)
    assert encoded["tokens"].shape == (2, 4, 5)
    first = encoder.fingerprint
    with torch.no_grad():
        policy.encoder.bias.add_(1)
    assert LeRobotEncoder(policy, states_of("encoder"), image_size=(32, 32)).fingerprint != first
    same = LeRobotEncoder(policy, states_of("encoder"), image_size=(32, 32))
    assert same.fingerprint == LeRobotEncoder(policy, states_of("encoder"), image_size=(32, 32)).fingerprint

    def darker(batch):
        return batch | {"observation.images.image": batch["observation.images.image"] / 2}

    for other in ({"preprocess": darker}, {"state_dim": 2}):
        changed = LeRobotEncoder(policy, states_of("encoder"), image_size=(32, 32), **other)
        assert changed.fingerprint != same.fingerprint
    policy.register_buffer("count", torch.tensor(3))  # as BatchNorm's
    counted = LeRobotEncoder(policy, states_of("encoder"), image_size=(32, 32))
    assert counted.fingerprint != same.fingerprint
    with torch.no_grad():
        policy.encoder.bias.mul_(1e6)
    with pytest.raises(FloatingPointError, match="set its feature_dtype"):
        counted.encode(obs["image"], INSTRUCTIONS)
    counted.feature_dtype = torch.float32
    assert counted.encode(obs["image"], INSTRUCTIONS).tokens.abs().max() > 1e5
    with pytest.raises(ValueError, match=r"with N = 1 for the cameras \('image',\)"):
        encoder.encode(np.zeros((1, 2, 8, 8, 3), np.uint8), ["go"])
    with pytest.raises(ValueError, match="name another module"):
        LeRobotEncoder(policy, states_of(""), image_size=(8, 8)).encode(np.zeros((1, 8, 8, 3), np.uint8), ["go"])


def tiny_pi0():
    import transformers
    from tiny import tiny_encoder

    vlm = tiny_encoder()
    text = vlm.model.config.text_config.to_dict()
    config = transformers.PI0Config(
        vlm_config=vlm.model.config, dit_config={**text, "hidden_size": 16, "intermediate_size": 32}, chunk_size=4
    )
    torch.manual_seed(1)
    pixels = vlm.processor.image_processor
    return transformers.PI0ForConditionalGeneration(config).eval(), transformers.PI0Processor(
        pixels, vlm.processor.tokenizer
    )


def test_the_vlm_of_pi0_as_an_encoder():
    model, processor = tiny_pi0()
    encoder = pi0_encoder(model, processor)
    assert isinstance(encoder, FrozenVLMEncoder)
    obs = observations()
    features = encoder.encode(obs["image"], INSTRUCTIONS)

    # The prefix as pi0 itself computes it.
    inputs = processor([[image] for image in obs["image"]], list(INSTRUCTIONS))
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        embeds = model.model.embed_prefix(
            inputs["input_ids"], inputs["pixel_values"], inputs["pixel_attention_mask"], inputs["attention_mask"]
        )
        prefix = model.model.vlm(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["attention_mask"].cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(embeds)[:, :, 0],
        ).last_hidden_state
    for i in range(3):
        torch.testing.assert_close(
            features.tokens[i][features.mask[i]].float(), prefix[i][mask[i]], atol=5e-3, rtol=5e-3
        )
    assert encoder.model.model is model.model.vlm
    assert all(not parameter.is_meta for parameter in encoder.parameters())


def test_openvla_runs_no_code_that_is_not_pinned(monkeypatch):
    commit = "0123456789abcdef" * 2 + "01234567"
    for revision in ("main", "v1.0", commit[:8]):
        with pytest.raises(ValueError, match="give the commit that you have read"):
            openvla_encoder(revision=revision, trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        openvla_encoder(revision=commit)
    monkeypatch.setattr(FrozenVLMEncoder, "from_pretrained", lambda name, **kwargs: (name, kwargs))
    name, kwargs = openvla_encoder(revision=commit, trust_remote_code=True, device="cuda")
    assert name == "openvla/openvla-7b" and kwargs["revision"] == commit and kwargs["device"] == "cuda"
    assert kwargs["prompt"].format(instruction="lift") == "In: What action should the robot take to lift?\nOut:"
