from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny import differing, parameters, tiny_policy, toy_env

from vla_rl.curriculum import StartCurriculum
from vla_rl.data import BalancedSampler, EpisodeStore
from vla_rl.encoders import LoRASettings
from vla_rl.rl import stage1
from vla_rl.rl.exploration import ExplorationConfig
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.stage1 import NoSuccessError, run_collect, run_ppo
from vla_rl.vector import WorkerVectorEnv

CONFIG = PPOConfig(
    total_timesteps=240, num_envs=4, rollout_steps=30, minibatch_size=40, update_epochs=1, critic_warmup_updates=1
)


def toys(*, num_envs=4, horizon=20, **kwargs):
    thunks = [partial(toy_env, horizon=horizon, **kwargs)] * num_envs
    return WorkerVectorEnv(thunks, num_workers=0, autoreset_mode=AutoresetMode.NEXT_STEP)


@pytest.fixture
def policy():
    """Noisy enough to stumble on the square now and then."""
    return tiny_policy(init_std=1.0)


@pytest.fixture
def expert(expert_path):
    with EpisodeStore(expert_path, mode="r") as store:
        yield BalancedSampler([store], batch_size=16, seed=0)


def test_the_budget_is_spent_and_the_successes_come_back(policy):
    torch.manual_seed(0)
    logged = []
    frames = policy.encoder.num_frames
    result = run_ppo(
        policy,
        toys(),
        task="reach-red",
        config=CONFIG,
        seed=3,
        iteration=5,
        log=lambda m, step: logged.append((m, step)),
    )
    assert [step for _, step in logged] == sorted(step for _, step in logged)
    assert result.num_env_steps == logged[-1][1] >= CONFIG.total_timesteps > logged[-2][1]
    assert result.num_vlm_frames == policy.encoder.num_frames - frames
    # Every row of the rollouts and the last observation: the resets of NEXT_STEP are the difference to the env steps.
    assert result.num_vlm_frames == len(logged) * 30 * 4 + 4
    assert 0 < len(result.successes) <= result.num_episodes
    for episode in result.successes:
        assert episode.success and episode.terminations[-1] and episode.rewards[-1] == 1.0
        assert (episode.task, episode.source, episode.iteration) == ("reach-red", "rl", 5)
        assert np.abs(episode.actions).max() <= 1.0
    assert not result.converged
    tags = {"charts/success_rate", "charts/episodic_length", "charts/learning_rate", "charts/SPS", "losses/value_loss"}
    assert all(tags <= m.keys() for m, _ in logged)
    assert "losses/approx_kl" not in logged[0][0] and "losses/approx_kl" in logged[1][0]  # the critic warms up first


def test_the_vlm_stays_frozen_and_the_head_learns(policy):
    fingerprint, head = policy.encoder.fingerprint, parameters(policy.head)
    run_ppo(policy, toys(), task="reach-red", config=CONFIG)
    assert policy.encoder.fingerprint == fingerprint
    assert {"log_std", "mean.weight"} <= differing(head, parameters(policy.head))


@pytest.mark.parametrize("scope", ["lora", "all"])
@pytest.mark.parametrize("bc_coef", [0.0, 1.0])
def test_ppo_on_the_whole_model(policy, expert, scope, bc_coef):
    if scope == "lora":
        policy.encoder.add_lora(LoRASettings(r=2, alpha=4))
    fingerprint, before = policy.encoder.fingerprint, parameters(policy.encoder)
    logged = []
    config = replace(CONFIG, total_timesteps=200, bc_coef=bc_coef)
    run_ppo(
        policy, toys(), task="reach-red", config=config, scope=scope, expert=expert, log=lambda m, s: logged.append(m)
    )
    assert policy.encoder.fingerprint != fingerprint
    changed = differing(before, parameters(policy.encoder))
    assert all("lora_" in name for name in changed) == (scope == "lora")
    assert not any(weight.requires_grad for weight in policy.encoder.parameters())
    assert ("losses/bc_loss" in logged[-1]) == (bc_coef > 0)


