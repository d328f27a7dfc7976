import threading
from queue import Queue

import numpy as np
import pytest
from steps import FakeClock, Steps

from vla_rl.data import EpisodeStore
from vla_rl.robot import (
    ControlRate,
    EarlyStop,
    ManualReset,
    Operator,
    OperatorQuit,
    Pause,
    RecordEpisodes,
    SafetyLimits,
    SuccessSignal,
)

STILL = np.zeros(2, np.float32)


def test_the_judge_decides_and_is_told_when_the_episode_ends_anyway():
    asked = []

    def judge(observation, ended):
        asked.append((int(observation["state"][0]), ended))
        return observation["state"][0] == 3 and observation["state"][1] == 2

    env = SuccessSignal(Steps(horizon=4), judge)
    env.reset()
    ends = [env.step(STILL)[1:4] for _ in range(4)]
    assert ends == [(0.0, False, False)] * 3 + [(0.0, False, True)]  # not the 0.25 of the environment
    assert asked == [(1, False), (2, False), (3, False), (4, True)]
    _, info = env.reset()
    assert info["success"] is False
    told = [env.step(STILL) for _ in range(3)]
    assert [step[4]["success"] for step in told] == [False, False, True]
    assert told[-1][1:4] == (1.0, True, False)


def test_an_early_stop_ends_the_episode_after_one_more_step():
    answers = iter([False, True, False])
    robot = Steps()
    env = EarlyStop(robot, lambda: next(answers))
    env.reset()
    assert env.step(STILL)[3] is False
    *_, truncated, info = env.step(STILL)
    assert truncated and info["aborted"] and robot.count == 2
    env.reset()
    assert not env.step(STILL)[4]["aborted"] and env.num_aborted == 1


def test_the_scene_is_put_back_before_the_robot_looks():
    robot, told = Steps(), []
    env = ManualReset(
        robot,
        lambda question: told.append((question, robot.resets)),
        home=lambda: told.append("home"),
        question="ready?",
    )
    observation, _ = env.reset(seed=3)
    assert told == ["home", ("ready?", 0)] and observation["state"][1] == 1 and env.num_resets == 1


def test_what_is_typed_counts_for_the_episode_that_runs():
    said = []
    operator = Operator(iter(Queue().get, None), say=said.append)
    operator.tell("s")
    operator.tell("f\n")
    assert operator.success() and operator.stop()
    ready = threading.Thread(target=operator.ready, args=("again?",))
    ready.start()
    while not said:
        pass
    operator.tell("")
    ready.join(20)
    assert not ready.is_alive() and not operator.success() and not operator.stop()
    assert said[0].startswith("again? [")
    operator.tell("hm")
    assert "'hm' is no command" in said[-1]


def test_what_was_typed_is_forgotten_with_the_episode_whoever_resets_the_scene():
    operator = Operator(iter(Queue().get, None), say=lambda text: None)
    env = EarlyStop(SuccessSignal(Steps(horizon=9), operator.success), operator.stop)
    ends = []
    for said in ("s", "", "f", ""):
        env.reset()
        operator.tell(said)
        *_, terminated, truncated, info = env.step(STILL)
        ends.append((terminated, truncated, info["success"]))
    assert ends == [(True, False, True), (False, False, False), (False, True, False), (False, False, False)]


def test_a_pause_lasts_until_enter_and_quitting_ends_it_too():
    said = []
    operator = Operator(iter(Queue().get, None), say=said.append)
    robot = Steps()
    env = Pause(robot, operator.wait_if_paused)
    env.reset()
    env.step(STILL)
    operator.tell("p")
    stepping = threading.Thread(target=env.step, args=(STILL,))
    stepping.start()
    while not said:
        pass
    assert robot.count == 1
    operator.tell("")
    stepping.join(20)
    assert robot.count == 2 and env.num_pauses == 1
    operator.tell("p")
    operator.tell("q")
    with pytest.raises(OperatorQuit, match="ended the run"):
        env.step(STILL)
    assert robot.count == 2
    with pytest.raises(OperatorQuit):
        operator.stop()


def test_the_end_of_the_lines_is_the_end_of_the_run():
    operator = Operator(["p"], say=lambda text: None)
    with pytest.raises(OperatorQuit):
        operator.ready("?")
    with pytest.raises(OperatorQuit):
        operator.stop()


@pytest.fixture
def store(tmp_path):
    with EpisodeStore(tmp_path / "episodes") as opened:
        yield opened


