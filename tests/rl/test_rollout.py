import gymnasium as gym
import numpy as np
import pytest
import scripted
import torch
from gymnasium.vector import AutoresetMode
from scripted import SCRIPT, Truth, observation, script, succeeds
from tiny import INSTRUCTIONS, tiny_policy

from vla_rl.rl.rollout import RolloutCollector

NUM_ENVS = len(SCRIPT)
GAMMA, LAMBDA = 0.9, 0.8
MODES = list(AutoresetMode)
KINDS = ("sync", "worker")

every_env = pytest.mark.parametrize("mode", MODES)
both_kinds = pytest.mark.parametrize("kind", KINDS)


class Critic(torch.nn.Module):
    """A value that depends on the picture, the sentence and the state."""

    def forward(self, features, state):
        tokens = features.tokens.float()
        return tokens[:, 0, 0] + 0.5 * tokens[:, -1, 1] + state @ torch.tensor([1.0, -2.0])


def true_value(policy, number, episode, t):
    obs = {key: np.asarray(value)[None] for key, value in observation(number, episode, t).items()}
    features = policy.encode(obs, [INSTRUCTIONS[number]])
    return Critic()(features, policy.normalize_state(obs["state"])).item()


def brute_force(policy, truth, rows):
    """Advantages by row: the discounted sum of TD errors until the episode or the rollout ends, term by term."""
    number = truth.number
    steps = [step for step in truth.steps if step.row in rows]
    deltas, advantages = [], {}
    for step in steps:
        following = 0.0 if step.terminated else GAMMA * true_value(policy, number, step.episode, step.t + 1)
        deltas.append(step.reward + following - true_value(policy, number, step.episode, step.t))
    for k, step in enumerate(steps):
        total = 0.0
        for j, later in enumerate(steps[k:]):
            if later.episode != step.episode:
                break
            total += (GAMMA * LAMBDA) ** j * deltas[k + j]
        advantages[step.row - rows.start] = total
    return advantages


def collector(policy, kind, mode, *, on_episode=None, **kwargs):
    env, envs = scripted.make(kind, mode, **kwargs)
    return RolloutCollector(policy, env, task="scripted", on_episode=on_episode, policy_version="v", iteration=3), envs


def truths(mode, rows):
    return [Truth(number, rows, mode is AutoresetMode.NEXT_STEP) for number in range(NUM_ENVS)]


@both_kinds
@every_env
def test_rewards_ends_and_advantages_are_those_of_a_brute_force_calculation(policy, kind, mode):
    torch.manual_seed(0)
    collected, _ = collector(policy, kind, mode)
    first, second = 8, 7  # an episode ends with the first rollout, others go on into the second
    for rows in (range(first), range(first, first + second)):
        rollout = collected.collect(len(rows), Critic(), gamma=GAMMA, gae_lambda=LAMBDA)
        assert rollout.rewards.shape == (len(rows), NUM_ENVS)
        for truth in truths(mode, first + second):
            n = truth.number
            steps = {step.row - rows.start: step for step in truth.steps if step.row in rows}
            assert rollout.valid[:, n].nonzero().flatten().tolist() == sorted(steps)
            expected = brute_force(policy, truth, rows)
            for row, step in steps.items():
                assert rollout.rewards[row, n].item() == pytest.approx(step.reward, rel=1e-6)
                assert bool(rollout.terminated[row, n]) == step.terminated and bool(rollout.done[row, n]) == step.done
                assert rollout.advantages[row, n].item() == pytest.approx(expected[row], abs=5e-3)
                value = true_value(policy, n, step.episode, step.t)
                assert rollout.values[row, n].item() == pytest.approx(value, abs=5e-3)
                assert rollout.returns[row, n].item() == pytest.approx(expected[row] + value, abs=5e-3)
                assert rollout.task_id[row * NUM_ENVS + n] == n


