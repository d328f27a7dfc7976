import math
from dataclasses import replace

import pytest
import torch
from tiny import HEAD, INSTRUCTIONS, differing, parameters, random_features, tiny_policy
from torch.distributions import kl_divergence

from vla_rl.heads import ActionHead, ValueHead
from vla_rl.rl.ppo import PPOConfig, UpdateError, approx_kl, explained_variance, policy_loss, ppo_update
from vla_rl.rl.rollout import Rollout

T, N = 12, 4
CONFIG = PPOConfig(update_epochs=2, minibatch_size=16, learning_rate=1e-2, target_kl=None)


def make_critic(policy):
    return ValueHead(policy.encoder.feature_dim, state_dim=2, **HEAD)


def make_rollout(policy, *, seed=0, invalid=()):
    """Random features and sampled actions; the advantage is large where the first action is above its mean."""
    torch.manual_seed(seed)
    features, state = random_features(T * N, seed=seed), torch.randn(T * N, 2)
    with torch.no_grad():
        distribution = policy.head.distribution(features, state)
        actions = distribution.sample()
        log_probs = distribution.log_prob(actions)
    valid = torch.ones(T * N, dtype=torch.bool)
    valid[list(invalid)] = False
    advantages = (actions - distribution.mode)[:, 0] / distribution.std[:, 0]
    shape = (T, N)
    return Rollout(
        tokens=features.tokens,
        mask=features.mask,
        fingerprint=policy.encoder.fingerprint,
        state=state,
        actions=actions.view(T, N, 2),
        rewards=torch.zeros(shape),
        terminated=torch.zeros(shape, dtype=torch.bool),
        done=torch.zeros(shape, dtype=torch.bool),
        valid=valid.view(shape),
        task_id=torch.zeros(T * N, dtype=torch.long).numpy(),
        images=None,
        log_probs=log_probs.view(shape),
        values=torch.zeros(shape),
        advantages=advantages.view(shape),
        returns=torch.randn(shape),
    )


def update(policy, critic, rollout, *, config=CONFIG, **more):
    optimizer = torch.optim.Adam([*policy.head.parameters(), *critic.parameters()], lr=config.learning_rate)
    generator = torch.Generator().manual_seed(0)
    return ppo_update(policy, critic, optimizer, rollout, config=config, generator=generator, **more)


def test_policy_loss_by_hand():
    """Ratios 1.5, .5, 1.5, .5, 1.1 with advantages +2, +2, -2, -2, +1 and epsilon .2.

    1.5 with A > 0 is clipped to 1.2, .5 with A < 0 to .8; the other two get their full ratio; 1.1 is within bounds.
    """
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1])
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, 1.0])
    old = torch.tensor([-1.0, 0.0, 2.0, -3.0, 0.5])
    new = (old + ratio.log()).requires_grad_()
    loss = policy_loss(new, old, advantages, clip_coef=0.2)
    assert loss.item() == pytest.approx(-(1.2 * 2 + 0.5 * 2 - 1.5 * 2 - 0.8 * 2 + 1.1 * 1) / 5)
    loss.backward()
    assert (new.grad != 0).tolist() == [False, True, True, False, True]
    torch.testing.assert_close(new.grad[[1, 2, 4]], torch.tensor([-0.5 * 2, 1.5 * 2, -1.1]) / 5)


def test_approx_kl_is_the_kl_of_gaussians():
    torch.manual_seed(0)
    old = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    new = torch.distributions.Normal(torch.tensor([0.3, -0.2]), torch.tensor([0.7, 0.8]))
    samples = old.sample((200_000,))
    estimate = approx_kl(new.log_prob(samples).sum(-1), old.log_prob(samples).sum(-1)).item()
    assert estimate == pytest.approx(kl_divergence(old, new).sum().item(), rel=0.02)
    assert kl_divergence(new, old).sum().item() != pytest.approx(estimate, rel=0.05)


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns + 5, returns) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(4), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(4)) != explained_variance(returns, torch.ones(4))  # nan


