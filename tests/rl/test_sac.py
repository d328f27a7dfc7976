import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from test_learning import Fixed, expert
from tiny import HEAD, differing, parameters, random_features, tiny_encoder, tiny_policy, toy_env, toy_store

from vla_rl.collect import run_expert
from vla_rl.data import BalancedSampler, EpisodeStore, Statistics, compute_statistics
from vla_rl.evaluation import Evaluator
from vla_rl.heads import ActionHead, TanhGaussianHead
from vla_rl.heads.distributions import DiagonalGaussian
from vla_rl.policy import VLAPolicy
from vla_rl.rl import stage1_sac
from vla_rl.rl.latent_buffer import LatentBatch
from vla_rl.rl.ppo import UpdateError
from vla_rl.rl.sac import (
    EnsembleCritic,
    SACfDConfig,
    actor_loss,
    critic_loss,
    executed_action,
    q_targets,
    temperature_loss,
    update_target,
)
from vla_rl.rl.sac_learner import SACLearner
from vla_rl.rl.stage1 import NoSuccessError
from vla_rl.rl.stage1_sac import run_sac
from vla_rl.sl.supervised import SLConfig, train_supervised
from vla_rl.vector import WorkerVectorEnv

CONFIG = SACfDConfig(
    total_timesteps=400,
    num_envs=4,
    rollout_steps=5,
    num_demos=2,
    learning_starts=200,
    utd_ratio=0.4,
    num_critics=2,
    batch_size=16,
    critic_warmup_updates=10,
)


def test_targets_by_hand():
    """Three transitions: going on, truncated (both bootstrap), terminated (does not)."""
    rewards, discounts = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.9, 0.9, 0.0])
    next_q = torch.tensor([[2.0, 4.0, 7.0], [3.0, 1.0, 8.0]])
    torch.testing.assert_close(q_targets(rewards, discounts, next_q), torch.tensor([1.8, 1.4, 1.0]))
    bonus = torch.tensor([0.1, -0.2, 5.0])
    with_entropy = q_targets(rewards, discounts, next_q, entropy_bonus=bonus)
    torch.testing.assert_close(with_entropy, torch.tensor([0.9 * 2.1, 0.5 + 0.9 * 0.8, 1.0]))


def test_critic_loss_by_hand():
    q = torch.tensor([[1.0, 2.0], [0.0, 5.0]], requires_grad=True)
    loss = critic_loss(q, torch.tensor([2.0, 2.0]))
    assert loss.item() == pytest.approx((1 + 0) / 2 + (4 + 9) / 2)
    loss.backward()  # every critic gets the gradient of its own error
    torch.testing.assert_close(q.grad, torch.tensor([[-1.0, 0.0], [-2.0, 3.0]]))


def test_actor_loss_by_hand():
    q, entropy = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0.5, -1.5])
    assert actor_loss(q, entropy, temperature=0.2).item() == pytest.approx(-((2 + 0.1) + (4 - 0.3)) / 2)


@pytest.mark.parametrize(("entropy", "rises"), [(-3.0, True), (1.0, False)])
def test_the_temperature_holds_the_entropy_at_its_target(entropy, rises):
    log_temperature = torch.tensor(-1.0, requires_grad=True)
    entropies = torch.tensor([entropy - 0.5, entropy + 0.5], requires_grad=True)
    loss = temperature_loss(log_temperature, entropies, target_entropy=-2.0)
    loss.backward()
    assert log_temperature.grad.item() == pytest.approx(entropy + 2.0)  # descent: log alpha -= rate * gradient
    assert (log_temperature.grad.item() < 0) == rises
    assert entropies.grad is None


def test_the_target_follows_slowly():
    source, target = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for module, weight, bias in ((source, 1.0, -2.0), (target, 3.0, 0.0)):
        torch.nn.init.constant_(module.weight, weight)
        torch.nn.init.constant_(module.bias, bias)
    update_target(target, source, 0.1)
    assert target.weight.item() == pytest.approx(2.8) and target.bias.item() == pytest.approx(-0.2)
    assert source.weight.item() == 1.0