@both_kinds
@every_env
def test_rows_hold_what_the_action_was_chosen_from(policy, kind, mode):
    torch.manual_seed(0)
    collected, _ = collector(policy, kind, mode)
    rollout = collected.collect(9, Critic(), gamma=GAMMA, gae_lambda=LAMBDA, keep_images=True)
    for truth in truths(mode, 9):
        for step in truth.steps:
            row = step.row * NUM_ENVS + truth.number
            expected = observation(truth.number, step.episode, step.t)
            np.testing.assert_array_equal(rollout.images[row], expected["image"])
            np.testing.assert_array_equal(rollout.state[row].numpy(), expected["state"])
    features = rollout.features(rollout.valid_rows)
    log_probs = policy.head.distribution(features, rollout.states(rollout.valid_rows)).log_prob(
        rollout.flat_actions[rollout.valid_rows]
    )
    torch.testing.assert_close(rollout.log_probs.flatten()[rollout.valid_rows], log_probs, rtol=1e-4, atol=1e-4)


@both_kinds
@every_env
def test_one_frame_per_env_step(policy, kind, mode):
    """Beyond it: the observation after the rollout's last step, and one per truncation where the env resets at once."""
    collected, _ = collector(policy, kind, mode)
    before = policy.encoder.num_frames
    collected.collect(8, Critic(), gamma=GAMMA, gae_lambda=LAMBDA)
    collected.collect(7, Critic(), gamma=GAMMA, gae_lambda=LAMBDA)
    steps = [step for truth in truths(mode, 15) for step in truth.steps]
    assert collected.num_env_steps == len(steps)
    cut = sum(step.done and not step.terminated for step in steps)
    assert cut > 3
    extra = cut if mode is not AutoresetMode.NEXT_STEP else 0
    assert policy.encoder.num_frames - before == 15 * NUM_ENVS + NUM_ENVS + extra
    resets = 15 * NUM_ENVS - len(steps)
    assert (resets > 0) == (mode is AutoresetMode.NEXT_STEP)


@both_kinds
@every_env
def test_episodes_are_the_true_trajectories(policy, kind, mode):
    torch.manual_seed(0)
    episodes = []
    collected, envs = collector(policy, kind, mode, on_episode=episodes.append)
    for rows in (4, 4, 12):
        collected.collect(rows, Critic(), gamma=GAMMA, gae_lambda=LAMBDA)
    found = {number: [] for number in range(NUM_ENVS)}
    for episode in episodes:
        found[int(episode.observations["task_id"][0])].append(episode)
    for truth in truths(mode, 20):
        number = truth.number
        assert len(found[number]) == len(truth.finished) > 2
        for k, episode in zip(truth.finished, found[number], strict=True):
            length, end = script(number, k)
            expected = [observation(number, k, t) for t in range(length + 1)]
            for key in ("image", "state", "task_id"):
                np.testing.assert_array_equal(episode.observations[key], [obs[key] for obs in expected])
            np.testing.assert_array_equal(episode.actions, envs[number].received[k])
            np.testing.assert_allclose(episode.rewards, [scripted.reward(number, k, t) for t in range(length)])
            last = np.arange(length) == length - 1
            np.testing.assert_array_equal(episode.terminations, last & (end in "TB"))
            np.testing.assert_array_equal(episode.truncations, last & (end in "CB"))
            assert episode.success == succeeds(number, k)
            assert episode.instruction == INSTRUCTIONS[number]
            assert (episode.source, episode.task, episode.policy_version, episode.iteration) == (
                "rl",
                "scripted",
                "v",
                3,
            )


@both_kinds
@every_env
def test_every_env_gives_the_same_number_of_episodes(policy, kind, mode):
    torch.manual_seed(0)
    episodes = []
    collected, _ = collector(policy, kind, mode, on_episode=episodes.append)
    collected.collect_episodes(NUM_ENVS * 2 + 1)
    origins = [int(episode.observations["task_id"][0]) for episode in episodes]
    assert sorted(origins) == sorted(list(range(NUM_ENVS)) * 3)
    assert collected.num_env_steps == sum(len(episode.actions) for episode in episodes)


