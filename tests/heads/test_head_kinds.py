"""Every built-in head, and one from outside: learning, exploring, saving, and what is particular to each."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from outside_head import LinearHead
from tiny import HEAD, DropoutHead, random_features, tiny_encoder, toy_env

from vla_rl.chunks import ChunkActions, chunk_statistics
from vla_rl.data import BalancedSampler, EpisodeStore, Statistics
from vla_rl.heads import (
    ChunkedHead,
    FlowHead,
    GaussianHead,
    ResidualHead,
    TanhGaussianHead,
    TokenHead,
    ValueHead,
    unit_box,
)
from vla_rl.importing import load_object
from vla_rl.policy import VLAPolicy
from vla_rl.rl.ppo import PPOConfig, policy_loss, ppo_update
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.rl.stage1 import run_collect
from vla_rl.sl.supervised import SLConfig, train_supervised

DIM, A = 32, 4
SMALL = {"state_dim": 2, "width": 16, "num_queries": 2, "hidden_dim": 24}
BASE = {"base": "vla_rl.heads.gaussian:GaussianHead", "base_kwargs": {"feature_dim": DIM, "action_dim": A, **SMALL}}
HEADS = {
    "gaussian": (GaussianHead, {}),
    "tanh": (TanhGaussianHead, {"low": -2.0, "high": [1.0, 2.0, 3.0, 2.0]}),
    "chunked": (ChunkedHead, {"chunk": 2, "smoothness": 0.5}),
    "token": (TokenHead, {"bins": 32, "low": -2.0, "high": 2.0}),
    "flow": (FlowHead, {"integration_steps": 3}),
    "residual": (ResidualHead, {**BASE, "scale": 2.0}),
}
POOLERS = ("token_learner", "learned_queries", "mean", "last", "rl_token")
STATISTICS = Statistics(
    action_mean=np.array([0.2, -0.1], np.float32),
    action_std=np.array([0.5, 0.8], np.float32),
    state_mean=np.zeros(2, np.float32),
    state_std=np.ones(2, np.float32),
    num_steps=10,
    num_episodes=1,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def inputs():
    return random_features(8), torch.randn(8, 2)


def make(kind, **more):
    head_class, kwargs = HEADS[kind]
    return head_class(DIM, A, **{**SMALL, **kwargs, **more})


@pytest.mark.parametrize("kind", HEADS)
def test_config_and_weights_rebuild_every_head(kind, inputs):
    head = make(kind)
    config = json.loads(json.dumps(head.config()))
    again = type(head)(**config)
    assert again.config() == head.config() and again.chunk == head.chunk
    again.load_state_dict(head.state_dict())
    torch.testing.assert_close(again.predict(*inputs), head.predict(*inputs), rtol=0, atol=0)
    actions = head.distribution(*inputs).sample()
    first, second = (one.distribution(*inputs).log_prob(actions) for one in (head, again))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("kind", HEADS)
def test_the_deterministic_action_is_what_the_mode_executes(kind, inputs):
    head = make(kind)
    torch.testing.assert_close(head.predict(*inputs), head.executed(head.distribution(*inputs).mode))
    sample = head.executed(head.distribution(*inputs).sample())
    assert head.predict(*inputs).shape == sample.shape == (8, A)


@pytest.mark.parametrize("kind", HEADS)
def test_one_batch_can_be_learned_by_heart(kind, inputs):
    head, actions = make(kind), torch.rand(8, A) * 1.8 - 0.9
    if kind == "residual":
        actions = head.base.predict(*inputs) + actions
    before = (head.predict(*inputs) - actions).abs().mean()
    optimizer = torch.optim.Adam((p for p in head.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        head.supervised_loss(*inputs, actions).backward()
        optimizer.step()
    after = (head.predict(*inputs) - actions).abs()
    assert before > 0.2
    assert after.mean() < (0.1 if kind in ("token", "flow") else 0.03)  # a bin is .125 wide


@pytest.mark.parametrize("kind", HEADS)
def test_ppo_moves_every_head_to_what_is_rewarded(kind, inputs):
    """A bandit: the reward is minus the distance to a target, the same in 8 states; PPO's own loss on log-probs."""
    features, state = (part[torch.arange(8).repeat(32)] for part in inputs)
    head = make(kind)
    target = torch.tensor([0.5, -0.5, 0.3, 0.0])
    if kind == "token":  # from log-probs that have learned something, as stage 0 leaves them
        head.logits.weight.data.mul_(0.1)
    head.start_exploration(features, state)
    optimizer = torch.optim.Adam((p for p in head.parameters() if p.requires_grad), lr=3e-3)

    def distance():
        with torch.no_grad():
            return float((head.executed(head.distribution(features, state).sample()) - target).norm(dim=-1).mean())

    before = distance()
    for _ in range(60):
        with torch.no_grad():
            distribution = head.distribution(features, state)
            actions = distribution.sample()
            old = distribution.log_prob(actions)
        reward = -(head.executed(actions) - target).norm(dim=-1)
        advantages = (reward - reward.mean()) / reward.std()
        for _ in range(3):
            optimizer.zero_grad()
            log_prob = head.distribution(features, state).log_prob(actions)
            policy_loss(log_prob, old, advantages, clip_coef=0.2).backward()
            optimizer.step()
    assert distance() < 0.75 * before