def test_the_critics_see_what_the_env_executes():
    statistics = Statistics(np.array([0.5, -0.2]), np.array([0.5, 2.0]), np.zeros(2), np.ones(2), 10, 1)
    policy = tiny_policy(statistics=statistics)
    action = torch.tensor([[0.4, 0.3], [2.0, -1.0]], requires_grad=True)
    executed = executed_action(policy, action)
    torch.testing.assert_close(executed, torch.tensor([[0.7, 0.4], [1.0, -1.0]]))
    np.testing.assert_allclose(executed.detach(), np.clip(policy.env_action(action.detach()), -1, 1), rtol=1e-6)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_an_action_out_of_bounds_can_only_return(direction):
    """Descent moves an action against its gradient."""
    action = torch.tensor([[0.5, 1.3], [-0.5, -1.3]], requires_grad=True)
    (direction * executed_action(tiny_policy(), action)).sum().backward()
    assert action.grad[:, 0].tolist() == [direction, direction]
    assert action.grad[0, 1].item() == max(direction, 0.0) and action.grad[1, 1].item() == min(direction, 0.0)


def random_batch(policy, size=32, *, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    features = replace(random_features(size, seed=seed), fingerprint=policy.encoder.fingerprint)
    following = replace(random_features(size, seed=seed + 1), fingerprint=policy.encoder.fingerprint)
    fields = {
        "features": features,
        "state": torch.randn(size, 2, generator=generator),
        "actions": torch.rand(size, 2, generator=generator) * 2 - 1,
        "rewards": torch.zeros(size),
        "next_features": following,
        "next_state": torch.randn(size, 2, generator=generator),
        "discounts": torch.zeros(size),
    }
    return LatentBatch(**(fields | changes))


def test_every_critic_of_the_ensemble_is_a_layer_normalised_mlp():
    torch.manual_seed(0)
    critic = EnsembleCritic(32, 2, state_dim=2, num_critics=3, **HEAD)
    for bias in (critic.first.bias, critic.second.bias, critic.output.bias):
        torch.nn.init.normal_(bias)
    features, state, actions = random_features(5), torch.randn(5, 2), torch.randn(5, 2)
    embedding = critic.embed(features, state)
    q = critic(embedding, actions)
    assert q.shape == (3, 5)
    for e in range(3):
        x = torch.cat([embedding, actions], dim=-1)
        for layer in (critic.first, critic.second):
            x = x @ layer.weight[e] + layer.bias[e]
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = torch.nn.functional.gelu(x)
        torch.testing.assert_close(q[e], (x @ critic.output.weight[e] + critic.output.bias[e]).squeeze(-1))
    assert (q[0] - q[1]).abs().min() > 1e-4
    # Padding says nothing, and however far an action is from the data, the value stays bounded.
    garbage = features.tokens.clone()
    garbage[~features.mask] = 99.0
    torch.testing.assert_close(critic.embed(replace(features, tokens=garbage), state), embedding)
    far, farther = (critic(embedding, scale * torch.ones(5, 2)) for scale in (1e3, 1e6))
    assert (farther - far).abs().max() < 0.1


def test_critics_learn_the_value_of_a_truncated_and_of_a_terminated_step():
    """A reward of 1 for ever, with gamma .5: 2 where only the clock ends the episode, 1 where the env does."""
    policy = tiny_policy()
    learner = SACLearner(
        policy, config=replace(CONFIG, tau=0.2, critic_learning_rate=3e-3, critic_warmup_updates=10**6)
    )
    one = random_batch(policy, 1)
    rows = torch.zeros(32, dtype=torch.long)
    for discount, value in ((0.5, 2.0), (0.0, 1.0)):
        batch = random_batch(
            policy,
            features=one.features[rows],
            state=one.state[rows],
            next_features=one.features[rows],
            next_state=one.state[rows],
            rewards=torch.ones(32),
            discounts=torch.full((32,), discount),
        )
        for _ in range(200):
            stats = learner.update(batch)
        assert stats["q"] == pytest.approx(value, abs=0.1)


def test_actor_and_critics_find_the_best_action():
    """A bandit with reward 1 - |a - a*|^2, from random actions: the mean goes to a*, the noise to its target."""
    torch.manual_seed(0)
    policy = tiny_policy(init_std=0.6, exploration="gaussian")
    best = torch.tensor([0.5, -0.3])
    config = replace(CONFIG, critic_learning_rate=3e-3, learning_rate=3e-3, bc_coef=0.0, target_std=0.2, policy_delay=1)
    learner = SACLearner(policy, config=replace(config, temperature_learning_rate=0.02))
    for step in range(500):
        batch = random_batch(policy, 64, seed=step % 50)
        actions = torch.rand(64, 2) * 2 - 1
        learner.update(replace(batch, actions=actions, rewards=1 - (actions - best).square().sum(-1)))
    batch = random_batch(policy, 64, seed=1)
    mean = policy.head.predict(batch.features, batch.state)
    assert (mean - best).abs().mean() < 0.1
    std = policy.head.distribution(batch.features, batch.state).std.mean().item()
    assert std == pytest.approx(0.2, rel=0.25)


def test_the_critics_warm_up_before_the_actor_moves():
    policy = tiny_policy()
    learner = SACLearner(policy, config=replace(CONFIG, critic_warmup_updates=3, policy_delay=2))
    before, critic = parameters(policy.head), parameters(learner.critic)
    moved = []
    for step in range(6):
        learner.update(random_batch(policy, seed=step, rewards=torch.ones(32)), num_demos=16)
        moved.append(bool(differing(before, parameters(policy.head))))
        before = parameters(policy.head)
    assert moved == [False, False, False, True, False, True]
    assert len(differing(critic, parameters(learner.critic))) > 6


def test_the_actor_does_not_train_the_critics():
    policy = tiny_policy()
    learner = SACLearner(
        policy, config=replace(CONFIG, critic_warmup_updates=0, policy_delay=1, critic_learning_rate=0.0)
    )
    before, head = parameters(learner.critic), parameters(policy.head)
    learner.update(random_batch(policy), num_demos=16)
    assert not differing(before, parameters(learner.critic)) and differing(head, parameters(policy.head))
    assert all(weight.requires_grad for weight in learner.critic.parameters())


def test_behaviour_cloning_where_the_critics_prefer_the_demonstration():
    torch.manual_seed(0)
    policy = tiny_policy()
    config = replace(CONFIG, critic_warmup_updates=0, policy_delay=1, learning_rate=3e-3, bc_coef=1.0)
    batch = random_batch(policy, 16, actions=torch.full((16, 2), 0.8))
    for q_filter, scale, kept in ((True, 1.0, 1.0), (True, -1.0, 0.0), (False, -1.0, 1.0)):
        learner = SACLearner(policy, config=replace(config, q_filter=q_filter))

        class Judge(torch.nn.Module):
            """Prefers actions near .8 or far from it; too faintly to matter but in the filter."""

            def embed(self, features, state):
                return torch.zeros(len(features), 1)

            def forward(self, embedding, actions, scale=scale):
                return -1e-6 * scale * (actions - 0.8).abs().sum(-1).expand(2, -1)

        learner.critic = Judge()
        stats = learner._update_actor(batch, torch.zeros(16, 1), 16)
        assert stats["q_filter"] == kept
        assert (stats["bc_loss"] > 0) == (kept > 0)


def test_stale_features_and_broken_losses_stop_the_run():
    policy = tiny_policy()
    learner = SACLearner(policy, config=CONFIG)
    with pytest.raises(UpdateError, match=r"features of encoder random.*collect again"):
        learner.update(random_batch(policy, features=random_features(32)))
    with pytest.raises(UpdateError, match="the critic loss of SAC is nan"):
        learner.update(random_batch(policy, rewards=torch.full((32,), math.nan)))


class Frozen(ActionHead):
    """Has log-probs, but draws without gradient."""

    supports_rl = True

    def __init__(self, feature_dim, action_dim):
        super().__init__()
        self.mean = torch.nn.Linear(feature_dim, action_dim)

    def config(self):
        return {"feature_dim": 32, "action_dim": 2, "state_dim": 2}

    def distribution(self, features, state):
        class Drawn(DiagonalGaussian):
            def sample(self, noise=None):
                return super().sample(noise).detach()

        return Drawn(self.mean(features.tokens.float()[:, 0]), torch.ones(2))


def test_heads_that_sac_cannot_train_are_named():
    encoder = tiny_encoder()
    policy = VLAPolicy(encoder, Frozen(encoder.feature_dim, 2))
    learner = SACLearner(policy, config=replace(CONFIG, critic_warmup_updates=0, policy_delay=1))
    with pytest.raises(TypeError, match=r"'Frozen' draws actions that no gradient flows through.*GaussianHead"):
        learner.update(random_batch(policy))
    policy.head.supports_rl = False
    with pytest.raises(TypeError, match="'Frozen' has no log_prob"):
        run_sac(policy, toys(), task="reach-red", config=CONFIG)


def test_a_squashed_head_on_a_bfloat16_encoder_learns_the_loss_of_its_demonstrations():
    encoder = tiny_encoder(dtype=torch.bfloat16)
    torch.manual_seed(0)
    policy = VLAPolicy(
        encoder, TanhGaussianHead(encoder.feature_dim, 2, state_dim=2, **HEAD, low=-2.0, high=[1.0, 3.0])
    )
    learner = SACLearner(policy, config=replace(CONFIG, critic_warmup_updates=0, policy_delay=1))
    batch = random_batch(policy)
    shown = batch.actions[:8]
    with torch.no_grad():
        u = policy.head.mean(policy.head.body(batch.features[:8], batch.state[:8]))
        squashed = torch.tensor([-0.5, 0.5]) + torch.tensor([1.5, 2.5]) * torch.tanh(u)
    expected = (squashed - shown).square().mean().item()
    assert learner.update(batch, num_demos=8)["bc_loss"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_critics": 4, "num_min_critics": 5}, "num_min_critics=5; expected 1 .. num_critics="),
        ({"demo_fraction": 1.0}, "demo_fraction=1.0"),
        ({"n_step": 0}, "n_step=0"),
        ({"init_temperature": 0.0}, "init_temperature=0.0; expected a number above 0"),
        ({"target_std": -0.1}, "target_std=-0.1; expected a number above 0"),
        ({"buffer_device": "cuda"}, "buffer_device='cuda'; expected one of 'cpu', 'policy'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SACfDConfig(**changes)


def toys(*, num_envs=4, horizon=20, mode=AutoresetMode.NEXT_STEP):
    return WorkerVectorEnv([partial(toy_env, horizon=horizon)] * num_envs, num_workers=0, autoreset_mode=mode)


@pytest.fixture
def policy():
    """Noisy enough to stumble on the square now and then."""
    return tiny_policy(init_std=1.0)


def test_each_frame_passes_through_the_vlm_once_whatever_the_number_of_updates(policy):
    torch.manual_seed(0)
    fingerprint, head = policy.encoder.fingerprint, parameters(policy.head)
    logged = []
    result = run_sac(
        policy, toys(), task="reach-red", config=CONFIG, seed=3, iteration=5, log=lambda m, s: logged.append((m, s))
    )
    assert CONFIG.total_timesteps <= result.num_env_steps < CONFIG.total_timesteps + 4 * CONFIG.rollout_steps
    # Every env step, and the final frame of every episode that has ended (those of the latest row are still to come).
    assert 0 <= result.num_env_steps + result.num_episodes - result.num_vlm_frames <= 4
    assert policy.encoder.fingerprint == fingerprint
    assert {"log_std", "mean.weight"} <= differing(head, parameters(policy.head))
    assert 0 < len(result.successes) < result.num_episodes
    for episode in result.successes:
        assert episode.success and (episode.task, episode.source, episode.iteration) == ("reach-red", "rl", 5)
        assert np.abs(episode.actions).max() <= 1.0
    last, step = logged[-1]
    assert step == result.num_env_steps
    tags = {"charts/success_rate", "charts/SPS", "losses/value_loss", "losses/policy_loss", "losses/temperature"}
    assert tags <= last.keys()
    assert last["charts/demonstrations"] == len(result.successes)


def test_every_point_of_the_curve_stands_for_as_many_episodes_as_there_are_environments(policy, monkeypatch):
    windows, rates = [], []
    real = stage1_sac.success_rate

    def noted(window, collector):
        windows.append(window)
        rates.append(real(window, collector))
        return rates[-1]

    monkeypatch.setattr(stage1_sac, "success_rate", noted)
    result = run_sac(policy, toys(), task="reach-red", config=replace(CONFIG, total_timesteps=150), seed=3)
    assert min(map(len, windows)) >= 4 and sum(map(len, windows[:-1])) < result.num_episodes
    assert sum(map(len, windows)) > result.num_episodes, "the last one had enough of its own"
    assert result.last_success_rate == rates[-1]


def test_sft_acts_until_there_are_demonstrations(policy):
    """Its deterministic action stays as it was to the bit, since the head itself is the actor."""
    start = parameters(policy.head)
    config = replace(CONFIG, num_demos=10**6, learning_starts=10**6)
    result = run_sac(policy, toys(), task="reach-red", config=config)
    assert differing(start, parameters(policy.head)) <= {"log_std"}  # the size of the exploration is set
    assert result.successes


def test_the_number_of_updates_follows_the_env_steps(policy, monkeypatch):
    updates = []
    original = SACLearner.update

    def counted(self, batch, *, num_demos=0):
        updates.append(num_demos)
        return original(self, batch, num_demos=num_demos)

    monkeypatch.setattr(SACLearner, "update", counted)
    torch.manual_seed(0)
    config = replace(CONFIG, num_demos=10**6, total_timesteps=260, utd_ratio=2.0, critic_warmup_updates=30)
    steps = run_sac(policy, toys(), task="reach-red", config=config, seed=3).num_env_steps
    learning = steps - config.learning_starts  # but for those, at most one turn, that went beyond the start
    assert 30 + 2 * (learning - 4 * 5) <= len(updates) <= 30 + 2 * learning
    assert set(updates) == {8}


def test_the_same_seed_repeats_a_run(policy):
    start = parameters(policy.head)
    weights = []
    for seed in (0, 0, 1):
        policy.head.load_state_dict(start)
        torch.manual_seed(7)
        run_sac(policy, toys(), task="reach-red", config=CONFIG, seed=seed)
        weights.append(parameters(policy.head))
    assert not differing(weights[0], weights[1])
    assert differing(weights[0], weights[2])


def test_given_demonstrations_are_encoded_once_and_end_the_gathering(policy, tmp_path):
    with EpisodeStore(toy_store(tmp_path / "store", episodes=3, noise=0.0), mode="r") as store:
        demos = list(store)
    frames = sum(episode.total_steps + 1 for episode in demos)
    logged = []
    result = run_sac(
        policy,
        toys(),
        task="reach-red",
        config=replace(CONFIG, num_demos=3, keep_successes=False, total_timesteps=100),
        demos=demos,
        log=lambda m, s: logged.append(m),
    )
    assert 0 <= frames + result.num_env_steps + result.num_episodes - result.num_vlm_frames <= 4
    assert logged[-1]["charts/demonstrations"] == 3 and "losses/value_loss" in logged[-1]


def test_a_reward_that_is_never_seen_stops_the_run(policy):
    policy.head.init_std = 1e-3
    config = replace(CONFIG, learning_starts=50)
    with pytest.raises(
        NoSuccessError, match=r"none of the first \d+ noisy episodes on 'reach-red'.*stop_at_zero=False"
    ):
        run_sac(policy, toys(horizon=1), task="reach-red", config=config, stop_at_zero=True)
    result = run_sac(policy, toys(horizon=1), task="reach-red", config=replace(config, total_timesteps=100))
    assert result.successes == [] and result.last_success_rate == 0.0


def test_the_wait_for_demonstrations_lasts_until_episodes_have_ended(policy):
    """After 5 of `learning_starts` steps none of the episodes of 20 could have."""
    config = replace(CONFIG, learning_starts=5, rollout_steps=1, num_demos=1_000, total_timesteps=100)
    policy.head.init_std = 1e-3
    with pytest.raises(NoSuccessError, match=r"none of the first [4-8] noisy episodes"):
        run_sac(policy, toys(horizon=5), task="reach-red", config=config, stop_at_zero=True)


def test_without_wanted_demonstrations_it_is_plain_sac(policy):
    config = replace(CONFIG, num_demos=0, rollout_steps=1, learning_starts=0, total_timesteps=60)
    logged = []
    result = run_sac(
        policy,
        toys(),
        task="reach-red",
        config=config,
        stop_at_zero=True,
        log=lambda metrics, step: logged.append(metrics),
    )
    assert result.num_env_steps >= 60 and any("losses/value_loss" in metrics for metrics in logged)


def test_successes_that_the_memory_has_forgotten_are_named_as_such(policy):
    config = replace(CONFIG, buffer_size=5)  # two frames of four environments are more
    with pytest.raises(ValueError, match=r"succeeded, the shortest in \d+ steps, but .* room for 5 frames.*buffer_gb"):
        run_sac(policy, toys(), task="reach-red", config=config)


def test_a_solved_task_ends_stage_1_early(policy):
    config = replace(CONFIG, total_timesteps=10_000, converged_success=0.0, utd_ratio=0.1)
    result = run_sac(policy, toys(), task="reach-red", config=config)
    assert result.converged and result.num_env_steps < 1000


@pytest.mark.slow
def test_sac_from_its_own_successes_learns_the_new_variant(tmp_path):
    """SFT reaches the square's new place in about a third of the episodes."""
    torch.manual_seed(0)
    with EpisodeStore(tmp_path / "expert") as store:
        for seed in range(20):
            store.append(run_expert(Fixed(), expert, task="original", seed=seed, noise=0.2))
        policy = tiny_policy(statistics=compute_statistics([store]), init_std=0.5)
        config = SLConfig(
            steps=150, batch_size=64, scope="all", random_shift=0, learning_rate=3e-3, encoder_learning_rate=3e-3
        )
        train_supervised(policy, BalancedSampler([store], batch_size=64, seed=0), config=config, seed=0)
    new = partial(Fixed, "reach-red", "new")
    with Evaluator({"new": new}, num_envs_per_task=30, num_workers=0) as evaluator:
        before = evaluator.run(policy, episodes_per_task=60, seed=10_000).mean
        env = WorkerVectorEnv([new] * 16, num_workers=0, autoreset_mode=AutoresetMode.NEXT_STEP)
        config = SACfDConfig(total_timesteps=2500, gamma=0.9, utd_ratio=0.5)
        result = run_sac(policy, env, task="new", config=config, seed=0)
        after = evaluator.run(policy, episodes_per_task=60, seed=10_000).mean
    assert before < 0.6
    assert after >= 0.9
    assert result.num_env_steps < 2600  # the same task with PPO has a budget of 40,000