def test_behaviour_cloning_beside_ppo_lowers_the_loss_on_the_expert(policy, expert):
    """The same run without it does not."""

    def loss():
        batch = expert.rows(np.arange(expert.num_rows))
        with torch.no_grad():
            features = policy.encode({"image": batch.images}, batch.instructions)
            return policy.head.supervised_loss(
                features, policy.normalize_state(batch.state), policy.normalize_action(batch.actions)
            ).item()

    start = parameters(policy.head)
    after = {}
    for bc_coef in (0.0, 10.0):
        policy.head.load_state_dict(start)
        torch.manual_seed(0)
        config = replace(CONFIG, bc_coef=bc_coef, update_epochs=4, learning_rate=1e-3)
        run_ppo(policy, toys(), task="reach-red", config=config, expert=expert)
        after[bc_coef] = loss()
    assert after[10.0] < 0.8 * after[0.0]


def test_every_run_has_a_critic_of_its_own(policy, monkeypatch):
    critics = []

    class Recorded(stage1.ValueHead):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            critics.append((self, self.output.weight.abs().max().item()))

    monkeypatch.setattr(stage1, "ValueHead", Recorded)
    for _ in range(2):
        torch.manual_seed(0)
        assert run_ppo(policy, toys(), task="reach-red", config=CONFIG, seed=3).successes
    (first, start), (second, second_start) = critics
    assert first is not second and start == second_start == 0.0
    assert first.output.weight.abs().max() > 0
    shapes = {name: value.shape for name, value in policy.head.body.state_dict().items()}
    assert {name: value.shape for name, value in first.body.state_dict().items()} == shapes  # the paper's "same shape"


def test_a_solved_task_ends_stage_1_early(policy):
    config = replace(CONFIG, total_timesteps=10_000, converged_success=0.0)
    result = run_ppo(policy, toys(), task="reach-red", config=config)
    assert result.converged and result.num_env_steps <= 3 * 30 * 4


def test_the_noisy_success_rate_is_not_that_of_the_short_episodes(policy):
    """A rollout of 12 steps in episodes of 20: nobody fails in it, but those who go on for longer count."""
    logged = []
    config = replace(CONFIG, rollout_steps=12, num_envs=64, total_timesteps=700, minibatch_size=256)
    torch.manual_seed(0)
    result = run_ppo(
        policy, toys(num_envs=64), task="reach-red", config=config, seed=1, log=lambda m, step: logged.append(m)
    )
    assert result.num_episodes == len(result.successes) > 0  # within 12 steps, only successes end
    assert 0 < logged[0]["charts/success_rate"] < 0.5


def test_a_reward_that_is_never_seen_stops_the_run(policy):
    policy.head.init_std = 1e-3
    env = toys(horizon=1)
    with pytest.raises(
        NoSuccessError, match=r"none of the first \d+ noisy episodes on 'reach-red'.*stop_at_zero=False"
    ):
        run_ppo(policy, env, task="reach-red", config=CONFIG, stop_at_zero=True)
    result = run_ppo(policy, env, task="reach-red", config=CONFIG, stop_at_zero=False)
    assert result.successes == [] and result.last_success_rate == 0.0


def test_only_the_latest_successes_are_kept(policy):
    torch.manual_seed(0)
    everything = run_collect(policy, toys(), task="reach-red", num_episodes=40, seed=1)
    torch.manual_seed(0)
    latest = run_collect(policy, toys(), task="reach-red", num_episodes=40, seed=1, max_successes=2)
    assert len(everything.successes) > 2 == len(latest.successes)
    for kept, episode in zip(latest.successes, everything.successes[-2:], strict=True):
        np.testing.assert_array_equal(kept.actions, episode.actions)


