from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from scripted import observation
from test_rollout import GAMMA, LAMBDA, NUM_ENVS, Critic, collector, every_env, truths
from tiny import differing, parameters, random_features, tiny_policy, toy_env

from vla_rl.config import IterativeConfig, check
from vla_rl.rl.exploration import ExplorationConfig, ExtraReward, Novelty, potential_shaping
from vla_rl.rl.latent_buffer import LatentBuffer
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.stage1 import run_ppo
from vla_rl.rl.stage1_sac import run_sac, with_extra_reward
from vla_rl.vector import WorkerVectorEnv

BOTH = ExplorationConfig(rnd_coef=0.5, shaping_coef=2.0, success_window=2)


class Known(ExtraReward):
    """A potential and a bonus that a hand can work out; what it is shown is kept."""

    def __init__(self):
        super().__init__(32, state_dim=2, config=BOTH)
        self.rows = []

    def add_row(self, row):
        self.rows.append(row)

    def potential(self, features, state):
        return state[:, 0]

    def bonus(self, features, state):
        return 10 * state[:, 1]


def state_of(number, episode, t):
    return observation(number, episode, t)["state"]


@pytest.fixture
def policy():
    return tiny_policy()


def test_shaping_telescopes_over_an_episode():
    """The discounted sum is gamma^T phi(end) - phi(start), and -phi(start) where the end is terminal."""
    phi = torch.tensor([0.3, 1.0, -2.0, 0.5])
    for terminated in (False, True):
        discounts = torch.full((3,), GAMMA)
        discounts[-1] *= not terminated
        total = sum(GAMMA**t * float(f) for t, f in enumerate(potential_shaping(phi[:-1], phi[1:], discounts)))
        assert total == pytest.approx((0 if terminated else GAMMA**3 * 0.5) - 0.3)


@every_env
def test_rewards_of_a_rollout_get_the_bonus_of_the_frame_reached_and_the_shaping(policy, mode):
    collected, _ = collector(policy, "worker", mode)
    extra = Known()
    rollout = collected.collect(13, Critic(), gamma=GAMMA, gae_lambda=LAMBDA, extra=extra)
    assert sum(len(row["rewards"]) for row in extra.rows) == 13 * NUM_ENVS
    for truth in truths(mode, 13):
        for step in truth.steps:
            now = state_of(truth.number, step.episode, step.t)
            reached = state_of(truth.number, step.episode, step.t + 1)
            expected = step.reward - now[0] + (0 if step.terminated else GAMMA * reached[0]) + 10 * reached[1]
            assert rollout.rewards[step.row, truth.number].item() == pytest.approx(expected, abs=1e-4)


