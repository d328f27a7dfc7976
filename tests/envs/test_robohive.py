import os
import sys
from pathlib import Path

os.environ.setdefault("LP_NUM_THREADS", "1")

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from robohive_python import build
from vla_rl_envs import _robohive_child
from vla_rl_envs.robohive import KITCHEN_INSTRUCTIONS, RoboHiveEnv
from vla_rl_envs.subprocess_env import SubprocessEnv

from vla_rl.vector import WorkerVectorEnv

ID = "vla_rl_envs:VLA/RoboHive-v0"
TASKS = {
    "SdoorOpen": "slide the cabinet door open",
    "MicroOpen": "open the microwave",
    "Knob1On": "turn the lower right knob",
    "LightOn": "switch on the light",
    "LdoorOpen": "open the left cabinet door",
}
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (12, 9)).astype(np.float32)
REACH = np.array([0, 0.6, 0, 0.6, 0, 0, 0, 0, 0], np.float32)

real = [pytest.mark.slow, pytest.mark.simulator]


@pytest.fixture(scope="session")
def python(request):
    return build(request.config.cache.mkdir("robohive"))


@pytest.fixture
def make(python):
    made = []

    def make(task="SdoorOpen", variant="Random_v2d", **kwargs):
        made.append(gym.make(ID, env_id=f"FK1_{task}{variant}-v4", python=python, **kwargs))
        return made[-1]

    yield make
    for env in made:
        env.close()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def trajectory(env, seed):
    observations = [env.reset(seed=seed)[0]]
    observations += [env.step(action)[0] for action in ACTIONS]
    return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}


class TestRealRoboHive:
    pytestmark = real

    @pytest.mark.parametrize("task", TASKS)
    def test_every_kitchen_task_steps_and_is_seen(self, make, task):
        env = make(task, image_size=96)
        observation, info = env.reset(seed=0)
        assert info == {"success": False, "solved": False, "instruction": TASKS[task]}
        assert env.unwrapped.instructions[observation["task_id"]] == TASKS[task]
        assert env.observation_space.contains(observation) and env.action_space.shape == (9,)
        physics = env.unwrapped.call("physics")
        np.testing.assert_array_equal(observation["state"][:9], physics["qpos"][:9].astype(np.float32))

        image = observation["image"].astype(int)
        assert image.mean() > 40 and image.std() > 30
        wood = ((image[..., 0] - image[..., 2] > 60) & (image[..., 0] > image[..., 1])).mean(axis=1)
        assert wood[:20].mean() > 0.6 and wood[40:].mean() < 0.2  # the cabinets hang above the stove, not below

        for _ in range(8):
            after, reward, terminated, truncated, info = env.step(REACH)
            assert (reward, terminated, truncated) == (0.0, False, False)
            assert info == {"success": False, "solved": False}
        moved = np.abs(after["image"].astype(int) - image).max(axis=2) > 25
        assert moved[40:].mean() > 0.03  # the arm, over the stove
        assert moved[:20].mean() < 0.01  # not the cabinets
        assert np.abs(after["state"][:9] - observation["state"][:9]).max() > 0.2
        np.testing.assert_array_equal(after["state"][:9], env.unwrapped.call("physics")["qpos"][:9].astype(np.float32))

    def test_the_code_of_its_page(self, python, tmp_path, monkeypatch):
        page = Path(__file__).parents[2] / "docs" / "environments/robohive.md"
        named = tmp_path / "path/to/its/python"
        named.parent.mkdir(parents=True)
        named.write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
        named.chmod(0o755)
        monkeypatch.chdir(tmp_path)
        namespace = {}
        exec(page.read_text().split("```python\n")[1].split("```")[0], namespace)
        assert namespace["env"].reset(seed=0)[1]["instruction"] == TASKS["SdoorOpen"]
        namespace["env"].close()

    def test_seeds_in_this_process_and_in_the_workers_of_a_vector_environment(self, make, python):
        env = make(image_size=32)
        runs = {seed: trajectory(env, seed) for seed in (3, 4)}
        assert_same(trajectory(env, 3), runs[3])
        places = {}
        for seed in (3, 4, None):
            observation, _ = env.reset(seed=seed)
            places[seed] = env.unwrapped.call("physics")["base"]
            assert np.array_equal(observation["state"], runs[3]["state"][0]) == (seed == 3)
        assert np.abs(places[3] - places[4]).max() > 0.01 and np.abs(places[4] - places[None]).max() > 0.01

        def thunk():
            return gym.make(ID, env_id="FK1_SdoorOpenRandom_v2d-v4", python=python, image_size=32)

        envs = WorkerVectorEnv([thunk] * 2, num_workers=2)
        observations = [envs.reset(seed=3)[0]]
        observations += [envs.step(np.stack([action] * 2))[0] for action in ACTIONS]
        for row, seed in enumerate((3, 4)):
            assert_same({key: np.stack([each[key][row] for each in observations]) for key in runs[seed]}, runs[seed])
        assert envs.call("instructions")[0] == tuple(KITCHEN_INSTRUCTIONS.values())
        envs.close()

    def test_picture_is_what_robohive_itself_shows(self, make):
        env = make(image_size=48, camera="right_cam", render_quality="full", render_mode="rgb_array")
        observation, _ = env.reset(seed=0)
        np.testing.assert_array_equal(observation["image"], env.unwrapped.call("exteroception"))
        np.testing.assert_array_equal(observation["image"], env.render())

    def test_success_is_robohives(self, python, tmp_path):
        """With the door's first position at its goal, the first step solves the task."""
        (tmp_path / "opened.py").write_text(f"""
import importlib.util
spec = importlib.util.spec_from_file_location("child", {_robohive_child.__file__!r})
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)

def make(env_id, *, door, **kwargs):
    env = child.RoboHiveChild(env_id, **kwargs)
    env.base.init_qpos[env.base.obj["slidedoor_joint"]["dof_adr"]] = door
    return env
""")
        shared = dict(
            instructions=["open"], task_id=0, image_size=8, camera="top_cam", horizon=3, reward="sparse",
            render_quality="none",
        )  # fmt: skip
        going_on = [(1.0, False, False, True, True), (0.0, False, False, True, True), (0.0, False, True, True, True)]
        for ends, expected in ((True, [(1.0, True, False, True, True)]), (False, going_on)):
            env = SubprocessEnv(
                "FK1_SdoorOpenFixed-v4", python, make_fn=f"{tmp_path}/opened.py:make",
                kwargs={**shared, "door": 0.44, "terminate_on_success": ends},
            )  # fmt: skip
            assert env.reset(seed=0)[1]["success"] is False
            steps = [env.step(np.zeros(9, np.float32)) for _ in expected]
            assert [(*step[1:4], step[4]["success"], step[4]["solved"]) for step in steps] == expected
            env.close()

    def test_dense_reward_own_horizon_and_checker(self, make):
        env = make("LightOn", "Fixed", reward="dense", render_quality="none")
        observation, _ = env.reset(seed=0)
        assert not observation["image"].any()
        steps = [env.step(np.zeros(9, np.float32)) for _ in range(50)]
        assert [step[3] for step in steps] == [False] * 49 + [True]
        assert all(step[1] < 0 for step in steps)
        check_env(env.unwrapped, skip_render_check=True)

    def test_errors_of_the_construction(self, make, python):
        with pytest.raises(ValueError, match=r"camera 'nowhere'.*left_cam"):
            make(camera="nowhere")
        with pytest.raises(gym.error.UnregisteredEnv, match="FK1_FlyAway"):
            make("FlyAway", instruction="fly away")

    @pytest.mark.skipif("VLA_RL_ROBOHIVE_PYTHON" in os.environ, reason="that environment may have all assets")
    def test_assets_of_other_suites_are_missed(self, python):
        with pytest.raises(FileNotFoundError, match=r"SimHive.*Adroit.*vla-rl doctor robohive"):
            gym.make(ID, env_id="door-v1", instruction="open the door", python=python)


