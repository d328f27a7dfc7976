import json
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tiny import tiny_policy

from vla_rl.cli import main
from vla_rl.evaluation import (
    EpisodeOutcome,
    EvaluationResult,
    Evaluator,
    TaskResult,
    evaluate,
    paired_difference,
    wilson_interval,
)

TABLE = ("reach", "push", "never")
SLOW = 20  # steps of an episode that fails


class Coin(gym.Env):
    """Success at step 2 ends an episode early; whether it can succeed depends on task and seed."""

    observation_space = spaces.Dict(
        image=spaces.Box(0, 255, (2, 2, 3), np.uint8),
        state=spaces.Box(-np.inf, np.inf, (2,), np.float32),
        task_id=spaces.Discrete(3),
    )
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    instructions = TABLE

    def __init__(self, task_id):
        self.task_id = task_id

    def _observe(self):
        return {
            "image": np.full((2, 2, 3), self.t, np.uint8),
            "state": np.array([self.seed, self.t], np.float32),
            "task_id": self.task_id,
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.t = -1 if seed is None else seed, 0
        return self._observe(), {"success": False}

    def step(self, action):
        self.t += 1
        lucky = self.task_id == 0 or (self.task_id == 1 and self.seed % 3 == 0)
        success = self.t == 2 and lucky and action[0] > 0
        return self._observe(), float(success) - 0.1, bool(success), self.t >= SLOW, {"success": bool(success)}


class Silent(Coin):
    def step(self, action):
        return *super().step(action)[:4], {"is_success": True}


class Forward:
    """Pushes with a constant force; records what it was shown."""

    def __init__(self, force=1.0):
        self.force, self.rows, self.seen, self.deterministic = force, [], set(), set()

    def act(self, obs, instructions, *, deterministic):
        self.rows.append(len(instructions))
        self.deterministic.add(deterministic)
        for (seed, _), text, task_id in zip(obs["state"], instructions, obs["task_id"], strict=True):
            assert TABLE[task_id] == text
            self.seen.add((text, int(seed)))
        return np.full((len(instructions), 1), self.force, np.float32)


ENV_FNS = {"reach": lambda: Coin(0), "push": lambda: Coin(1), "never": lambda: Coin(2)}


@pytest.fixture(scope="module")
def evaluator():
    with Evaluator(ENV_FNS, num_envs_per_task=3, num_workers=2) as evaluator:
        yield evaluator


def test_exactly_n_whole_episodes_per_task_with_the_seeds_asked_for(evaluator):
    policy = Forward()
    result = evaluator.run(policy, episodes_per_task=10, seed=100)
    assert {name: task.n for name, task in result.tasks.items()} == {"reach": 10, "push": 10, "never": 10}
    # push succeeds for seeds divisible by 3: 102, 105, 108. Short successes must not crowd out long failures.
    assert {name: task.successes for name, task in result.tasks.items()} == {"reach": 10, "push": 3, "never": 0}
    assert [e.seed for e in result.tasks["push"].episodes if e.success] == [102, 105, 108]
    assert [e.seed for e in result.tasks["never"].episodes] == list(range(100, 110))
    assert policy.seen == {(name, seed) for name in TABLE for seed in range(100, 110)}
    assert result.tasks["reach"].mean_length == 2 and result.tasks["never"].mean_length == SLOW
    assert result.tasks["push"].mean_length == pytest.approx((3 * 2 + 7 * SLOW) / 10)
    assert result.tasks["reach"].mean_return == pytest.approx(0.8)
    assert result.tasks["never"].mean_return == pytest.approx(-0.1 * SLOW)
    assert result.mean == pytest.approx(13 / 30)
    assert result.interval == pytest.approx(wilson_interval(13, 30))


def test_the_policy_sees_only_environments_with_an_episode_to_play(evaluator):
    policy = Forward()
    result = evaluator.run(policy, episodes_per_task=4, seed=0)
    steps = sum(episode.length for task in result.tasks.values() for episode in task.episodes)
    assert sum(policy.rows) == steps
    assert policy.rows[:2] == [5, 4] and policy.rows[-1] < 4  # the halves of nine environments take turns


def test_the_policy_acts_on_one_half_while_the_other_is_stepping():
    calls = []

    class Noted(Forward):
        def act(self, obs, instructions, *, deterministic):
            calls.append("act")
            return super().act(obs, instructions, deterministic=deterministic)

    with Evaluator(ENV_FNS, num_envs_per_task=2, num_workers=0) as evaluator:
        for name, group in zip("ab", evaluator.envs.groups, strict=True):
            wait = group.step_wait
            group.step_wait = lambda name=name, wait=wait: (calls.append(f"{name} waits"), wait())[1]
        evaluator.run(Noted(), episodes_per_task=2, seed=0)
    assert calls[:6] == ["act", "act", "a waits", "act", "b waits", "act"]


def test_no_more_environments_are_built_than_a_task_has_episodes():
    built = []

    def make(name):
        built.append(name)
        return ENV_FNS[name]()

    evaluate(
        Forward(),
        {name: partial(make, name) for name in ENV_FNS},
        episodes_per_task=2,
        seed=0,
        num_envs_per_task=5,
        num_workers=0,
    )
    assert sorted(built) == sorted([*ENV_FNS, *ENV_FNS])


@pytest.mark.parametrize(("envs", "workers"), [(1, 0), (4, 0)])
def test_the_result_does_not_depend_on_how_it_was_run(evaluator, envs, workers):
    reference = evaluator.run(Forward(), episodes_per_task=5, seed=7)
    other = evaluate(Forward(), ENV_FNS, episodes_per_task=5, seed=7, num_envs_per_task=envs, num_workers=workers)
    assert other == reference


def test_fewer_episodes_than_environments(evaluator):
    result = evaluator.run(Forward(), episodes_per_task=1, seed=3)
    assert [e.seed for task in result.tasks.values() for e in task.episodes] == [3, 3, 3]


def test_a_run_that_was_broken_off_does_not_disturb_the_next(evaluator):
    class Fragile(Forward):
        def act(self, obs, instructions, *, deterministic):
            if len(self.rows) == 3:
                raise RuntimeError("out of memory")
            return super().act(obs, instructions, deterministic=deterministic)

    reference = evaluator.run(Forward(), episodes_per_task=3, seed=0)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluator.run(Fragile(), episodes_per_task=3, seed=0)
    assert evaluator.run(Forward(), episodes_per_task=3, seed=0) == reference


def test_action_noise_is_paired_and_reproducible(evaluator):
    def run(seed):
        return evaluator.run(Forward(0.0), episodes_per_task=12, seed=seed, action_noise=0.5, deterministic=False)

    result = run(0)
    assert 0 < result.tasks["reach"].rate < 1  # success asks for a positive action at step 2: half of the noise
    assert run(0) == result
    shifted = {e.seed: e for e in run(4).tasks["reach"].episodes}
    assert all(shifted[e.seed] == e for e in result.tasks["reach"].episodes if e.seed >= 4)


def test_deterministic_is_passed_on(evaluator):
    policy = Forward()
    evaluator.run(policy, episodes_per_task=1, seed=0, deterministic=False)
    assert policy.deterministic == {False}


def test_frames_of_the_first_episodes(evaluator):
    result = evaluator.run(Forward(), episodes_per_task=3, seed=0, frames_of=2)
    reach = result.tasks["reach"].episodes
    assert reach[2].frames is None
    assert [frame[0, 0, 0] for frame in reach[1].frames] == [0, 1, 2]
    assert result.tasks["never"].episodes[0].frames.shape == (SLOW + 1, 2, 2, 3)


def test_progress_ends_at_the_total(evaluator):
    calls = []
    evaluator.run(Forward(), episodes_per_task=2, seed=0, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (6, 6) and calls == sorted(calls)


def test_an_env_without_success_is_named():
    with pytest.raises(KeyError, match=r"no 'success', only \['is_success'\]"):
        evaluate(Forward(), {"silent": lambda: Silent(0)}, episodes_per_task=1, seed=0, num_workers=0)


def test_actions_of_another_size_are_not_spread_over_the_envs():
    class Wide(Coin):
        action_space = spaces.Box(-1, 1, (2,), np.float32)

    with pytest.raises(ValueError, match=r"gave actions \[1\], the environments take Box"):
        evaluate(Forward(), {"reach": lambda: Wide(0)}, episodes_per_task=1, seed=0, num_envs_per_task=1, num_workers=0)


@pytest.mark.parametrize(
    ("space", "advice"),
    [(spaces.Box(-2, 2, (1,), np.float32), "RescaleAction"), (spaces.MultiDiscrete([3]), "ActionWrapper")],
)
def test_an_env_whose_actions_are_not_a_policys_is_refused(space, advice):
    class Other(Coin):
        action_space = space

    with pytest.raises(ValueError, match=rf"action space is .*; policies act in .*\[-1, 1\]: .*{advice}"):
        evaluate(
            Forward(), {"reach": lambda: Other(0)}, episodes_per_task=1, seed=0, num_envs_per_task=1, num_workers=0
        )


def test_a_very_long_episode_is_told(monkeypatch):
    monkeypatch.setattr("vla_rl.evaluation.LONG", SLOW - 1)
    with pytest.warns(UserWarning, match=f"an episode of 'never' has run for {SLOW - 1} steps.*TimeLimit") as told:
        evaluate(Forward(), {"never": lambda: Coin(2)}, episodes_per_task=1, seed=0, num_envs_per_task=1, num_workers=0)
    assert len(told) == 1


def test_an_episode_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr("vla_rl.evaluation.LONG", 1)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"'never' has not ended in 10 steps.*TimeLimit"):
        evaluate(Forward(), {"never": lambda: Coin(2)}, episodes_per_task=1, seed=0, num_envs_per_task=1, num_workers=0)


def test_no_episodes_is_refused(evaluator):
    with pytest.raises(ValueError, match="at least 1"):
        evaluator.run(Forward(), episodes_per_task=0, seed=0)


def test_wilson_interval_by_known_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score, no continuity correction).
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_wilson_interval_is_where_the_score_test_is_critical():
    low, high = wilson_interval(8, 10, confidence=0.9)
    for p in (low, high):
        assert (0.8 - p) ** 2 / (p * (1 - p) / 10) == pytest.approx(1.6448536**2, rel=1e-6)


