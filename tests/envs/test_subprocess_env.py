import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from vla_rl_envs._env_server import decode, encode
from vla_rl_envs.subprocess_env import SubprocessEnv, SubprocessEnvError

from vla_rl.vector import WorkerVectorEnv

TOY = "vla_rl_envs:VLA/Toy-v0"

ODD = '''
import ctypes, os, sys, time
import numpy as np
from gymnasium import spaces

class Odd:
    """Does what the action says."""
    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(8)
    metadata = {"render_modes": ["rgb_array"]}
    def __init__(self, env_id, **kwargs):
        self.env_id, self.kwargs = env_id, kwargs
        if env_id == "broken":
            import no_such_package
        if env_id == "text":
            self.observation_space = spaces.Text(5)
        if env_id == "crash":
            print("the simulator says goodbye", file=sys.stderr)
            os._exit(7)
    def reset(self, *, seed=None, options=None):
        return np.zeros(1), {"array": np.arange(3.0), "nested": {"n": np.int64(4), "object": object()},
                             "options": options, "tuple": (1, "a"), "object": object()}
    def step(self, action):
        if action == 1:
            raise ValueError("the robot is on fire")
        if action == 2:
            print("about to sleep", flush=True)
            time.sleep(100)
        if action == 3:
            print("python says hello", flush=True)
            os.write(1, b"C says hello\\n")
            os.system("echo the shell says hello")
        if action == 4:
            ctypes.string_at(0)
        if action == 5:
            return np.zeros(2), 0.0, False, False, {}
        return np.full(1, action), np.float32(0.5), np.bool_(False), False, {}
    def render(self):
        return np.full((400, 500, 3), 7, np.uint8)
    def close(self):
        if self.env_id == "stubborn":
            time.sleep(100)

class Old:
    """The calls of Gym before 0.22."""
    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    metadata = {"render.modes": ["rgb_array"]}
    def __init__(self, env_id):
        self.rng = np.random.RandomState()
    def seed(self, seed=None):
        self.rng = np.random.RandomState(seed)
    def reset(self):
        self.count = 0
        return self.rng.uniform(-1, 1, 1)
    def step(self, action):
        self.count += 1
        done, info = (True, {}) if action[0] > 0.5 else (False, {})
        if self.count == 3:
            done, info = True, {"TimeLimit.truncated": True}
        return self.rng.uniform(-1, 1, 1), 1.0, done, info
    def render(self, mode="human"):
        assert mode == "rgb_array"
        return np.zeros((2, 2, 3), np.uint8)

class Bright:
    """Its pictures are floats, whatever its space says."""
    metadata = {}
    observation_space = action_space = spaces.Box(0, 255, (2, 2, 3), np.uint8)
    def __init__(self, env_id):
        pass
    def reset(self, *, seed=None, options=None):
        return np.full((2, 2, 3), 200, np.int64), {}
    def step(self, action):
        return np.full((2, 2, 3), 0.9), 0.0, False, False, {}

class Echo:
    """The observation is the action."""
    metadata = {}
    def __init__(self, env_id):
        self.observation_space = self.action_space = spaces.Dict({
            "a": spaces.Tuple([spaces.Discrete(3, start=5), spaces.MultiBinary((2, 2))]),
            "b": spaces.Dict({"c": spaces.MultiDiscrete([3, 4]), "d": spaces.Box(-np.inf, np.inf, (2, 3), np.float64)}),
            "e": spaces.Box(0, 255, (3, 5, 3), np.uint8),
            "f": spaces.Box(-np.inf, np.inf, (), np.float32),
            "g": spaces.Box(0, 1, (0,), np.float32),
        })
    def reset(self, *, seed=None, options=None):
        self.action_space.seed(seed)
        return self.action_space.sample(), {}
    def step(self, action):
        assert self.action_space.contains(action) or np.isnan(action["f"]), action
        assert type(action["a"][0]) is int
        return action, 0.0, False, False, {}
    def twice(self, x, *, plus=0):
        return {"value": 2 * x + plus}
    def refuse(self):
        return object()
'''


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "odd.py"
    path.write_text(ODD)
    return path