def test_arguments_are_checked_before_anything_starts():
    with pytest.raises(ValueError, match=r"FK1_FlyAwayRandom-v4.*instruction=.*SdoorOpen"):
        gym.make(ID, env_id="FK1_FlyAwayRandom-v4", python=sys.executable)
    with pytest.raises(ValueError, match="'lovely'"):
        gym.make(ID, reward="lovely", python=sys.executable)


def test_the_interpreter_is_named(monkeypatch):
    monkeypatch.delenv("VLA_RL_ROBOHIVE_PYTHON", raising=False)
    with pytest.raises(FileNotFoundError, match=r"VLA_RL_ROBOHIVE_PYTHON.*vla-rl doctor robohive"):
        gym.make(ID)
    monkeypatch.setenv("VLA_RL_ROBOHIVE_PYTHON", "/no/python")
    with pytest.raises(FileNotFoundError, match=r"'/no/python'.*vla-rl doctor robohive"):
        gym.make(ID)


def test_missing_package():
    with pytest.raises(ModuleNotFoundError, match=r"needs the package 'robohive'.*vla-rl doctor robohive"):
        gym.make(ID, python=sys.executable)


def test_missing_assets(monkeypatch, tmp_path):
    package = tmp_path / "robohive"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"SimHive.*franka_sim, furniture_sim, scene_sim; `vla-rl doctor"):
        gym.make(ID, python=sys.executable)
    for name in ("franka_sim", "scene_sim"):
        (package / "simhive" / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"simhive: furniture_sim; `vla-rl doctor"):
        gym.make(ID, python=sys.executable)


def test_an_action_of_another_shape_or_of_no_number_is_refused():
    env = object.__new__(RoboHiveEnv)  # nothing is asked of the child
    env.action_space = gym.spaces.Box(-1, 1, (9,), np.float32)
    for bad in (np.full(9, np.nan), np.array([np.inf] + [0.0] * 8), np.zeros(1), np.zeros((1, 9)), 0.0):
        with pytest.raises(ValueError, match=r"step got the action .*give \(9,\) finite numbers"):
            env.step(bad)