def test_the_first_gradient_step_starts_from_a_ratio_of_one(policy):
    stats = update(
        policy, make_critic(policy), make_rollout(policy), config=replace(CONFIG, update_epochs=1, minibatch_size=T * N)
    )
    assert stats["gradient_steps"] == 1
    assert stats["approx_kl"] == pytest.approx(0.0, abs=1e-5)
    assert stats["old_approx_kl"] == pytest.approx(0.0, abs=1e-4)
    assert stats["clipfrac"] == 0.0
    assert stats["policy_loss"] == pytest.approx(0.0, abs=1e-4)  # ratio 1 and normalised advantages


def test_actions_of_positive_advantage_become_more_likely(policy):
    rollout = make_rollout(policy)
    rows = rollout.valid_rows

    def now():
        with torch.no_grad():
            return policy.head.distribution(rollout.features(rows), rollout.states(rows))

    before = now()
    stats = update(policy, make_critic(policy), rollout, config=replace(CONFIG, learning_rate=3e-3))
    after = now()
    # The advantage is linear in the first action, so the surrogate's ascent direction is a larger first action.
    assert (after.mode[:, 0] > before.mode[:, 0]).float().mean() > 0.95
    change = after.log_prob(rollout.flat_actions) - before.log_prob(rollout.flat_actions)
    advantages = rollout.advantages.flatten()
    assert change[advantages > 0.5].mean() > 0.05 and change[advantages < -0.5].mean() < -0.05
    assert stats["approx_kl"] > 0


def test_the_critic_learns_the_returns(policy):
    rollout, critic = make_rollout(policy), make_critic(policy)
    config = replace(CONFIG, update_epochs=60, learning_rate=1e-2)
    update(policy, critic, rollout, config=config, train_actor=False)
    with torch.no_grad():
        values = critic(rollout.features(rollout.valid_rows), rollout.states(rollout.valid_rows))
    assert explained_variance(values, rollout.returns.flatten()) > 0.9


def test_warm_up_trains_the_critic_alone(policy):
    critic = make_critic(policy)
    head, value = parameters(policy.head), parameters(critic)
    stats = update(policy, critic, make_rollout(policy), train_actor=False)
    assert not differing(head, parameters(policy.head))
    assert differing(value, parameters(critic))
    assert "approx_kl" not in stats and stats["gradient_steps"] == 6
    update(policy, critic, make_rollout(policy))
    changed = differing(head, parameters(policy.head))
    assert {"log_std", "mean.weight", "body.pool.queries"} <= changed


def test_rows_of_an_autoreset_have_no_influence():
    """Their content may be anything, even nan."""
    invalid = (0, 5, 17, 40)
    results = []
    for rubbish in (False, True):
        policy = tiny_policy()
        critic = make_critic(policy)
        rollout = make_rollout(policy, invalid=invalid)
        if rubbish:
            rows = list(invalid)
            for tensor in (rollout.tokens, rollout.state, rollout.actions.view(-1, 2)):
                tensor[rows] = 7.0
            for tensor in (rollout.advantages, rollout.returns, rollout.log_probs, rollout.values):
                tensor.view(-1)[rows] = float("nan")
        stats = update(policy, critic, rollout)
        results.append((parameters(policy.head), parameters(critic), stats))
    (head, critic, stats), (head2, critic2, stats2) = results
    assert not differing(head, head2) and not differing(critic, critic2)
    assert stats == stats2
    policy = tiny_policy()
    update(policy, make_critic(policy), make_rollout(policy))
    assert differing(head, parameters(policy.head))  # with those rows the update is another one


def test_rows_that_a_minibatch_leaves_out_are_few(policy):
    """47 rows in minibatches of 23: the last row alone is dropped, and nothing else."""
    stats = update(
        policy, make_critic(policy), make_rollout(policy, invalid=(3,)), config=replace(CONFIG, minibatch_size=23)
    )
    assert stats["gradient_steps"] == 2 * 2


