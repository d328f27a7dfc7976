import gymnasium as gym
import numpy as np
import pytest
from steps import FakeClock, Steps

from vla_rl.robot import ControlRate, Pause, SafetyLimits, UnsafeActionError

STILL = np.zeros(2, np.float32)


def at_ten_hertz(clock, **kwargs):
    robot = Steps(clock, horizon=100)
    return robot, ControlRate(robot, 10, clock=clock, sleep=clock.sleep, **kwargs)


def test_steps_start_on_the_ticks_whatever_the_thinking_takes():
    clock = FakeClock()
    robot, env = at_ten_hertz(clock)
    env.reset()
    for thinking in (0.5, 0.02, 0.09, 0.0, 0.05):
        clock.spend(thinking)
        *_, info = env.step(STILL)
        assert (info["lateness"], info["overrun"]) == (0.0, False)
    np.testing.assert_allclose(np.diff(robot.started), 0.1)
    assert (env.num_steps, env.num_overruns) == (5, 0)


def test_the_grid_does_not_drift():
    """A thousand steps take a thousand periods, though every one has a rest to wait for that is no round number."""
    clock = FakeClock()
    robot, env = at_ten_hertz(clock)
    env.reset()
    for number in range(1000):
        clock.spend(0.013 + 0.0001 * (number % 7))
        env.step(STILL)
    assert robot.started[-1] - robot.started[0] == pytest.approx(99.9, abs=1e-6)


def test_late_steps_are_counted_and_not_made_up_for():
    clock = FakeClock()
    robot, env = at_ten_hertz(clock)
    env.reset()
    lateness = []
    for thinking in (0.0, 0.13, 0.0, 0.35, 0.01):
        clock.spend(thinking)
        *_, info = env.step(STILL)
        lateness.append(info["lateness"])
    np.testing.assert_allclose(lateness, [0, 0.03, 0, 0.25, 0], atol=1e-9)
    np.testing.assert_allclose(np.diff(robot.started), [0.13, 0.1, 0.35, 0.1])
    assert env.num_overruns == 2
    assert env.total_lateness == pytest.approx(0.28) and env.worst_lateness == pytest.approx(0.25)


def test_a_clock_that_wakes_late_is_late_and_the_next_command_keeps_its_distance():
    clock = FakeClock()
    late = iter([0.0005, 0.08, 0.0, 0.0])
    robot = Steps(clock, horizon=100)
    env = ControlRate(robot, 10, clock=clock, sleep=lambda seconds: clock.sleep(seconds + next(late)))
    env.reset()
    infos = [env.step(STILL)[-1] for _ in range(5)]
    np.testing.assert_allclose([info["lateness"] for info in infos], [0, 0, 0.08, 0, 0], atol=1e-9)
    assert [info["overrun"] for info in infos] == [False, False, True, False, False]
    np.testing.assert_allclose(np.diff(robot.started), [0.1005, 0.1795, 0.1, 0.1])


def test_a_slow_env_is_an_overrun_and_a_little_lateness_is_none():
    clock = FakeClock()
    robot, env = at_ten_hertz(clock, tolerance=0.01)
    robot.takes = 0.105
    env.reset()
    for _ in range(3):
        *_, info = env.step(STILL)
    assert info["lateness"] == pytest.approx(0.005) and env.num_overruns == 0
    robot.takes = 0.2
    for _ in range(3):
        env.step(STILL)
    assert env.num_overruns == 2


def test_neither_a_reset_nor_a_pause_is_a_delay():
    clock = FakeClock()
    _, rate = at_ten_hertz(clock)
    pauses = iter([False, False, True, False])
    env = Pause(rate, lambda: next(pauses) and not clock.spend(60.0))
    env.reset()
    env.step(STILL)
    clock.spend(30.0)
    env.reset()
    told = [env.step(STILL)[4] for _ in range(3)]
    assert [info["paused"] for info in told] == [False, True, False]
    assert [info["overrun"] for info in told] == [False] * 3
    assert (env.num_pauses, rate.num_overruns) == (1, 0)


@pytest.mark.parametrize("kwargs", [{"hz": 0}, {"hz": float("nan")}, {"hz": float("inf")}, {"hz": 1, "tolerance": -1}])
def test_rates_that_are_none(kwargs):
    with pytest.raises(ValueError, match="steps per second above 0"):
        ControlRate(Steps(), **kwargs)


def test_limits_by_hand():
    """Box [-.5, .5] x [-1, .2], steps of .3 and .4; what was executed counts, not what was asked."""
    robot = Steps()
    env = SafetyLimits(robot, low=[-0.5, -1.0], high=[0.5, 0.2], max_delta=[0.3, 0.4])
    env.reset()
    asked = [(0.2, 0.1), (1.0, 1.0), (1.0, -1.0), (-1.0, -0.5)]
    told = [env.step(np.array(action, np.float32))[4] for action in asked]
    executed = [(0.2, 0.1), (0.5, 0.2), (0.5, -0.2), (0.2, -0.5)]
    np.testing.assert_allclose(robot.received, executed, atol=1e-6)
    np.testing.assert_allclose([info["executed_action"] for info in told], executed, atol=1e-6)
    assert [info["limited"] for info in told] == [False, True, True, True]
    assert (env.num_clipped, env.num_slowed) == (3, 2)
    env.reset()
    env.step(np.array([0.5, 0.2], np.float32))  # from rest again, not from (.2, -.5)
    np.testing.assert_allclose(robot.received[-1], [0.3, 0.2], atol=1e-6)


def test_no_action_leaves_the_limits_whatever_is_asked():
    robot = Steps(horizon=10_000)
    env = SafetyLimits(robot, low=-0.7, high=0.4, max_delta=0.25, rest=0.1)
    env.reset()
    rng = np.random.default_rng(0)
    for action in rng.normal(scale=3, size=(500, 2)).astype(np.float32) * rng.choice([1, 1e-3, 1e30], size=(500, 1)):
        env.step(action)
    received = np.array([(0.1, 0.1), *robot.received])
    assert received.min() >= -0.7 - 1e-6 and received.max() <= 0.4 + 1e-6
    assert np.abs(np.diff(received, axis=0)).max() <= 0.25 + 1e-6


@pytest.mark.parametrize("action", [[np.nan, 0], [0, np.inf], [0], [0, 0, 0], 1.0])
def test_nothing_is_sent_where_no_limit_helps(action):
    robot = Steps()
    env = SafetyLimits(robot)
    env.reset()
    with pytest.raises(UnsafeActionError, match="expected 2 finite numbers; nothing was sent"):
        env.step(np.array(action))
    assert robot.received == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"low": 0.5, "high": -0.5}, "give low <= high"),
        ({"max_delta": 0.0}, "delta > 0"),
        ({"low": 0.2}, "rest=0.0 lies outside"),
        ({"high": [1, 2, 3]}, "give a number, or 2 of them"),
        ({"max_delta": np.nan}, "none NaN"),
    ],
)
def test_limits_that_are_none(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SafetyLimits(Steps(), **kwargs)


def test_limits_in_the_robots_own_units():
    robot = Steps()
    robot.action_space = gym.spaces.Box(-50.0, 50.0, (2,), np.float32)
    env = gym.wrappers.RescaleAction(SafetyLimits(robot, max_delta=10.0), np.float32(-1), np.float32(1))
    env.reset()
    for _ in range(3):
        env.step(np.array([1.0, -0.1], np.float32))
    np.testing.assert_allclose(robot.received, [(10, -5), (20, -5), (30, -5)], atol=1e-4)