def test_shaping_of_n_steps_is_the_discounted_sum_of_that_of_each():
    generator = torch.Generator().manual_seed(0)
    features, rewards = random_features(9, seed=1), torch.randn(8, generator=generator)
    state = torch.randn(9, 2, generator=generator)
    extra = Known()
    extra.bonus = lambda features, state: torch.zeros(len(state))

    def buffer(rewards, terminated):
        ring = LatentBuffer(9, action_dim=1, fingerprint="random")
        ring.add_episode(features, state, actions=torch.zeros(8, 1), rewards=rewards, terminated=terminated)
        return ring

    for terminated in (False, True):
        discounts = torch.full((8,), GAMMA)
        discounts[-1] *= not terminated
        phi = state[:, 0]
        each = rewards + potential_shaping(phi[:-1], phi[1:], discounts)
        drawn = {"gamma": GAMMA, "n_step": 3}
        batch = buffer(rewards, terminated).sample(64, **drawn, generator=torch.Generator().manual_seed(3))
        expected = buffer(each, terminated).sample(64, **drawn, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(with_extra_reward(batch, extra).rewards, expected.rewards)


def test_novelty_fades_where_it_has_looked_and_nowhere_else():
    torch.manual_seed(0)
    novelty = Novelty(32)
    seen, unseen = random_features(64, seed=0), random_features(64, seed=1)
    assert novelty.bonus(seen, None).eq(0).all()
    novelty.observe(seen, None)
    novelty.observe(unseen, None)
    errors = torch.cat([novelty.error(seen, None), novelty.error(unseen, None)])
    torch.testing.assert_close(novelty.bonus(seen, None), errors[:64] / errors.std(correction=0), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.Adam(novelty.predictor.parameters(), lr=1e-3)
    target = {name: value.clone() for name, value in novelty.target.state_dict().items()}
    for _ in range(150):
        loss = novelty.error(seen, None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert novelty.bonus(seen, None).mean() < 0.5 * novelty.bonus(unseen, None).mean()
    assert all(torch.equal(value, target[name]) for name, value in novelty.target.state_dict().items())


def near_success(features):
    """Frames of another kind: another direction, since the size of a token is normalised away."""
    return replace(features, tokens=features.tokens + 3.0 * (torch.arange(32) < 16))


def rows_of(episodes, *, horizon=6, seed=0):
    """Rows of one environment whose successful episodes end in frames of another kind than the rest."""
    rng = np.random.default_rng(seed)
    for success in episodes:
        for t in range(horizon):
            features = random_features(1, seed=int(rng.integers(1_000_000)))
            last = success and t >= horizon - 2
            features = near_success(features) if last else features
            end = np.array([t == horizon - 1])
            yield {
                "features": features,
                "state": None,
                "valid": np.array([True]),
                "success": end & success,
                "terminated": end & success,
                "truncated": end & (not success),
                "envs": slice(0, 1),
            }


def test_the_classifier_knows_the_frames_before_success():
    torch.manual_seed(0)
    extra = ExtraReward(32, state_dim=0, config=replace(BOTH, learning_rate=3e-3))
    assert extra.potential(random_features(4), None).eq(0).all()
    for i in range(30):
        for row in rows_of([True, False, False, False], seed=i):
            extra.add_row(row)
        losses = extra.learn()
    assert extra.num_positives == 30 * 2 and set(losses) == {"rnd_loss", "classifier_loss"}
    near, far = near_success(random_features(50, seed=7)), random_features(50, seed=8)
    assert extra.potential(near, None).min() > 2.0 * 0.7 and extra.potential(far, None).max() < 2.0 * 0.3
    assert extra.learn() == {}


def test_only_valid_rows_teach_and_an_episode_without_success_leaves_nothing():
    extra = ExtraReward(32, state_dim=0, config=replace(BOTH, rnd_coef=0.0))
    for row in rows_of([False, False]):
        extra.add_row(row)
    assert extra.num_positives == 0 and extra.learn() == {}
    for row in rows_of([True]):
        extra.add_row({**row, "valid": np.array([False])})
    assert extra.num_positives == 0


def test_an_update_of_autoresets_alone_teaches_nothing_and_spoils_nothing():
    extra = ExtraReward(32, state_dim=0, config=replace(BOTH, shaping_coef=0.0))
    rows = list(rows_of([True, False]))
    for row in rows:
        extra.add_row(row)
    extra.learn()
    frames = random_features(4, seed=1)
    before, weights = extra.bonus(frames, None), parameters(extra.novelty)
    extra.add_row({**rows[0], "valid": np.array([False])})
    assert extra.learn() == {} and not differing(weights, parameters(extra.novelty))
    assert before.gt(0).all() and torch.equal(extra.bonus(frames, None), before)


def test_frames_that_are_all_alike_are_not_infinitely_new():
    novelty = Novelty(32)
    novelty.observe(random_features(1), None)
    novelty.observe(random_features(1), None)
    assert novelty.bonus(random_features(1, seed=1), None).eq(0).all()


@pytest.mark.parametrize("run", [run_ppo, run_sac])
def test_stage_1_learns_with_both(run):
    torch.manual_seed(0)
    policy = tiny_policy(init_std=1.0)
    thunks = [partial(toy_env, horizon=20)] * 4
    env = WorkerVectorEnv(thunks, num_workers=0, autoreset_mode=AutoresetMode.NEXT_STEP)
    logged = []
    config = {
        run_ppo: PPOConfig(total_timesteps=480, num_envs=4, rollout_steps=30, minibatch_size=40, update_epochs=1),
        run_sac: SACfDConfig(total_timesteps=480, num_envs=4, num_demos=1, utd_ratio=0.1, batch_size=16),
    }[run]
    run(policy, env, task="t", config=config, exploration=BOTH, log=lambda metrics, step: logged.append(metrics))
    env.close()
    names = {name for metrics in logged for name in metrics}
    assert {"losses/rnd_loss", "losses/classifier_loss"} <= names


@pytest.mark.parametrize(
    ("name", "value", "least"), [("rnd_coef", -0.1, 0), ("shaping_coef", -0.1, 0), ("success_window", 0, 1)]
)
def test_weights_and_windows_out_of_range_are_refused(name, value, least):
    with pytest.raises(ValueError, match=f"{name}={value}; expected at least {least}"):
        ExplorationConfig(**{name: value})


def test_a_vlm_that_learns_has_no_features_to_explore():
    for changes in ({"stage1_scope": "lora"}, {"stage1_mode": "collect"}):
        with pytest.raises(ValueError, match=r"exploration\.rnd_coef=0\.5"):
            check(replace(IterativeConfig(), exploration=BOTH, **changes), ["task"])
    env = WorkerVectorEnv([toy_env], num_workers=0)
    with pytest.raises(ValueError, match='stage1_scope="lora"'):
        run_ppo(tiny_policy(), env, task="t", config=PPOConfig(num_envs=1), scope="lora", exploration=BOTH)
    env.close()
