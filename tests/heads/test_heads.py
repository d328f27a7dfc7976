import json
from dataclasses import replace

import pytest
import torch
from tiny import random_features

from vla_rl.heads import ActionHead, GaussianHead, TokenLearner, ValueHead

SMALL = {"width": 16, "num_queries": 2, "hidden_dim": 24}
EXPLORATIONS = ("gsde", "gaussian")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def head(**more):
    return GaussianHead(32, 3, state_dim=2, **{**SMALL, **more})


def scrambled(features):
    """The same features with other numbers where there is only padding."""
    return replace(features, tokens=torch.where(features.mask[..., None], features.tokens, 1e3))


def test_the_token_learner_sees_no_padding():
    features, learner = random_features(4), TokenLearner(32, width=16, num_queries=2)
    assert not features.mask.all()
    pooled = learner(features.tokens, features.mask)
    assert pooled.shape == (4, 2 * 16)
    torch.testing.assert_close(learner(scrambled(features).tokens, features.mask), pooled, rtol=0, atol=0)
    longer = torch.nn.functional.pad(features.tokens, (0, 0, 0, 3), value=9.0)
    torch.testing.assert_close(learner(longer, torch.nn.functional.pad(features.mask, (0, 3))), pooled)


def test_the_token_learner_is_blind_to_the_order_of_tokens_but_not_to_their_content():
    features, learner = random_features(4), TokenLearner(32, width=16, num_queries=2)
    order = torch.randperm(features.tokens.shape[1])
    pooled = learner(features.tokens, features.mask)
    torch.testing.assert_close(learner(features.tokens[:, order], features.mask[:, order]), pooled)
    changed = features.tokens.clone()
    changed[:, 0] = changed[:, 0].flip(-1)
    assert (learner(changed, features.mask) - pooled).abs().amax(-1).min() > 1e-3


def test_the_token_learner_is_multi_head_attention():
    """Against torch's own attention, given the same projections."""
    features, learner = random_features(4), TokenLearner(32, width=16, num_queries=2)
    attention = torch.nn.MultiheadAttention(16, 4, bias=True, batch_first=True)
    for projection in (attention.in_proj_weight.data.view(3, 16, 16), attention.out_proj.weight.data[None]):
        projection.copy_(torch.eye(16))
    attention.in_proj_bias.data.zero_()
    attention.out_proj.bias.data.zero_()
    keys, values = learner.keys_values(learner.norm(features.tokens)).chunk(2, -1)
    expected, _ = attention(learner.queries.expand(4, -1, -1), keys, values, key_padding_mask=~features.mask)
    torch.testing.assert_close(learner(features.tokens, features.mask), expected.flatten(1))


@pytest.mark.parametrize("make", [head, lambda: ValueHead(32, state_dim=2, **SMALL)])
@pytest.mark.parametrize(("state", "given"), [(None, 0), (torch.zeros(4, 5), 5)])
def test_a_missing_or_wrong_state_is_named(make, state, given):
    with pytest.raises(ValueError, match=rf"state has {given} entries.*state_dim=2"):
        call = make()
        call(random_features(4), state) if isinstance(call, ValueHead) else call.predict(random_features(4), state)


def test_a_state_for_a_head_without_one_is_named():
    with pytest.raises(ValueError, match=r"state has 2 entries.*state_dim=0"):
        GaussianHead(32, 3, **SMALL).predict(random_features(4), torch.zeros(4, 2))


def test_the_state_matters_where_there_is_one():
    features, model = random_features(4), head()
    zeros, ones = model.predict(features, torch.zeros(4, 2)), model.predict(features, torch.ones(4, 2))
    assert (zeros - ones).abs().amax(-1).min() > 1e-4


def test_a_fresh_critic_values_everything_at_zero_and_can_learn():
    critic, features, state = ValueHead(32, state_dim=2, **SMALL), random_features(4), torch.randn(4, 2)
    assert critic(features, state).tolist() == [0.0] * 4
    optimizer, target = torch.optim.Adam(critic.parameters(), lr=1e-2), torch.tensor([1.0, -2.0, 0.5, 3.0])
    for _ in range(200):
        optimizer.zero_grad()
        (critic(features, state) - target).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(critic(features, state), target, atol=0.05, rtol=0)


