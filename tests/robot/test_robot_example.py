"""The example's robot is a process behind a real clock: everything but how fast things went is checked here."""

import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vla_rl.data import EpisodeStore

SCRIPT = Path(__file__).parents[2] / "examples" / "integrations" / "real_robot.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("real_robot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "real_robot", module)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # the robot's process imports it by name
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_loop_runs_against_a_robot_that_does_not_wait(example, tmp_path):
    args = example.Args(
        out=tmp_path, hz=25.0, horizon=10, total_timesteps=40, learning_starts=10, sft_steps=5, eval_episodes=2
    )
    figures = example.main(args)
    run = figures["learning"]
    with EpisodeStore(tmp_path / "episodes", mode="r") as store:
        episodes = list(store)
    assert run["finished"] and run["num_env_steps"] == sum(e.total_steps for e in episodes) >= 40
    assert run["num_overruns"] == sum(int(e.infos["overrun"].sum()) for e in episodes)
    assert run["num_successes"] == sum(e.success for e in episodes)
    for episode in episodes:
        executed, state = episode.infos["executed_action"], episode.observations["state"]
        assert np.abs(np.diff(executed, axis=0)).max() <= 1.0 + 1e-6  # max_delta, from rest
        assert np.abs(executed).max() <= 1.0
        assert (np.diff(episode.infos["time"]) > 0).all()
        assert np.abs(state).max() <= 1.0
    assert any(np.abs(np.diff(e.observations["state"], axis=0)).max() > 0 for e in episodes)  # it moves
    assert figures["before"]["n"] == figures["after"]["n"] == 2
    for name in ("evaluation-before", "evaluation-after"):
        with EpisodeStore(tmp_path / name, mode="r") as store:
            assert {episode.source for episode in store} == {"evaluation"} and len(store) == 2
    again = example.main(args)  # nothing is left to learn
    assert again["learning"]["finished"] and again["learning"]["num_episodes"] == 0


@pytest.mark.slow
def test_commands_come_late_and_pictures_are_old(example, tmp_path):
    """A command shows in a picture after two latencies at the earliest: its own, and the picture's."""
    robot = example.SimulatedRobot(example.Args(out=tmp_path, hz=50.0, latency=0.25, jitter=0.0))
    try:
        rest = robot.reset()[0]["state"]
        sent = time.perf_counter()
        while np.array_equal(robot.step(-np.sign(rest))[0]["state"], rest):
            assert time.perf_counter() - sent < 60
        assert time.perf_counter() - sent >= 2 * 0.25
    finally:
        robot.close()


@pytest.mark.slow
def test_a_classifier_can_be_the_judge(example, tmp_path):
    """It learns from what the person said of the first evaluation, and then ends the episodes of learning itself."""
    figures = None
    for seed in range(4):  # the first evaluation has to show a success
        args = example.Args(
            out=tmp_path / str(seed),
            hz=50.0,
            latency=0.0,
            jitter=0.0,
            horizon=20,
            total_timesteps=40,
            learning_starts=15,
            sft_steps=60,
            eval_episodes=5,
            judge="classifier",
            seed=seed,
        )
        try:
            figures = example.main(args)
        except ValueError as error:
            assert "0 frames of success" in str(error)
        else:
            break
    assert figures is not None and 0 < figures["before"]["successes"] <= 5
    run = figures["learning"]
    with EpisodeStore(args.out / "episodes", mode="r") as store:
        episodes = list(store)
    assert run["finished"] and run["num_env_steps"] == sum(e.total_steps for e in episodes) >= 40
    assert run["num_successes"] == sum(e.success for e in episodes)
    assert all(e.terminations[-1] == e.success for e in episodes if not e.truncations[-1])
    assert figures["args"]["judge"] == "classifier" and figures["after"]["n"] == 5