def test_every_kind_of_end_is_on_disk_at_once(store):
    """Success, failure, early stop, a reset in the middle, a robot that goes away, and closing."""
    robot = Steps(horizon=3)
    stops = {5: True}
    steps = []
    env = EarlyStop(robot, lambda: stops.get(len(steps), False))
    env = SuccessSignal(env, lambda observation, ended: robot.resets == 1 and observation["state"][0] == 2)
    env = RecordEpisodes(env, store, task="count", iteration=4, policy_version="v1")

    def run(count):
        env.reset()
        for number in range(count):
            env.step(np.array([0.1 * number, -0.5], np.float32))
            steps.append(number)

    def recorded():
        with EpisodeStore(store.path, mode="r") as other:
            return [(e.total_steps, e.success, bool(e.infos["aborted"][-1])) for e in other]

    run(2)
    assert recorded() == [(2, True, False)]
    run(3)
    assert recorded()[1:] == [(3, False, False)]
    run(1)  # stopped
    assert recorded()[2:] == [(1, False, True)]
    run(2)
    env.reset()
    assert recorded()[3:] == [(2, False, True)]
    robot.fails_at = 2
    with pytest.raises(ConnectionError):
        run(3)
    assert recorded()[4:] == [(1, False, True)]
    robot.fails_at = -1
    run(1)
    env.close()
    assert recorded()[5:] == [(1, False, True)]
    assert (env.num_episodes, env.num_successes, env.num_steps) == (6, 1, 10)

    episode = store[0]
    np.testing.assert_array_equal(episode.observations["state"], [[0, 1], [1, 1], [2, 1]])
    np.testing.assert_array_equal(episode.observations["image"][:, 0, 0, 0], [0, 1, 2])
    np.testing.assert_allclose(episode.actions, [[0, -0.5], [0.1, -0.5]], atol=1e-7)
    np.testing.assert_array_equal(episode.rewards, [0, 1])
    assert (episode.instruction, episode.source, episode.iteration, episode.policy_version) == ("count", "rl", 4, "v1")
    assert [bool(e.terminations[-1]) for e in store] == [True] + [False] * 5
    assert [bool(e.truncations[-1]) for e in store] == [False] + [True] * 5


def test_observations_beside_pictures_and_state_are_kept_as_they_are(store):
    force, bump = np.array([-1.5, 0.25, 300.7]), np.array([-3, 70_000], np.int32)

    class Feels(Steps):
        def _look(self):
            return super()._look() | {"force": force, "bump": bump, "touch": True, "task_id": 0}

    env = RecordEpisodes(Feels(horizon=2), store, task="count")
    env.reset()
    force_before, _ = force.copy(), env.step(STILL)
    force[:] = 7.0  # an env may write into the array that it gave
    env.step(STILL)
    kept = store[0].observations
    np.testing.assert_array_equal(kept["force"], [force_before, force_before, force])
    np.testing.assert_array_equal(kept["bump"], [bump] * 3)
    kinds = {key: array.dtype.name for key, array in kept.items()}
    assert kinds == {
        "image": "uint8", "state": "float32", "task_id": "int64", "force": "float64", "bump": "int32", "touch": "bool"
    }  # fmt: skip


def test_pictures_of_another_type_are_bytes_and_an_episode_that_cannot_be_stored_leaves_the_robot_closed(store):
    closed = []

    class Wide(Steps):
        def _look(self):
            seen = super()._look()
            return seen | {"image": seen["image"].astype(np.int64)}

        def close(self):
            closed.append(True)

    env = RecordEpisodes(Wide(horizon=2), store, task="count")
    env.reset()
    env.step(STILL)
    env.step(STILL)
    assert store[0].observations["image"].dtype == np.uint8
    env.reset()
    env._observations[0]["image"] = np.zeros((2, 2), np.uint8)  # no picture: the store refuses it
    env.step(STILL)
    with pytest.raises(ValueError):
        env.close()
    assert closed and len(store) == 1
    env.reset()
    env.step(STILL)
    env.close()
    assert len(store) == 2


def test_what_the_wrappers_tell_is_kept_beside_the_steps(store):
    clock = FakeClock()
    robot = Steps(clock, horizon=3, takes=0.125)
    env = ControlRate(SafetyLimits(robot, max_delta=0.25), 10, clock=clock, sleep=clock.sleep)
    env = RecordEpisodes(env, store, task="count", clock=clock)
    env.reset()
    for _ in range(3):
        env.step(np.array([1.0, 0.0], np.float32))
    infos = store[0].infos
    np.testing.assert_allclose(store[0].actions[:, 0], 1.0)  # what the policy meant
    np.testing.assert_allclose(infos["executed_action"][:, 0], [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(infos["lateness"], [0, 0, 0.025, 0.025], atol=1e-9)
    np.testing.assert_array_equal(infos["overrun"], [False, False, True, True])
    np.testing.assert_array_equal(infos["limited"], [False, True, True, True])
    np.testing.assert_allclose(infos["time"], [0, 0.125, 0.25, 0.375])