@pytest.mark.parametrize("target_kl", [0.01, None])
def test_above_the_target_kl_the_actor_rests_and_the_critic_goes_on(policy, target_kl):
    rollout, critic = make_rollout(policy), make_critic(policy)

    def now():
        with torch.no_grad():
            return policy.head.distribution(rollout.features(rollout.valid_rows), rollout.states(rollout.valid_rows))

    before = now()
    config = replace(CONFIG, update_epochs=50, learning_rate=1e-3, target_kl=target_kl)
    stats = update(policy, critic, rollout, config=config)
    assert stats["gradient_steps"] == 50 * 3
    assert 0 < stats["actor_steps"] < 50 * 3 if target_kl else stats["actor_steps"] == 50 * 3
    divergence = before.kl(now()).mean().item()
    assert divergence < 0.06 if target_kl else divergence > 0.2
    with torch.no_grad():
        values = critic(rollout.features(rollout.valid_rows), rollout.states(rollout.valid_rows))
    assert explained_variance(values, rollout.returns.flatten()) > 0.5


def test_features_of_another_encoder_are_refused(policy):
    rollout = make_rollout(policy)
    rollout.fingerprint = "old"
    head = parameters(policy.head)
    with pytest.raises(UpdateError, match=r"features of encoder old.*collect again"):
        update(policy, make_critic(policy), rollout)
    assert not differing(head, parameters(policy.head))


def test_an_encoder_that_learned_since_the_rollout_is_noticed(policy):
    rollout = make_rollout(policy)
    with policy.encoder.trainable("all") as weights:
        weights[0].data.add_(0.01)
    with pytest.raises(UpdateError, match="the VLM changed after the rollout"):
        update(policy, make_critic(policy), rollout)


def test_a_head_that_moved_since_the_rollout_is_noticed(policy):
    rollout = make_rollout(policy)
    with torch.no_grad():
        policy.head.mean.bias.add_(0.1)
    head = parameters(policy.head)
    with pytest.raises(UpdateError, match=r"first PPO ratio is .*, not 1"):
        update(policy, make_critic(policy), rollout)
    assert not differing(head, parameters(policy.head))


@pytest.mark.parametrize("train_actor", [False, True])
def test_nan_rewards_stop_the_update(policy, train_actor):
    rollout = make_rollout(policy)
    rollout.returns[3, 1] = float("nan")
    rollout.advantages[3, 1] = float("nan")
    critic = make_critic(policy)
    with pytest.raises(UpdateError, match=r"loss is nan.*check the rewards"):
        update(policy, critic, rollout, config=replace(CONFIG, minibatch_size=T * N), train_actor=train_actor)
    assert all(torch.isfinite(p).all() for p in [*policy.head.parameters(), *critic.parameters()])


def test_a_policy_that_runs_away_is_stopped(policy):
    config = replace(CONFIG, learning_rate=0.3, update_epochs=50)
    with pytest.raises(UpdateError, match=r"KL of a minibatch is .* its largest ratio .*: the policy ran away"):
        update(policy, make_critic(policy), make_rollout(policy), config=config)
    assert all(torch.isfinite(p).all() for p in policy.head.parameters())


def update_with_one_ratio(policy, ratio, **changes):
    """An update in which the policy is the rollout's, but for one of 48 rows."""
    rollout = make_rollout(policy)
    rollout.log_probs[3, 1] -= math.log(ratio)
    config = replace(CONFIG, update_epochs=1, minibatch_size=T * N, **changes)
    return update(policy, make_critic(policy), rollout, config=config, features_of=rollout.features)


def test_one_ratio_that_explodes_is_seen_in_the_kl_and_stops_the_update(policy):
    """The estimate of the KL grows by ratio / B: there is no other limit on the ratio, and none is needed."""
    head = parameters(policy.head)
    with pytest.raises(UpdateError, match=r"KL of a minibatch is 20\.7 and its largest ratio 1e\+03"):
        update_with_one_ratio(policy, 1000.0)
    assert not differing(head, parameters(policy.head))


def test_one_large_ratio_makes_the_actor_rest_and_is_noted(policy):
    head = parameters(policy.head)
    stats = update_with_one_ratio(policy, 100.0, target_kl=0.02)
    assert stats["approx_kl"] == pytest.approx((99 - math.log(100)) / (T * N), rel=1e-3)
    assert stats["clipfrac"] == pytest.approx(1 / (T * N))
    assert stats["actor_steps"] == 0 and not differing(head, parameters(policy.head))