@every_env
def test_gsde_noise_is_held_in_an_episode_and_drawn_anew_for_the_next(mode):
    """Where every observation is the same, a held matrix means the same action."""
    torch.manual_seed(0)
    policy = tiny_policy(init_std=0.1)
    collected, envs = collector(policy, "worker", mode, constant=True)
    collected.start_exploration()
    collected.collect(20, Critic(), gamma=GAMMA, gae_lambda=LAMBDA)
    first_actions = []
    for env in envs:
        for actions in env.received:
            if actions:
                np.testing.assert_allclose(actions, np.broadcast_to(actions[0], (len(actions), 2)), atol=2e-3)
                first_actions.append(actions[0])
    gaps = [np.abs(a - b).max() for i, a in enumerate(first_actions) for b in first_actions[:i]]
    assert len(first_actions) > 12 and min(gaps) > 2e-3


def test_independent_noise_differs_from_step_to_step():
    torch.manual_seed(0)
    policy = tiny_policy(exploration="gaussian", init_std=0.1)
    collected, envs = collector(policy, "worker", AutoresetMode.SAME_STEP, constant=True)
    collected.collect(20, Critic(), gamma=GAMMA, gae_lambda=LAMBDA)
    actions = np.concatenate([np.array(episode) for env in envs for episode in env.received if episode])
    assert actions.std(0) == pytest.approx(0.1, rel=0.3)


def test_start_exploration_sets_the_noise_on_the_task_at_hand():
    torch.manual_seed(0)
    policy = tiny_policy(init_std=0.25)
    with torch.no_grad():
        policy.head.log_std.fill_(3.0)
    collected, _ = collector(policy, "worker", AutoresetMode.SAME_STEP)
    frames = policy.encoder.num_frames
    collected.start_exploration()
    assert policy.encoder.num_frames == frames + NUM_ENVS
    rollout = collected.collect(6, Critic(), gamma=GAMMA, gae_lambda=LAMBDA)
    rows = rollout.valid_rows
    std = policy.head.distribution(rollout.features(rows), rollout.states(rows)).std
    assert std.square().mean().sqrt().item() == pytest.approx(0.25, rel=0.1)


@both_kinds
@every_env
def test_an_env_without_success_is_named(policy, kind, mode):
    collected, _ = collector(policy, kind, mode, tell_success=False)
    with pytest.raises(KeyError, match=r"no 'success'.*VLAObservation\(env, success_key=\.\.\.\)"):
        collected.collect(2, Critic(), gamma=GAMMA, gae_lambda=LAMBDA)


def test_actions_in_other_units_are_refused(policy):
    env, _ = scripted.make("worker", AutoresetMode.SAME_STEP)
    env.single_action_space = gym.spaces.Box(-2, 2, (2,), np.float32)
    with pytest.raises(ValueError, match=r"policies act in \[-1, 1\]: use gymnasium.wrappers.RescaleAction"):
        RolloutCollector(policy, env, task="scripted")


def test_a_head_for_actions_of_another_size_is_refused(policy):
    env, _ = scripted.make("worker", AutoresetMode.SAME_STEP)
    env.single_action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    with pytest.raises(ValueError, match=r"Box.*\(1,\).*head was built for 2 entries"):
        RolloutCollector(policy, env, task="scripted")


def test_forgotten_features_are_encoded_again(policy):
    collected, _ = collector(policy, "worker", AutoresetMode.SAME_STEP)
    frames = []
    for forget in (False, False, True):
        if forget:
            collected.forget_features()
        before = policy.encoder.num_frames
        collected.collect(1, Critic(), gamma=GAMMA, gae_lambda=LAMBDA)
        frames.append(policy.encoder.num_frames - before)
    assert frames == [2 * NUM_ENVS, NUM_ENVS + 1, 2 * NUM_ENVS]