@pytest.fixture
def odd(odd_file):
    """Make an environment of the file above; closed at the end of the test."""
    made = []

    def make(env_id="odd", name="Odd", **kwargs):
        made.append(SubprocessEnv(env_id, make_fn=f"{odd_file}:{name}", **kwargs))
        made[-1].reset(seed=0)
        return made[-1]

    yield make
    for env in made:
        env.close()


def make(env_id, **kwargs):
    return gym.make("vla_rl_envs:VLA/Subprocess-v0", env_id=env_id, **kwargs)


def running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def gone_within(pid, seconds):
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("env_id", "kwargs"), [("CartPole-v1", {}), (TOY, {"task": "reach-blue", "image_size": 48})])
def test_same_as_the_environment_itself(env_id, kwargs):
    env, direct = make(env_id, kwargs=kwargs), gym.make(env_id, **kwargs)
    assert env.observation_space == direct.observation_space and env.action_space == direct.action_space
    assert getattr(env.unwrapped, "instructions", None) == getattr(direct.unwrapped, "instructions", None)
    direct.action_space.seed(0)
    for seed in (5, None, 5):
        if seed is None:
            env.reset(seed=6), direct.reset(seed=6)
        (a, a_info), (b, b_info) = env.reset(seed=seed), direct.reset(seed=seed)
        assert_same(a, b)
        assert a_info == b_info
        done = False
        while not done:
            action = direct.action_space.sample()
            ours, theirs = env.step(action), direct.step(action)
            assert_same(ours[0], theirs[0])
            assert ours[1:] == theirs[1:] and type(ours[1]) is float and type(ours[2]) is bool
            done = theirs[2] or theirs[3]
    env.close()


def test_observations_are_not_overwritten_by_the_next_step():
    env = SubprocessEnv("CartPole-v1")
    first, _ = env.reset(seed=0)
    kept = first.copy()
    env.step(0)
    np.testing.assert_array_equal(first, kept)
    env.close()


def test_passes_gymnasium_checker():
    env = make(TOY, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=0)
    direct = gym.make(TOY, render_mode="rgb_array")
    direct.reset(seed=0)
    np.testing.assert_array_equal(env.render(), direct.render())
    env.close()


def vectors():
    yield lambda fns: SyncVectorEnv(fns)
    yield lambda fns: AsyncVectorEnv(fns)
    yield lambda fns: WorkerVectorEnv(fns, num_workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("vector", vectors(), ids=["sync", "async", "worker"])
def test_works_in_vector_environments(vector):
    envs, direct = vector([lambda: make(TOY)] * 2), SyncVectorEnv([lambda: gym.make(TOY)] * 2)
    assert_same(envs.reset(seed=1)[0], direct.reset(seed=1)[0])
    direct.action_space.seed(0)
    for _ in range(25):
        actions = direct.action_space.sample()
        ours, theirs = envs.step(actions), direct.step(actions)
        assert_same(ours[:4], theirs[:4])
        np.testing.assert_array_equal(ours[4]["success"], theirs[4]["success"])
    envs.close()


def test_every_kind_of_space_comes_through_unchanged(odd, odd_file):
    scope: dict = {}
    exec(odd_file.read_text(), scope)
    direct = scope["Echo"]("echo")
    env = odd(name="Echo")
    assert env.observation_space == direct.observation_space
    assert_same(env.reset(seed=3)[0], direct.reset(seed=3)[0])
    for value in (np.float32(1 / 3), np.float32(-np.inf), np.float32(np.nan)):
        action = direct.action_space.sample()
        action["f"] = np.array(value)
        observation = env.step(action)[0]
        assert_same(observation, action)
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\).*\(3, 5, 3\)"):
        env.step({**action, "e": np.zeros((4, 5, 3), np.uint8)})
    with pytest.raises(ValueError, match="the action is float64, its space says uint8"):
        env.step({**action, "e": np.full((3, 5, 3), 0.9)})
    plain = {**action, "a": (7.0, action["a"][1].astype(bool)), "e": action["e"].astype(np.int64), "f": 3}
    assert_same(env.step(plain)[0], {**action, "a": (7, action["a"][1]), "f": np.array(np.float32(3))})


