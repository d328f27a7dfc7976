from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny import HEAD, INSTRUCTIONS, tiny_encoder, tiny_policy, toy_env

from vla_rl.data import Statistics
from vla_rl.envs import EncodeObservation
from vla_rl.heads import ActionHead, ChunkedHead
from vla_rl.heads.bounds import unit_box
from vla_rl.heads.tanh_gaussian import TanhGaussianHead
from vla_rl.policy import VLAPolicy

pytest.importorskip("torchrl")

from tensordict import NonTensorStack, TensorDict
from tensordict.nn import InteractionType, set_interaction_type
from torchrl.envs.utils import check_env_specs
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from vla_rl.integrations.torchrl import (
    EncodedEnv,
    VLAPolicyModule,
    make_actor,
    make_critic,
    to_policy,
)

STATISTICS = Statistics(
    action_mean=np.array([0.2, -0.1], np.float32),
    action_std=np.array([0.5, 0.8], np.float32),
    state_mean=np.array([0.3, -0.3], np.float32),
    state_std=np.array([0.25, 0.5], np.float32),
    num_steps=10,
    num_episodes=1,
)
SENTENCES = ["reach the red square"] * 3


def encoded(encoder, *, num_envs=3, mode=AutoresetMode.DISABLED, **kwargs):
    fn = partial(toy_env, **kwargs)
    return EncodedEnv(EncodeObservation(SyncVectorEnv([fn] * num_envs, autoreset_mode=mode), encoder))


def squashed_policy():
    encoder = tiny_encoder()
    torch.manual_seed(0)
    box = unit_box(STATISTICS)
    head = TanhGaussianHead(encoder.feature_dim, 2, state_dim=2, exploration="gaussian", **box, **HEAD)
    return VLAPolicy(encoder, head, statistics=STATISTICS)


def raw_observations(count=3):
    obs, _ = SyncVectorEnv([toy_env] * count).reset(seed=5)
    return obs


def test_the_env_keeps_torchrls_contract():
    check_env_specs(encoded(tiny_encoder()), seed=0)


def test_rollouts_reset_only_what_ended_and_encode_it_once():
    encoder = tiny_encoder()
    env = encoded(encoder, horizon=3)
    env.set_seed(0)
    before = encoder.num_frames
    rollout = env.rollout(7, policy=lambda td: td.set("action", torch.zeros(3, 2)), break_when_any_done=False)
    assert rollout.batch_size == (3, 7)
    # Standing still for 3 steps ends an episode by truncation, and the state stays the reset's.
    assert rollout["next", "truncated"][..., 0].tolist() == [[False, False, True] * 2 + [False]] * 3
    assert not rollout["next", "terminated"].any()
    state = rollout["observation", "state"]
    assert torch.equal(state[:, 0], state[:, 2]) and not torch.equal(state[:, 2], state[:, 3])
    assert torch.equal(rollout["next", "observation", "state"][:, 2], state[:, 2])  # the final one, not the reset's
    assert encoder.num_frames - before == 3 * (1 + 7 + 2)


def test_actions_are_clipped_and_success_is_told():
    env = encoded(tiny_encoder(), reward="dense")
    env.set_seed(0)
    start = env.reset()
    after = env.step(start.clone().set("action", torch.full((3, 2), 9.0)))
    moved = after["next", "observation", "state"] - start["observation", "state"]
    assert (moved <= 0.2 + 1e-6).all() and moved.max() > 0.1
    target = torch.as_tensor(np.array([e.unwrapped.target for e in env.env.env.envs]), dtype=torch.float32)
    position = after["next", "observation", "state"]
    distance = (position - target).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(after["next", "reward"], -distance)
    assert torch.equal(after["next", "success"], distance < 0.15)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_other_autoreset_modes_are_refused(mode):
    with pytest.raises(ValueError, match=r"autoreset_mode=AutoresetMode\.DISABLED"):
        encoded(tiny_encoder(), mode=mode)
    with pytest.raises(ValueError, match=r"wrap the vector environment in vla_rl\.envs\.EncodeObservation"):
        EncodedEnv(SyncVectorEnv([toy_env], autoreset_mode=AutoresetMode.DISABLED))


@pytest.mark.parametrize("kind", ["gaussian", "gsde", "tanh"])
def test_the_actor_is_the_policy(kind):
    policy = squashed_policy() if kind == "tanh" else tiny_policy(statistics=STATISTICS, exploration=kind, init_std=0.2)
    raw = raw_observations()
    features, state = policy.encode(raw, SENTENCES), policy.normalize_state(raw["state"])
    policy.head.start_exploration(features, state)
    actor = make_actor(policy)
    observation = {"tokens": features.tokens.float(), "mask": features.mask, "state": torch.from_numpy(raw["state"])}
    td = TensorDict({"observation": observation}, batch_size=[3])
    with torch.no_grad(), set_interaction_type(InteractionType.DETERMINISTIC):
        action = actor(td.clone())["action"]
    np.testing.assert_allclose(action.clamp(-1, 1), policy.act(raw, SENTENCES), atol=1e-5)
    with torch.no_grad():
        sampled = actor(td.clone())
        spread = torch.stack([actor(td.clone())["action"] for _ in range(200)]).std(0)
        expected = policy.head.distribution(features, state).log_prob(policy.normalize_action(sampled["action"]))
    units = float(np.log(STATISTICS.action_std).sum())
    torch.testing.assert_close(sampled["action_log_prob"], expected - units, rtol=1e-3, atol=1e-3)
    expected_spread = policy.head.distribution(features, state)
    if kind != "tanh":
        std = expected_spread.std.detach() * torch.from_numpy(STATISTICS.action_std)
        torch.testing.assert_close(spread, std, rtol=0.25, atol=0)
    assert (spread > 0.02).all()
    # Time before batch, as collectors give it.
    stacked = torch.stack([td, td], dim=1)
    assert actor(stacked)["action"].shape == (3, 2, 2)


