"""Environments that break, hang and die, and the runs that survive them."""

import os
import signal
import time
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from faulty import Faulty
from gymnasium.vector import AutoresetMode
from tiny import toy_env
from trainers import SHORT as CONFIG
from trainers import guards_of

from vla_rl.guards import (
    GuardConfig,
)
from vla_rl.vector import EnvOutputError, LostWorkerError, WorkerVectorEnv


def test_a_faulty_env_is_named_with_its_number_also_from_a_worker():
    def nan_reward(returned):
        return (returned[0], float("nan"), *returned[2:])

    good, bad = partial(Faulty, tuple), partial(Faulty, nan_reward)
    with WorkerVectorEnvs([good, good, bad], num_workers=1) as envs:
        envs.reset(seed=0)
        actions = np.zeros((3, 2), np.float32)
        envs.step(actions)
        envs.step(actions)
        with pytest.raises(EnvOutputError, match=r"^step of sub-environment 2 returned the reward nan, expected a"):
            envs.step(actions)


class WorkerVectorEnvs(WorkerVectorEnv):
    """Closes at the end of a with block."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Fated(gym.Wrapper):
    """Once in all, as told by a file, its process meets its fate in the middle of an episode."""

    def __init__(self, env, flag, fate):
        super().__init__(env)
        self.flag, self.fate, self.steps = flag, fate, 0

    def step(self, action):
        self.steps += 1
        if self.steps == 4:
            try:
                os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                self.fate()
        return self.env.step(action)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(10_000)


def fated(label, *, flag, fate):
    return Fated(toy_env(label, horizon=9), f"{flag}-{label}", fate)


def step_until(envs, *, restarts):
    """Step until so many restarts; returns the observations before the last step and what it gave."""
    obs, _ = envs.reset(seed=3)
    for _ in range(20):
        before = obs
        obs, *rest = envs.step(np.full((envs.num_envs, 2), 0.5, np.float32))
        if envs.num_restarts == restarts:
            return before, (obs, *rest)
    raise AssertionError("nothing happened")


@pytest.mark.slow
@pytest.mark.parametrize(("fate", "timeout"), [(die, None), (hang, 6.0)])
def test_a_lost_worker_is_replaced_and_its_episodes_are_cut_off(tmp_path, fate, timeout):
    thunks = [partial(toy_env, "reach-red", horizon=9)] * 2
    thunks += [partial(fated, "reach-red", flag=tmp_path / "flag", fate=fate)] * 2
    with WorkerVectorEnvs(thunks, num_workers=2, timeout=timeout, max_restarts=1) as envs:
        before, (obs, rewards, terminated, truncated, infos) = step_until(envs, restarts=1)
        assert truncated.tolist() == [False, False, True, True] and not terminated.any()
        assert infos["worker_restarted"].tolist() == [False, False, True, True]
        assert not infos["success"][2:].any() and (rewards[2:] == 0).all()
        for key in before:
            np.testing.assert_array_equal(obs[key][2:], before[key][2:])
        obs, _, terminated, truncated, _ = envs.step(np.zeros((4, 2), np.float32))  # the reset of these two
        assert not truncated[2:].any()
        assert (obs["image"][2:] != before["image"][2:]).any()
        for _ in range(12):
            envs.step(np.zeros((4, 2), np.float32))
        assert envs.num_restarts == 1


@pytest.mark.slow
def test_without_restarts_a_hanging_worker_is_an_error(tmp_path):
    thunks = [partial(fated, "reach-red", flag=tmp_path / "flag", fate=hang)]
    with WorkerVectorEnvs(thunks, num_workers=1, timeout=4.0) as envs:
        told = r"0\.\.0 did not answer during step within 4 seconds and was ended"
        with pytest.raises(LostWorkerError, match=told):
            step_until(envs, restarts=1)


@pytest.mark.slow
@pytest.mark.parametrize(("fate", "timeout"), [(die, 600.0), (hang, 6.0)])
def test_a_run_survives_workers_that_are_lost_in_stage_1_and_in_an_evaluation(make_trainer, tmp_path, fate, timeout):
    trainer = make_trainer(
        config=replace(CONFIG, num_workers=1, stage2_data="none"),
        make_envs=partial(fated, flag=tmp_path / "flag", fate=fate),
        guards=GuardConfig(worker_timeout=timeout),
        rl_tasks=["reach-red:new"],
        eval_tasks={"expert": ["reach-red"]},
    )
    results = trainer.run()
    found = guards_of(trainer)
    assert ("evaluation_repeated", "eval-stage0") in found
    assert ("worker_restarted", "task0-round0-stage1") in found
    assert results["task0-round0-stage1"]["num_env_steps"] >= 100
    assert results["after-stage0"]["expert"]["tasks"]["reach-red"]["n"] == 2


def test_restarts_need_next_step():
    with pytest.raises(ValueError, match=r"max_restarts=1 needs AutoresetMode.NEXT_STEP"):
        WorkerVectorEnv([toy_env], num_workers=0, autoreset_mode=AutoresetMode.DISABLED, max_restarts=1)
    with pytest.raises(ValueError, match="timeout=0; give seconds above 0"):
        WorkerVectorEnv([toy_env], num_workers=0, timeout=0)