def test_a_loss_that_becomes_nan_without_nan_in_the_rollout_is_told(policy):
    critic = make_critic(policy)
    critic.output.register_forward_hook(lambda module, given, value: value * float("nan"))
    before = parameters(policy.head)
    with pytest.raises(UpdateError, match="the PPO loss is nan; lower learning_rate"):
        update(policy, critic, make_rollout(policy))
    assert not differing(before, parameters(policy.head))


def test_a_nan_gradient_of_a_finite_loss_stops_before_the_step(policy):
    rollout, critic = make_rollout(policy), make_critic(policy)
    policy.head.mean.bias.register_hook(lambda gradient: gradient * float("nan"))
    before, value = parameters(policy.head), parameters(critic)
    with pytest.raises(UpdateError, match="the gradient of a finite PPO loss is nan"):
        update(policy, critic, rollout)
    assert not differing(before, parameters(policy.head)) and not differing(value, parameters(critic))


def test_behaviour_cloning_in_the_same_loss(policy):
    """With a huge weight on a target action, PPO + BC ends at the target whatever the advantages say."""
    rollout = make_rollout(policy)
    rows = rollout.valid_rows
    target = torch.full((len(rows), 2), -0.5)

    def imitate():
        return policy.head.supervised_loss(rollout.features(rows), rollout.states(rows), target)

    config = replace(CONFIG, bc_coef=100.0, update_epochs=60, learning_rate=1e-3)
    before = imitate().item()
    stats = update(policy, make_critic(policy), rollout, config=config, bc_loss=imitate)
    assert stats["bc_loss"] < before
    assert imitate().item() < 0.2 * before


def update_whole_model(policy, rollout, **more):
    """One update of all weights; returns how many tensors of the VLM there are, how many moved, and the figures."""
    images = torch.randint(0, 256, (T * N, 32, 32, 3), dtype=torch.uint8)
    with policy.encoder.trainable("all") as weights:
        before = [weight.detach().clone() for weight in weights]
        critic = make_critic(policy)
        torch.nn.init.normal_(critic.output.weight)
        optimizer = torch.optim.Adam([*policy.head.parameters(), *critic.parameters(), *weights], lr=1e-3)
        stats = ppo_update(
            policy,
            critic,
            optimizer,
            rollout,
            features_of=lambda rows: policy.encoder.forward(images[rows], [INSTRUCTIONS[0]] * len(rows)),
            **more,
        )
        moved = sum(not torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    return len(before), moved, stats


def test_ppo_on_the_whole_model_changes_the_vlm_too(policy):
    """`features_of` gives features with gradients; the stale fingerprint is then no error."""
    config = replace(CONFIG, update_epochs=1)
    tensors, moved, _ = update_whole_model(policy, make_rollout(policy), config=config)
    assert moved > 0.9 * tensors


def test_a_fresh_critic_does_not_move_the_vlm(policy):
    """Its loss says nothing yet, and a VLM that moved is a policy that moved."""
    config = replace(CONFIG, update_epochs=1)
    _, moved, stats = update_whole_model(policy, make_rollout(policy), config=config, train_actor=False)
    assert stats["gradient_steps"] == 3 and moved == 0


def test_the_whole_model_stops_at_the_target_kl(policy):
    config = replace(CONFIG, update_epochs=20, target_kl=1e-3)
    _, _, stats = update_whole_model(policy, make_rollout(policy), config=config)
    assert 0 < stats["gradient_steps"] < 20 * 3


@pytest.mark.parametrize("bad", [{"num_envs": 0}, {"rollout_steps": 0}, {"minibatch_size": 1}])
def test_impossible_sizes_are_refused(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        PPOConfig(**bad)


def test_a_head_without_log_probs_is_refused_before_anything_runs():
    from vla_rl.rl.stage1 import run_collect, run_ppo

    class Plain(ActionHead):
        def config(self):
            return {"action_dim": 2}

    policy = tiny_policy()
    policy.head = Plain()
    for run, more in ((run_ppo, {"config": CONFIG}), (run_collect, {"num_episodes": 1})):
        with pytest.raises(TypeError, match=r"'Plain' has no log_prob.*GaussianHead.*stage1_mode"):
            run(policy, None, task="reach-red", **more)