def test_float_pictures_are_not_cast_to_black(odd):
    env = odd(name="Bright")
    np.testing.assert_array_equal(env.reset()[0], np.full((2, 2, 3), 200, np.uint8))
    with pytest.raises(SubprocessEnvError, match="the observation is float64, its space says uint8"):
        env.step(np.zeros((2, 2, 3), np.uint8))


def test_calls_that_gym_before_0_22_had(odd):
    env = odd(name="Old", render_mode=None)
    assert env.metadata["render_modes"] == ["rgb_array"]
    rng = np.random.RandomState(4)
    np.testing.assert_array_equal(env.reset(seed=4)[0], rng.uniform(-1, 1, 1))
    observation, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
    np.testing.assert_array_equal(observation, rng.uniform(-1, 1, 1))
    assert (terminated, truncated) == (False, False)
    assert env.step(np.ones(1, np.float32))[2:4] == (True, False)
    env.reset()
    assert [env.step(np.zeros(1, np.float32))[2:4] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]


def test_infos_options_pictures_and_calls(odd):
    env = odd(kwargs={"size": 3})
    info = env.reset(options={"where": [1, 2]})[1]
    np.testing.assert_array_equal(info.pop("array"), np.arange(3.0))
    assert info == {"nested": {"n": 4}, "options": {"where": [1, 2]}, "tuple": [1, "a"]}
    assert env.call("kwargs") == {"size": 3}
    picture = env.render()  # larger than the memory that was shared at first
    assert picture.shape == (400, 500, 3) and (picture == 7).all()
    np.testing.assert_array_equal(env.step(6)[0], [6.0])
    echo = odd(name="Echo")
    np.testing.assert_array_equal(echo.call("twice", np.arange(3), plus=1)["value"], [1, 3, 5])
    with pytest.raises(SubprocessEnvError, match="object cannot be sent between processes"):
        echo.call("refuse")


def test_json_keeps_arrays_bit_by_bit():
    value = {"a": np.array([[1.5, np.nan]], np.float32), "b": [True, None, "ü", np.array("x")], "c": np.uint8(3)}
    back = decode(encode(value))
    assert back["a"].dtype == np.float32 and back["a"].tobytes() == value["a"].tobytes()
    assert back["b"][:3] == [True, None, "ü"] and back["b"][3] == "x" and back["c"] == 3
    with pytest.raises(TypeError, match="set cannot be sent"):
        encode({"a": {1}})


def test_an_exception_is_reported_and_the_environment_stays_usable(odd):
    env = odd()
    with pytest.raises(SubprocessEnvError, match=r"(?s)raised ValueError during step.*the robot is on fire.*odd\.py"):
        env.step(1)
    np.testing.assert_array_equal(env.step(6)[0], [6.0])
    with pytest.raises(SubprocessEnvError, match=r"has shape \(2,\), its space says \(1,\)"):
        env.step(5)


def test_what_the_simulator_prints_disturbs_nothing_and_is_quoted_at_its_death(odd):
    env = odd()
    for _ in range(3):
        np.testing.assert_array_equal(env.step(3)[0], [3.0])
    with pytest.raises(SubprocessEnvError) as error:
        env.step(4)
    assert f"exit code -{int(signal.SIGSEGV)}, SIGSEGV" in str(error.value)
    for speaker in ("python", "C", "the shell"):
        assert f"{speaker} says hello" in str(error.value)
    assert env.unwrapped.pid is None


