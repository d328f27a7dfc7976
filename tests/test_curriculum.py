import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from tiny import tiny_policy, toy_env

from vla_rl.curriculum import StartCurriculum
from vla_rl.rl.practice import EpisodeRecord, Practice
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.vector import WorkerVectorEnv


class Walk(gym.Env):
    """One step; it succeeds if the episode began at least as close as `reach` says."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, reach):
        self.reach, self.seeds = reach, []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.closeness = options["closeness"]
        return np.zeros(1, np.float32), {"closeness": self.closeness}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, True, False, {"success": self.closeness >= self.reach - 1e-9}


def play(env, episodes, *, seed=0):
    starts = []
    for i in range(episodes):
        _, info = env.reset(seed=seed if i == 0 else None)
        starts.append(info["closeness"])
        env.step(np.zeros(1))
    return starts


def test_the_frontier_moves_to_where_the_policy_fails():
    env = StartCurriculum(Walk(reach=0.6))
    starts = play(env, 300)
    assert starts[0] == 1.0 or starts[0] < 1.0
    assert 0.5 - 1e-9 <= env.frontier <= 0.6 + 1e-9  # succeeds from .6, never from .5
    assert min(starts) < 0.1  # the task's own start is tried all along


def test_a_policy_that_always_succeeds_ends_at_the_tasks_own_start():
    env = StartCurriculum(Walk(reach=0.0))
    starts = play(env, 300)
    assert env.frontier == 0.0 and starts[-50:] == [0.0] * 50


@pytest.mark.parametrize("share", [0.75, 0.25])
def test_one_that_never_does_stays_close(share):
    env = StartCurriculum(Walk(reach=2.0), frontier_share=share)
    starts = np.array(play(env, 400))
    assert env.frontier == 1.0
    assert np.mean(starts == 1.0) == pytest.approx(share, abs=0.08)
    assert np.mean(starts[starts < 1.0]) == pytest.approx(0.5, abs=0.1)


def test_starts_follow_from_the_seed_and_reach_the_environment():
    first, second, other = (StartCurriculum(Walk(reach=0.5)) for _ in range(3))
    starts = play(first, 50, seed=3)
    assert play(second, 50, seed=3) == starts != play(other, 50, seed=4)
    assert first.unwrapped.seeds[0] == 3 and first.unwrapped.closeness == starts[-1]


def test_an_episode_that_was_cut_short_by_a_reset_is_not_judged():
    env = StartCurriculum(Walk(reach=2.0), window=1, retreat_at=0.0, advance_at=0.5)
    env.frontier = 0.5
    for _ in range(20):
        env.reset(seed=0)
    assert env.frontier == 0.5


def test_after_a_worker_was_started_again_the_curriculum_is_where_it_was():
    env = WorkerVectorEnv([lambda: StartCurriculum(toy_env())] * 2, num_workers=0)
    policy = tiny_policy()
    collector, record = RolloutCollector(policy, env, task="reach-red"), EpisodeRecord(1)
    practice = Practice(policy, env, collector=collector, record=record, frames=0, curriculum=True)
    far = {"frontier": 0.25, "outcomes": [True, False]}
    env.set_attr("progress", far)
    practice.look()
    env.set_attr("progress", [far, {"frontier": 1.0, "outcomes": []}])  # as a fresh one is
    practice.look()
    assert practice.state_dict()["curriculum"][1]["frontier"] == 1.0, "without a restart it is the environments' own"
    env.set_attr("progress", far)
    practice.look()
    env.set_attr("progress", [far, {"frontier": 1.0, "outcomes": []}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(env), "num_restarts", 1)
        practice.look()
        assert env.get_attr("progress") == (far, far) and practice.state_dict()["curriculum"] == [far, far]
    env.close()


def test_an_environment_that_begins_where_it_likes_is_refused():
    env = StartCurriculum(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match=r"CartPole.*reset info has no 'closeness'"):
        env.reset(seed=0)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="retreat_at < advance_at"):
        StartCurriculum(Walk(0), advance_at=0.2, retreat_at=0.4)


def test_the_toy_starts_as_close_as_it_is_told():
    env = toy_env().unwrapped
    distances = []
    for closeness in (0.0, 0.5, 1.0):
        env.reset(seed=0, options={"closeness": closeness})
        distances.append(np.linalg.norm(env.position - env.target))
    assert distances[2] == pytest.approx(1.5 * env.radius)
    assert distances[1] == pytest.approx((distances[0] + distances[2]) / 2)