@pytest.mark.parametrize("arguments", [(1, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError, match="successes of"):
        wilson_interval(*arguments)


def outcome(seed, success):
    return EpisodeOutcome(seed=seed, success=bool(success), length=5, episode_return=float(success))


def result_of(**tasks):
    return EvaluationResult(
        {name: TaskResult(tuple(outcome(s, flag) for s, flag in enumerate(flags))) for name, flags in tasks.items()}
    )


def test_mean_weighs_tasks_and_the_interval_uses_the_effective_n():
    result = result_of(a=[1, 1], b=[0] * 6)
    assert result.mean == 0.5
    assert result.interval == pytest.approx(wilson_interval(3, 6))  # n = 2^2 / (1/2 + 1/6)


def test_group():
    result = result_of(a=[1, 1], b=[0, 0], c=[1, 0])
    assert result.group(["c", "a"]).mean == 0.75
    with pytest.raises(KeyError, match=r"\['d'\]"):
        result.group(["a", "d"])


def test_dict_round_trip_through_json():
    result = result_of(a=[1, 0, 1], b=[0, 0, 1])
    data = json.loads(json.dumps(result.to_dict()))
    assert EvaluationResult.from_dict(data) == result
    assert data["tasks"]["a"]["rate"] == pytest.approx(2 / 3)


def test_paired_difference_uses_the_pairs():
    rng = np.random.default_rng(1)
    hard = rng.random(200) < 0.5
    before = result_of(a=hard & False | ~hard, b=~hard)
    gained = ~hard | (rng.random(200) < 0.2)
    after = result_of(a=gained, b=gained)
    difference, low, high = paired_difference(before, after)
    d = gained.astype(float) - ~hard
    assert difference == pytest.approx(d.mean())
    half = 1.96 * d.std() / np.sqrt(400)  # two tasks of 200 independent resamplings each
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.006)
    assert paired_difference(before, before) == (0.0, 0.0, 0.0)
    assert paired_difference(after, before)[0] == -difference


def test_paired_difference_refuses_unpaired_results():
    with pytest.raises(ValueError, match="different seeds"):
        paired_difference(result_of(a=[1, 0]), result_of(a=[1, 0, 1]))
    with pytest.raises(ValueError, match="same tasks"):
        paired_difference(result_of(a=[1]), result_of(b=[1]))


def test_a_checkpoint_is_evaluated_in_the_precision_that_it_was_saved_with(tmp_path, monkeypatch):
    """As the run's own evaluations are."""
    tiny_policy().save_pretrained(tmp_path / "policy")
    acted = []
    original = Evaluator.run

    def noted(self, policy, **options):
        acted.append(policy.encoder.compute_dtype)
        return original(self, policy, **options)

    monkeypatch.setattr(Evaluator, "run", noted)
    toy = ["--env.env-id", "vla_rl_envs:VLA/Toy-v0", "--env.image-size", "32", "--env.horizon", "5"]
    args = ["eval", tmp_path / "policy", "--tasks", "reach-red", "--episodes", 1, "--num-workers", 0, *toy]
    assert main([str(arg) for arg in args]) == 0
    assert main([str(arg) for arg in [*args, "--dtype", "bfloat16"]]) == 0
    assert acted == [torch.float32, torch.bfloat16]