def test_a_killed_child_is_reported_at_once(odd):
    env = odd()
    pid = env.pid
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(SubprocessEnvError, match=r"died before or during step \(exit code -9, SIGKILL.*\n.*\nabout to"):
        env.step(2)
    assert time.monotonic() - start < 5
    with pytest.raises(SubprocessEnvError, match="make a new environment"):
        env.reset()


def test_a_hanging_child_is_ended(odd):
    env = odd(timeout=0.7)
    pid = env.pid
    start = time.monotonic()
    with pytest.raises(SubprocessEnvError, match=r"(?s)did not answer within 0.7 seconds during step.*about to sleep"):
        env.step(2)
    assert time.monotonic() - start < 5 and gone_within(pid, 2)
    with pytest.raises(SubprocessEnvError, match=r"did not answer within 0.7 seconds.*make a new environment"):
        env.step(0)


def test_a_late_answer_is_not_taken_for_the_next(odd):
    """An interrupt (Ctrl-C) during a step leaves its answer in the pipe."""
    env = odd()
    env._child.count += 1
    from vla_rl_envs._env_server import write_message

    env._actions[...] = 6
    write_message(env._child.process.stdin, {"id": env._child.count, "command": "step"})
    assert "options" in env.reset()[1]


def test_close_ends_the_child(odd):
    env = odd()
    pid = env.pid
    env.close()
    assert not running(pid) and env.pid is None
    env.close()
    with pytest.raises(gym.error.ClosedEnvironmentError, match="make a new one"):
        env.step(0)


def test_an_environment_that_nobody_closed_ends_its_child():
    env = SubprocessEnv("CartPole-v1")
    pid = env.pid
    del env
    assert gone_within(pid, 2)


@pytest.mark.slow
def test_a_child_that_does_not_close_is_killed(odd):
    env = odd("stubborn")
    pid, start = env.pid, time.monotonic()
    env.close()
    assert not running(pid) and time.monotonic() - start < 10


@pytest.mark.parametrize("how", ["kill", "exit", "kill during a step"])
def test_the_child_ends_with_its_parent(odd_file, how):
    code = f"""
import os, signal, threading, time
from vla_rl_envs.subprocess_env import SubprocessEnv
env = SubprocessEnv("odd", make_fn={f"{odd_file}:Odd"!r})
env.reset()
print(env.pid, flush=True)
if {how!r} == "kill during a step":
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    env.step(2)
if {how!r} == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if how == "exit" else -9), done.stderr
    assert done.stderr == ""
    assert gone_within(int(done.stdout), 5)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no name here")
def test_no_shared_memory_is_left_behind(odd):
    env = odd()
    os.kill(env.pid, signal.SIGKILL)
    assert not list(Path("/dev/shm").glob(f"vla_rl_envs-{os.getpid()}-*"))


def test_errors_of_the_construction(odd_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Python interpreter '/no/python'"):
        make("CartPole-v1", python="/no/python")
    with pytest.raises(gym.error.UnregisteredEnv, match=r"NoSuch.*imports"):
        make("NoSuch-v0")
    with pytest.raises(ModuleNotFoundError, match="needs the package 'no_such_package'"):
        make("no_such_package:Env-v0")
    with pytest.raises(ModuleNotFoundError, match="needs the package 'no_such_package'"):
        make("broken", make_fn=f"{odd_file}:Odd")
    with pytest.raises(ValueError, match="reach-pink"):
        make(TOY, kwargs={"task": "reach-pink"})
    with pytest.raises(SubprocessEnvError, match=r"Text.*no fixed-size arrays.*make_fn"):
        make("text", make_fn=f"{odd_file}:Odd")
    with pytest.raises(SubprocessEnvError, match=r"(?s)exit code 7.*the simulator says goodbye"):
        make("crash", make_fn=f"{odd_file}:Odd")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(ModuleNotFoundError, match="needs the package 'numpy'"):
        make("CartPole-v1", python=str(tmp_path / "bare" / "bin" / "python"))