@pytest.mark.parametrize("kind", HEADS)
def test_padding_changes_no_head(kind, inputs):
    features, state = inputs
    scrambled = replace(features, tokens=torch.where(features.mask[..., None], features.tokens, 1e3))
    head = make(kind)
    torch.testing.assert_close(head.predict(scrambled, state), head.predict(features, state), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*HEADS, "outside"])
def test_a_policy_with_any_head_survives_saving_and_a_ppo_update(kind, tmp_path):
    """Through the real rollout: the first ratio of the update is checked to be 1, and the weights move."""
    encoder = tiny_encoder()
    chunk = 2 if kind == "chunked" else 1
    if kind == "outside":
        head = load_object("outside_head:LinearHead")(encoder.feature_dim, 2, state_dim=2)
    elif kind == "residual":
        base = GaussianHead(encoder.feature_dim, 2, **SMALL)
        head = ResidualHead.over(base, scale=0.5)
    else:
        head_class, kwargs = HEADS[kind]
        bounds = unit_box(STATISTICS) if "low" in kwargs else {}
        head = head_class(encoder.feature_dim, 2 * chunk, **{**SMALL, **kwargs, **bounds})
    VLAPolicy(encoder, head, statistics=chunk_statistics(STATISTICS, chunk)).save_pretrained(tmp_path / "policy")
    policy = VLAPolicy.from_pretrained(tmp_path / "policy")
    assert type(policy.head) is type(head)

    def env():
        return ChunkActions(toy_env(), chunk=2) if chunk == 2 else toy_env()

    envs = SyncVectorEnv([env] * 3, autoreset_mode=AutoresetMode.NEXT_STEP)
    obs, _ = envs.reset(seed=0)
    sentences = ["reach the red square"] * 3
    with torch.no_grad():
        features = encoder.encode(obs["image"], sentences)
        expected = policy.env_action(head.predict(features, policy.normalize_state(obs["state"])))
    np.testing.assert_allclose(policy.act(obs, sentences), expected.clip(-1, 1), atol=1e-5)

    critic = ValueHead(encoder.feature_dim, **SMALL)
    collector = RolloutCollector(policy, envs, task="reach-red")
    collector.start_exploration()
    rollout = collector.collect(6, critic, gamma=0.9, gae_lambda=0.95)
    envs.close()
    before = {name: value.clone() for name, value in policy.head.state_dict().items()}
    learning = [p for p in policy.head.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([*learning, *critic.parameters()], lr=1e-3)
    rollout.advantages = torch.randn_like(rollout.advantages)  # an untrained policy earns nothing
    stats = ppo_update(policy, critic, optimizer, rollout, config=PPOConfig(update_epochs=2, target_kl=None))
    assert abs(stats["approx_kl"]) < 10
    changed = {name for name, value in policy.head.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith("base.") for name in changed)


def test_a_head_from_outside_is_what_its_user_wrote(inputs):
    head = LinearHead(DIM, A, state_dim=2)
    assert load_object("outside_head:LinearHead") is LinearHead
    assert head.predict(*inputs).shape == (8, A) and head.chunk == 1
    actions = torch.randn(8, A)
    assert head.executed(actions) is actions


def test_dropout_is_on_in_supervised_learning_and_nowhere_else(expert_path, tmp_path):
    encoder = tiny_encoder()
    policy = VLAPolicy(encoder, DropoutHead(encoder.feature_dim, 2, **HEAD))
    policy.save_pretrained(tmp_path / "policy")
    assert not VLAPolicy.from_pretrained(tmp_path / "policy").head.training
    obs, _ = toy_env().reset(seed=0)
    latent = policy.head.body(encoder.encode(obs["image"][None], ["reach the red square"]), None)
    by_hand = policy.head.mean[1](latent)[0].detach().clamp(-1, 1)
    np.testing.assert_allclose(policy.act(obs, "reach the red square"), by_hand, rtol=1e-5)
    assert not policy.head.training
    modes = []
    policy.head.mean.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    with EpisodeStore(expert_path, mode="r") as store:
        sampler = BalancedSampler([store], batch_size=8, seed=0)
        train_supervised(policy, sampler, config=SLConfig(steps=2, scope="head"))
    assert modes == [True, True]
    assert not policy.head.training
    policy.train()
    env = SyncVectorEnv([toy_env] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
    run_collect(policy, env, task="reach-red", num_episodes=2)
    assert len(modes) > 2
    assert not any(modes[2:])


def test_the_box_of_the_env_in_normalised_units():
    """Mean .2 and deviation .5: 1 becomes (1 - .2) / .5 = 1.6, -1 becomes -2.4."""
    box = unit_box(STATISTICS)
    assert box["low"] == pytest.approx([-2.4, -1.125]) and box["high"] == pytest.approx([1.6, 1.375])
    assert unit_box(STATISTICS, margin=0.5)["high"] == pytest.approx([2.6, 2.0])
    assert unit_box(STATISTICS, chunk=2)["low"] == pytest.approx([-2.4, -1.125] * 2)
    assert unit_box(None) == {"low": -1.0, "high": 1.0}
    head = TanhGaussianHead(DIM, 2, **box, **SMALL)
    with torch.no_grad():
        head.mean.weight.mul_(1000)
        action = head.predict(random_features(50), torch.randn(50, 2))
    executed = action.numpy() * STATISTICS.action_std + STATISTICS.action_mean
    assert np.abs(executed).max() <= 1 + 1e-5 and np.abs(executed).max() > 0.99


@pytest.mark.parametrize("kind", ["tanh", "token"])
def test_actions_that_do_not_fit_the_box_are_named(kind, inputs):
    with pytest.raises(ValueError, match=r"unit_box\(statistics\)"):
        make(kind).supervised_loss(*inputs, torch.full((8, A), 5.0))
    with pytest.raises(ValueError, match="3 entries, the head's action_dim is 4"):
        make(kind, low=[-1.0, -1.0, -1.0])
    with pytest.raises(ValueError, match="every lower bound to be below its upper one"):
        make(kind, low=[-1.0, 1.0, -1.0, -1.0], high=1.0)


@pytest.mark.parametrize("kind", ["chunked", "token", "flow"])
def test_a_chunk_that_does_not_fit_is_named(kind):
    with pytest.raises(ValueError, match=r"action_dim=4 is no multiple of chunk=3"):
        make(kind, chunk=3)


@pytest.mark.parametrize("kind", [kind for kind in HEADS if kind != "token"])
@pytest.mark.parametrize("init_std", [0.0, -1.0, float("nan")])
def test_noise_without_a_size_is_refused(kind, init_std):
    with pytest.raises(ValueError, match=f"init_std={init_std}; expected a number above 0"):
        make(kind, init_std=init_std)


@pytest.mark.parametrize("kind", ["gaussian", "tanh", "residual"])
def test_a_misspelt_exploration_is_not_another_one(kind):
    with pytest.raises(ValueError, match="exploration='gSDE'; expected one of 'gsde', 'gaussian'"):
        make(kind, exploration="gSDE")


def test_noise_of_a_squashed_head_is_held_as_the_gaussian_head_holds_it(inputs):
    head = make("tanh")
    noise, distribution = head.draw_noise(8), head.distribution(*inputs)
    torch.testing.assert_close(distribution.sample(noise), distribution.sample(noise), rtol=0, atol=0)


def test_exploration_starts_with_the_stated_size(inputs):
    for kind in ("chunked", "flow"):
        head = make(kind, init_std=0.25)
        head.log_std.data.add_(1)
        head.start_exploration(*inputs)
        torch.testing.assert_close(
            head.distribution(*inputs).std, torch.full_like(head.distribution(*inputs).std, 0.25)
        )


def test_a_flow_learns_two_ways_to_act():
    """The same observation, actions -1 or 1: samples are near one or the other, half of them each."""
    features, state = random_features(1), torch.zeros(1, 2)
    head = FlowHead(DIM, 1, **SMALL, integration_steps=10, init_std=0.01)
    batch = features[torch.zeros(64, dtype=torch.long)], state.expand(64, -1)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(400):
        actions = torch.randint(0, 2, (64, 1)) * 2.0 - 1
        optimizer.zero_grad()
        head.supervised_loss(*batch, actions).backward()
        optimizer.step()
    many = features[torch.zeros(500, dtype=torch.long)], state.expand(500, -1)
    samples = head.executed(head.distribution(*many).sample()).flatten()
    assert float(((samples.abs() - 1).abs() < 0.4).float().mean()) > 0.8
    assert 0.35 < float((samples > 0).float().mean()) < 0.65


def test_a_residual_starts_as_its_base_and_stays_near_it(inputs):
    base = make("token")
    head = ResidualHead.over(base, scale=0.2, init_std=0.05)
    assert head.config()["base_kwargs"]["bins"] == 32
    torch.testing.assert_close(head.predict(*inputs), base.predict(*inputs), rtol=0, atol=0)
    frozen = {name: value.clone() for name, value in head.base.state_dict().items()}
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        head.supervised_loss(*inputs, base.predict(*inputs) + 5).backward()
        optimizer.step()
    moved = (head.predict(*inputs) - base.predict(*inputs)).detach()
    assert float(moved.min()) > 0.15 and float(moved.max()) <= 0.2 + 1e-6
    assert all(torch.equal(value, frozen[name]) for name, value in head.base.state_dict().items())
    assert head.train().training and not head.base.training


def test_a_base_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"action_dim is 4, this head's is 3"):
        ResidualHead(DIM, 3, **BASE, **SMALL)
    with pytest.raises(ValueError, match="no ActionHead"):
        ResidualHead(DIM, A, **{**BASE, "base": "vla_rl.heads:ValueHead"}, **SMALL)


def pooled_by(pooler, features):
    return GaussianHead(DIM, A, **{**SMALL, "state_dim": 0}, pooler=pooler).body.pool(features.tokens, features.mask)


def test_mean_and_last_by_hand(inputs):
    features = inputs[0]
    for row, pooled_mean, pooled_last in zip(
        range(8), pooled_by("mean", features), pooled_by("last", features), strict=True
    ):
        real = [token for token, kept in zip(features.tokens[row], features.mask[row], strict=True) if kept]
        normed = [(token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt() for token in real]
        torch.testing.assert_close(pooled_mean, sum(normed) / len(normed))
        torch.testing.assert_close(pooled_last, normed[-1])


def test_learned_queries_are_the_token_learner(inputs):
    torch.manual_seed(1)
    first = pooled_by("token_learner", inputs[0])
    torch.manual_seed(1)
    torch.testing.assert_close(pooled_by("learned_queries", inputs[0]), first, rtol=0, atol=0)


@pytest.mark.parametrize("pooler", POOLERS)
def test_every_pooler_ignores_padding_and_survives_saving(pooler, inputs):
    features, state = inputs
    head = GaussianHead(DIM, A, **SMALL, pooler=pooler)
    scrambled = replace(features, tokens=torch.where(features.mask[..., None], features.tokens, 1e3))
    torch.testing.assert_close(head.predict(scrambled, state), head.predict(features, state))
    again = GaussianHead(**json.loads(json.dumps(head.config())))
    again.load_state_dict(head.state_dict())
    torch.testing.assert_close(again.predict(features, state), head.predict(features, state), rtol=0, atol=0)


def test_a_head_saved_before_there_were_poolers_still_loads():
    head = GaussianHead(DIM, A, **SMALL)
    config = head.config()
    assert config.pop("pooler") == "token_learner"
    GaussianHead(**config).load_state_dict(head.state_dict())
    assert "body.pool.queries" in head.state_dict()


def test_an_unknown_pooler_is_named():
    with pytest.raises(ValueError, match=r"pooler is 'max'; expected one of token_learner"):
        GaussianHead(DIM, A, pooler="max")


def test_an_rl_token_learns_to_rebuild_the_tokens_and_leaves_the_vlm_alone(inputs):
    features, state = inputs
    tokens = features.tokens.clone().requires_grad_()
    head = GaussianHead(DIM, A, **{**SMALL, "width": 64}, pooler="rl_token")
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    actions = torch.randn(8, A)

    def parts():
        own = replace(features, tokens=tokens)
        auxiliary = head.body.auxiliary_loss(own)
        return auxiliary, head.supervised_loss(own, state, actions)

    auxiliary, loss = parts()
    error = torch.nn.functional.mse_loss(head.predict(features, state), actions)
    torch.testing.assert_close(loss, error + auxiliary)
    assert torch.autograd.grad(auxiliary, tokens, allow_unused=True) == (None,)
    assert float(auxiliary.detach()) > 0.9  # a constant reaches 1
    for _ in range(300):
        optimizer.zero_grad()
        parts()[1].backward()
        optimizer.step()
    assert float(parts()[0].detach()) < 0.5
    assert float(GaussianHead(DIM, A, **SMALL).body.auxiliary_loss(features)) == 0