def test_ppo_trains_the_policy_itself_and_a_copy_can_be_made_of_the_actor():
    policy = tiny_policy(statistics=STATISTICS, exploration="gaussian")
    env, actor, critic = encoded(policy.encoder, reward="dense"), make_actor(policy), make_critic(policy)
    env.set_seed(0)
    torch.manual_seed(0)
    with torch.no_grad():
        data = env.rollout(8, actor, break_when_any_done=False)
        GAE(gamma=0.9, lmbda=0.95, value_network=critic)(data)
    assert data["state_value"].shape == (3, 8, 1) and (data["state_value"] == 0).all()
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2)
    assert (data["action"] - data["loc"]).abs().min(dim=1).values.max() > 1e-3, "the rollout explores"
    raw = raw_observations()
    start, untouched = policy.act(raw, SENTENCES), policy.encoder.fingerprint
    losses = loss(data.reshape(-1))
    assert abs(float(losses["kl_approx"])) < 1e-5, "the first ratio is 1"
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    assert not any(weight.grad is not None for weight in policy.head.parameters())
    (losses["loss_objective"] + losses["loss_critic"]).backward()
    assert policy.head.mean.weight.grad.abs().max() > 1e-3
    optimizer.step()
    learned = policy.act(raw, SENTENCES)
    assert np.abs(learned - start).max() > 1e-3 and policy.encoder.fingerprint == untouched

    copied = to_policy(actor, policy.encoder)
    np.testing.assert_array_equal(copied.act(raw, SENTENCES), learned)
    assert copied.head is not policy.head
    again = make_actor(tiny_policy(seed=1, exploration="gaussian"))
    again.load_state_dict(actor.state_dict())
    np.testing.assert_array_equal(to_policy(again, policy.encoder).act(raw, SENTENCES), learned)


def test_the_whole_policy_by_the_canonical_keys():
    policy = tiny_policy(statistics=STATISTICS)
    raw = raw_observations()
    image = torch.from_numpy(raw["image"]).movedim(-1, 1)
    td = TensorDict(
        {
            "observation": {"image": image, "state": torch.from_numpy(raw["state"])},
            "language_instruction": NonTensorStack(*INSTRUCTIONS),
        },
        batch_size=[3],
    )
    module = VLAPolicyModule(policy)
    expected = policy.act(raw, INSTRUCTIONS)
    chunk = module(td)["vla_action", "chunk"]
    assert chunk.shape == (3, 1, 2)
    np.testing.assert_array_equal(chunk[:, 0], expected)
    td["observation", "image"] = image / 255
    np.testing.assert_array_equal(module(td)["vla_action", "chunk"][:, 0], expected)


def test_a_head_over_chunks_gives_an_action_for_each_of_its_steps():
    encoder = tiny_encoder()
    policy = VLAPolicy(encoder, ChunkedHead(encoder.feature_dim, 6, chunk=3, width=16, num_queries=2, hidden_dim=16))
    raw = raw_observations()
    image = torch.from_numpy(raw["image"]).movedim(-1, 1)
    td = TensorDict({"observation": {"image": image}, "language_instruction": NonTensorStack(*INSTRUCTIONS)}, [3])
    module = VLAPolicyModule(policy)
    assert (module.action_dim, module.chunk_size) == (2, 3)
    expected = policy.act({"image": raw["image"]}, INSTRUCTIONS).reshape(3, 3, 2)
    np.testing.assert_array_equal(module(td)["vla_action", "chunk"], expected)


def test_actions_and_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"gave actions \[3, 1\], the environments take \[3, 2\]"):
        encoded(tiny_encoder()).rollout(1, policy=lambda td: td.set("action", torch.zeros(3, 1)))
    image = TensorDict({"observation": {"image": torch.zeros(1, 32, 32, 3, dtype=torch.uint8)}}, batch_size=[1])
    image["language_instruction"] = NonTensorStack("go")
    with pytest.raises(ValueError, match=r"\[1, 32, 32, 3\], expected \[\*B, 3, H, W\]"):
        VLAPolicyModule(tiny_policy(state_dim=0))(image)


def test_what_does_not_fit_is_refused():
    class Other(ActionHead):
        def config(self):
            return {"action_dim": 2}

    with pytest.raises(TypeError, match="is a Other, expected GaussianHead or TanhGaussianHead"):
        make_actor(VLAPolicy(tiny_encoder(), Other()))
    with pytest.raises(TypeError, match="Linear holds 0 heads"):
        to_policy(torch.nn.Linear(2, 2), tiny_encoder())