def test_collection_learns_nothing(policy):
    fingerprint, head = policy.encoder.fingerprint, parameters(policy.head)
    logged = []
    result = run_collect(policy, toys(), task="reach-red", num_episodes=12, log=lambda m, s: logged.append((m, s)))
    assert differing(head, parameters(policy.head)) <= {"log_std"}  # the size of the exploration is set
    assert policy.encoder.fingerprint == fingerprint
    assert result.num_episodes == 12
    rate = len(result.successes) / 12
    assert result.first_success_rate == result.last_success_rate == pytest.approx(rate)
    assert logged == [({"charts/success_rate": rate}, result.num_env_steps)]


def test_the_same_seed_repeats_a_run(policy):
    start = parameters(policy.head)
    weights = []
    for seed in (0, 0, 1):
        policy.head.load_state_dict(start)
        torch.manual_seed(7)
        run_ppo(policy, toys(), task="reach-red", config=CONFIG, seed=seed)
        weights.append(parameters(policy.head))
    assert not differing(weights[0], weights[1])
    assert differing(weights[0], weights[2])


CURRICULUM = ExplorationConfig(start_curriculum=True)


def near(**kwargs):
    return StartCurriculum(toy_env(horizon=5), **kwargs)


class Restarting(SyncVectorEnv):
    """Its first env forgets its curriculum at the 60th step, as one whose worker was started again."""

    num_restarts = count = 0

    def step(self, actions):
        self.count += 1
        if self.count == 30:
            self.set_attr("progress", {"frontier": 0.2, "outcomes": []})
        if self.count == 60:
            self.num_restarts = 1
            self.envs[0].progress = {"frontier": 1.0, "outcomes": []}
        return super().step(actions)


@pytest.mark.parametrize("mode", ["ppo", "collect"])
def test_a_curriculum_outlives_its_worker_also_without_snapshots(policy, mode):
    env = Restarting([partial(near, window=50)] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
    if mode == "ppo":
        config = replace(CONFIG, total_timesteps=200, num_envs=2, rollout_steps=10, minibatch_size=20)
        run_ppo(policy, env, task="reach-red", config=config, exploration=CURRICULUM)
    else:
        run_collect(policy, env, task="reach-red", num_episodes=40, exploration=CURRICULUM)
    assert env.count > 70
    assert env.get_attr("frontier") == (0.2, 0.2)


@pytest.mark.parametrize("exploration", ["gsde", "gaussian"])
def test_looking_at_curricula_changes_no_episode(exploration):
    """Those of a collector that never pauses."""

    def curricula():
        return WorkerVectorEnv([near] * 4, num_workers=0, autoreset_mode=AutoresetMode.NEXT_STEP)

    policy = tiny_policy(init_std=1.0, exploration=exploration)
    torch.manual_seed(0)
    found = run_collect(policy, curricula(), task="reach-red", num_episodes=40, exploration=CURRICULUM, seed=3)
    episodes = []
    torch.manual_seed(0)
    collector = RolloutCollector(policy, curricula(), task="reach-red", seed=3, on_episode=episodes.append)
    collector.start_exploration()
    collector.collect_episodes(40)
    successes = [episode for episode in episodes if episode.success]
    assert found.num_episodes == len(episodes) and len(found.successes) == len(successes) > 2
    for one, other in zip(found.successes, successes, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.observations["image"], other.observations["image"])


def test_a_curriculum_that_is_not_there_is_named(policy):
    with pytest.raises(ValueError, match=r"no `progress`; wrap each in vla_rl\.curriculum\.StartCurriculum"):
        run_collect(policy, toys(), task="reach-red", num_episodes=4, exploration=CURRICULUM)


@pytest.mark.parametrize("config", [PPOConfig, SACfDConfig])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", -0.001, "at least 0"),
        ("critic_learning_rate", float("nan"), "at least 0"),
        ("max_grad_norm", 0, "a number above 0"),
        ("gamma", 1.5, "a number from 0 to 1"),
    ],
)
def test_settings_outside_their_range_are_refused(config, name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}={value!r}; expected {expected}$"):
        config(**{name: value})