@pytest.mark.parametrize("exploration", EXPLORATIONS)
def test_mean_of_the_distribution_is_the_prediction(exploration):
    model, features, state = head(exploration=exploration), random_features(4), torch.randn(4, 2)
    distribution = model.distribution(features, state)
    torch.testing.assert_close(distribution.mode, model.predict(features, state))
    assert distribution.log_prob(distribution.mode).shape == (4,)


@pytest.mark.parametrize("exploration", EXPLORATIONS)
def test_exploration_starts_with_the_stated_size(exploration):
    model = head(exploration=exploration, init_std=0.3)
    with torch.no_grad():
        model.log_std.add_(torch.randn_like(model.log_std))  # as another RL task left it
    features, state = random_features(16), torch.randn(16, 2)
    model.start_exploration(features, state)
    std = model.distribution(features, state).std
    assert std.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-4)
    assert std.shape == (16, 3)


def test_noise_is_held_for_gsde_and_left_to_each_step_otherwise():
    assert head(exploration="gaussian").draw_noise(5) is None
    model = head()
    noise = model.draw_noise(5)
    assert noise.shape == (5, 24, 3)
    assert (noise[0] - noise[1]).abs().max() > 0.1
    assert noise.std().item() == pytest.approx(1.0, abs=0.15)
    features, state = random_features(5), torch.randn(5, 2)
    distribution = model.distribution(features, state)
    torch.testing.assert_close(distribution.sample(noise), distribution.sample(noise), rtol=0, atol=0)
    assert (distribution.sample() - distribution.sample()).abs().max() > 0.01


def test_supervised_loss_is_the_mean_squared_error():
    model, features, state = head(), random_features(2), torch.randn(2, 2)
    actions = torch.tensor([[0.5, -0.5, 0.0], [1.0, 0.0, -1.0]])
    predicted = model.predict(features, state).tolist()
    by_hand = sum(
        (p - a) ** 2 for ps, row in zip(predicted, actions.tolist(), strict=True) for p, a in zip(ps, row, strict=True)
    )
    assert model.supervised_loss(features, state, actions).item() == pytest.approx(by_hand / 6, rel=1e-5)


def test_supervised_loss_leaves_the_exploration_alone():
    model, features, state = head(), random_features(2), torch.randn(2, 2)
    model.supervised_loss(features, state, torch.ones(2, 3)).backward()
    assert model.log_std.grad is None
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert untouched == ["log_std"]


def test_one_batch_can_be_learned_by_heart():
    model, features, state = head(), random_features(8), torch.randn(8, 2)
    actions = torch.rand(8, 3) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss = model.supervised_loss(features, state, actions)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


@pytest.mark.parametrize("exploration", EXPLORATIONS)
def test_config_rebuilds_the_head(exploration):
    model = head(exploration=exploration, init_std=0.4)
    again = GaussianHead(**json.loads(json.dumps(model.config())))
    again.load_state_dict(model.state_dict())
    features, state = random_features(4), torch.randn(4, 2)
    first, second = (m.distribution(features, state) for m in (model, again))
    torch.testing.assert_close(first.mode, second.mode, rtol=0, atol=0)
    torch.testing.assert_close(first.std, second.std, rtol=0, atol=0)
    assert again.exploration == exploration and again.init_std == 0.4


def test_a_head_without_log_probs_says_what_to_do():
    with pytest.raises(TypeError, match=r"'ActionHead' has no log_prob.*GaussianHead.*stage1_mode='none'"):
        ActionHead().distribution(random_features(1), None)
    assert ActionHead().supports_rl is False and GaussianHead.supports_rl is True
    for name, arguments in (("config", ()), ("supervised_loss", (random_features(1), None, torch.zeros(1, 2)))):
        with pytest.raises(NotImplementedError, match=rf"ActionHead must define {name}"):
            getattr(ActionHead(), name)(*arguments)
