import gc
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from vla_rl.vector import WorkerError, WorkerVectorEnv

NUM_ENVS = 5
IMAGE = spaces.Box(0, 255, (6, 7, 3), np.uint8)


class Noisy(gym.Env):
    """Random observations, episodes of random length that terminate or are truncated, and infos of every kind."""

    observation_space = spaces.Dict(
        image=IMAGE,
        state=spaces.Box(-np.inf, np.inf, (3,), np.float32),
        task_id=spaces.Discrete(9),
        pair=spaces.Tuple((spaces.MultiBinary(2), spaces.Box(-1, 1, (), np.float64))),
    )
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, task_id=0):
        self.task_id = task_id
        self.instructions = ("a", "b")
        self.history = []

    def _observe(self):
        return {
            "image": self.np_random.integers(0, 256, IMAGE.shape, dtype=np.uint8),
            "state": self.np_random.standard_normal(3, dtype=np.float32),
            "task_id": self.task_id,
            "pair": (np.array([1, 0], np.int8), self.np_random.random()),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(2, 9))
        self.t = 0
        self.history.clear()
        return self._observe(), {"instruction": "a", "options": str(options), "nested": {"t": 0, "task": self.task_id}}

    def step(self, action):
        if action[0] > 5:
            raise ZeroDivisionError("boom")
        self.t += 1
        self.history.append(self.t)
        info = {"success": self.t == 3, "reward": float(action.sum()), "action": action.copy(), "name": f"t{self.t}"}
        if self.t % 2:
            info["odd"] = np.int32(self.t)
            info["nested"] = {"t": self.t}
        ended = self.t >= self.length
        return (
            self._observe(),
            float(action.sum()),
            ended and self.length % 2 == 0,
            ended and self.length % 2 == 1,
            info,
        )

    def render(self):
        return np.full((2, 2, 3), self.task_id, np.uint8)

    def loaded(self, module):
        return module in sys.modules

    def environ(self, name):
        return os.environ.get(name)

    def die(self):
        if self.task_id == 3:
            os.kill(os.getpid(), signal.SIGKILL)


class Broken(Noisy):
    def __init__(self):
        raise FileNotFoundError("no such robot")


class Texty(Noisy):
    observation_space = spaces.Dict(image=IMAGE, text=spaces.Text(5))


def make(task_id):
    return lambda: Noisy(task_id)


ENV_FNS = [make(i) for i in range(NUM_ENVS)]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.dtype == object:
            for x, y in zip(a, b, strict=True):
                assert_same(x, y)
        else:
            np.testing.assert_array_equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="module", params=list(AutoresetMode), ids=lambda mode: mode.name)
def pair(request):
    workers = WorkerVectorEnv(ENV_FNS, num_workers=2, autoreset_mode=request.param)
    sync = SyncVectorEnv(ENV_FNS, autoreset_mode=request.param)
    yield workers, sync
    workers.close()
    sync.close()


@pytest.fixture(scope="module")
def manual():
    envs = WorkerVectorEnv(ENV_FNS, num_workers=2, autoreset_mode=AutoresetMode.DISABLED)
    yield envs
    envs.close()


def check_rollout(envs, sync, *, steps=100):
    rng = np.random.default_rng(0)
    assert_same(envs.reset(seed=11), sync.reset(seed=11))
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (NUM_ENVS, 2)).astype(np.float32)
        ours, theirs = envs.step(actions), sync.step(actions)
        assert_same(ours, theirs)
        ended = ours[2] | ours[3]
        if envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED and ended.any():
            seeds = [int(s) for s in rng.integers(0, 99, NUM_ENVS)]
            assert_same(
                envs.reset(seed=seeds, options={"reset_mask": ended, "x": 1}),
                sync.reset(seed=seeds, options={"reset_mask": ended.copy(), "x": 1}),
            )


def test_same_data_as_sync_vector_env(pair):
    workers, sync = pair
    check_rollout(workers, sync)


def test_same_spaces_and_metadata_as_sync_vector_env(pair):
    workers, sync = pair
    assert workers.observation_space == sync.observation_space
    assert workers.action_space == sync.action_space
    assert workers.single_observation_space == sync.single_observation_space
    assert workers.metadata == sync.metadata


def test_same_data_in_process():
    envs = WorkerVectorEnv(ENV_FNS, num_workers=0, autoreset_mode=AutoresetMode.SAME_STEP)
    check_rollout(envs, SyncVectorEnv(ENV_FNS, autoreset_mode=AutoresetMode.SAME_STEP), steps=30)


def test_returned_observations_are_not_overwritten_by_the_next_step(manual):
    first, _ = manual.reset(seed=0)
    kept = first["image"].copy()
    manual.step(np.zeros((NUM_ENVS, 2), np.float32))
    np.testing.assert_array_equal(first["image"], kept)


def test_partial_reset_touches_only_the_masked_rows(manual):
    before, _ = manual.reset(seed=0)
    mask = np.array([False, False, False, False, True])
    options = {"reset_mask": mask}
    after, infos = manual.reset(seed=[0, 0, 0, 0, 77], options=options)
    np.testing.assert_array_equal(after["image"][:4], before["image"][:4])
    np.testing.assert_array_equal(after["image"][4], Noisy(4).reset(seed=77)[0]["image"])
    np.testing.assert_array_equal(infos["_instruction"], mask)
    assert options["reset_mask"] is mask


def test_inactive_environments_are_left_alone(manual):
    before, _ = manual.reset(seed=5)
    twin = Noisy(2)
    twin.reset(seed=5 + 2)
    active = np.array([True, True, False, True, True])
    actions = np.full((NUM_ENVS, 2), 0.5, np.float32)
    obs, rewards, *_, infos = manual.step(actions, active=active)
    np.testing.assert_array_equal(obs["image"][2], before["image"][2])
    assert not np.array_equal(obs["image"][1], before["image"][1])
    assert rewards.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    np.testing.assert_array_equal(infos["_success"], active)
    obs = manual.step(actions)[0]
    np.testing.assert_array_equal(obs["image"][2], twin.step(actions[2])[0]["image"])


def test_an_ended_environment_may_stay_inactive_but_not_be_stepped(manual):
    manual.reset(seed=0)
    actions = np.zeros((NUM_ENVS, 2), np.float32)
    active = np.ones(NUM_ENVS, bool)
    while active.any():
        *_, terminated, truncated, _ = manual.step(actions, active=active)
        active &= ~(terminated | truncated)
    with pytest.raises(WorkerError, match="AssertionError"):
        manual.step(actions)


def test_active_needs_manual_resets(pair):
    workers, _ = pair
    if workers.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
        return
    with pytest.raises(ValueError, match="DISABLED"):
        workers.step(np.zeros((NUM_ENVS, 2), np.float32), active=np.ones(NUM_ENVS, bool))


def test_call_get_and_set_attributes(manual):
    assert manual.get_attr("instructions") == (("a", "b"),) * NUM_ENVS
    assert [int(frame[0, 0, 0]) for frame in manual.render()] == [0, 1, 2, 3, 4]
    manual.set_attr("marker", [10, 11, 12, 13, 14])
    assert manual.get_attr("marker") == (10, 11, 12, 13, 14)
    with pytest.raises(WorkerError, match="no_such_thing"):
        manual.get_attr("no_such_thing")


def test_workers_are_light_and_single_threaded(manual):
    importlib.import_module("torch")
    assert manual.call("loaded", "torch") == (False,) * NUM_ENVS
    for name, count in (("OMP_NUM_THREADS", "1"), ("LP_NUM_THREADS", "0")):
        assert manual.call("environ", name) == (count,) * NUM_ENVS


def test_an_error_names_the_sub_environments_and_leaves_the_rest_usable(manual):
    manual.reset(seed=0)
    actions = np.zeros((NUM_ENVS, 2), np.float32)
    actions[3, 0] = 9
    with pytest.raises(WorkerError, match=r"(?s)sub-environments 3\.\.4 raised during step.*ZeroDivisionError: boom"):
        manual.step(actions)
    obs, _ = manual.reset(seed=1)
    np.testing.assert_array_equal(obs["image"][3], Noisy(3).reset(seed=4)[0]["image"])


def test_a_batch_of_other_size_is_refused_by_the_whole_and_by_its_groups(manual):
    manual.reset(seed=0)
    for envs in (manual, manual.groups[0]):
        for count in (envs.num_envs - 1, envs.num_envs + 1):
            with pytest.raises(ValueError, match=f"actions for {count} environments, there are {envs.num_envs}"):
                envs.step_async(np.zeros((count, 2), np.float32))
    manual.step(np.zeros((NUM_ENVS, 2), np.float32))


def test_step_async_and_step_wait_come_in_pairs(manual):
    manual.reset(seed=0)
    with pytest.raises(NoAsyncCallError):
        manual.step_wait()
    manual.step_async(np.zeros((NUM_ENVS, 2), np.float32))
    with pytest.raises(AlreadyPendingCallError):
        manual.reset(seed=0)
    assert manual.step_wait()[1].shape == (NUM_ENVS,)


@pytest.mark.parametrize("mask", [np.zeros(NUM_ENVS, bool), np.ones(3, bool), [True] * NUM_ENVS])
def test_bad_masks_and_seeds_are_refused(manual, mask):
    with pytest.raises(ValueError, match=r"reset_mask.*boolean numpy array of shape \(5,\)"):
        manual.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="2 seeds for num_envs=5"):
        manual.reset(seed=[1, 2])


def test_a_killed_worker_is_reported_and_close_still_works():
    envs = WorkerVectorEnv(ENV_FNS, num_workers=2)
    envs.reset(seed=0)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"sub-environments 3\.\.4 died during call of 'die' \(exit code -9\)"):
        envs.call("die")
    with pytest.raises(WorkerError, match="died during step"):
        envs.step(np.zeros((NUM_ENVS, 2), np.float32))
    assert time.monotonic() - start < 5
    envs.close()
    with pytest.raises(ClosedEnvironmentError):
        envs.reset()


def test_an_environment_that_cannot_be_built():
    with pytest.raises(WorkerError, match=r"(?s)sub-environments 1\.\.1 raised during construction.*no such robot"):
        WorkerVectorEnv([make(0), Broken], num_workers=2)


def test_a_final_info_survives_the_reset_that_follows():
    class Live(Noisy):
        def step(self, action):
            *result, info = super().step(action)
            return *result, {**info, "history": self.history}

    envs = WorkerVectorEnv([Live], num_workers=0, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(seed=0)
    infos = {}
    while "final_info" not in infos:
        infos = envs.step(np.zeros((1, 2), np.float32))[-1]
    assert infos["final_info"]["history"][0][:2] == [1, 2]


def test_a_text_observation_is_refused():
    with pytest.raises(TypeError, match="task_id"):
        WorkerVectorEnv([Texty], num_workers=0)


ROWS = [slice(0, 3), slice(3, 5)]


def check_groups(envs, *, steps=40):
    """Both groups in flight at once, the answers collected in either order, against a SyncVectorEnv for each."""
    rng = np.random.default_rng(0)
    mode = envs.metadata["autoreset_mode"]
    syncs = [SyncVectorEnv(ENV_FNS[rows], autoreset_mode=mode) for rows in ROWS]
    assert [group.rows for group in envs.groups] == ROWS
    for group, sync in zip(envs.groups, syncs, strict=True):
        assert (group.observation_space, group.action_space) == (sync.observation_space, sync.action_space)
        assert group.metadata == sync.metadata
        assert_same(group.reset(seed=3), sync.reset(seed=3))
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (NUM_ENVS, 2)).astype(np.float32)
        for group, rows in zip(envs.groups, ROWS, strict=True):
            group.step_async(actions[rows])
        for k in rng.permutation(2):
            group, sync = envs.groups[k], syncs[k]
            ours = group.step_wait()
            assert_same(ours, sync.step(actions[ROWS[k]]))
            ended = ours[2] | ours[3]
            if mode is AutoresetMode.DISABLED and ended.any():
                seeds = [int(s) for s in rng.integers(0, 99, sync.num_envs)]
                assert_same(
                    group.reset(seed=seeds, options={"reset_mask": ended}),
                    sync.reset(seed=seeds, options={"reset_mask": ended.copy()}),
                )


def test_groups_step_on_their_own(pair):
    check_groups(pair[0])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: mode.name)
def test_groups_that_share_a_worker(mode, workers):
    envs = WorkerVectorEnv(ENV_FNS, num_workers=workers, autoreset_mode=mode, context="fork")
    check_groups(envs)
    envs.close()


def test_the_groups_do_not_depend_on_the_number_of_workers():
    for workers in (3, 4):
        envs = WorkerVectorEnv(ENV_FNS, num_workers=workers, autoreset_mode=AutoresetMode.SAME_STEP, context="fork")
        check_groups(envs, steps=5)
        envs.close()
    single = WorkerVectorEnv(ENV_FNS[:1])
    assert [group.num_envs for group in single.groups] == [1]
    single.close()


def test_one_group_steps_while_the_other_is_in_flight(tmp_path):
    gate = tmp_path / "gate"

    class Waiting(Noisy):
        def step(self, action):
            while self.task_id < 2 and not gate.exists():
                time.sleep(0.01)
            return super().step(action)

    envs = WorkerVectorEnv([lambda i=i: Waiting(i) for i in range(4)], num_workers=2)
    envs.reset(seed=0)
    first, second = envs.groups
    actions = np.ones((2, 2), np.float32)
    first.step_async(actions)
    assert second.step(actions)[1].tolist() == [2.0, 2.0]
    with pytest.raises(AlreadyPendingCallError):
        envs.step(np.ones((4, 2), np.float32))
    with pytest.raises(AlreadyPendingCallError):
        first.step_async(actions)
    with pytest.raises(NoAsyncCallError):
        second.step_wait()
    gate.touch()
    assert first.step_wait()[1].tolist() == [2.0, 2.0]
    assert envs.step(np.ones((4, 2), np.float32))[1].tolist() == [2.0] * 4
    envs.close()
    with pytest.raises(ClosedEnvironmentError):
        first.reset()


def test_groups_hand_out_views_of_one_memory(manual):
    manual.reset(seed=0)
    group = manual.groups[1]
    image = group.step(np.zeros((2, 2), np.float32))[0]["image"]
    kept = image.copy()
    again = group.step(np.zeros((2, 2), np.float32))[0]["image"]
    assert np.shares_memory(image, again) and not np.array_equal(image, kept)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_views_outlive_the_environments():
    envs = WorkerVectorEnv(ENV_FNS, num_workers=1, context="fork")
    image = envs.groups[0].reset(seed=0)[0]["image"]
    envs.close()
    del envs
    gc.collect()
    np.testing.assert_array_equal(image[0], Noisy(0).reset(seed=0)[0]["image"])


def test_an_error_in_one_group_leaves_the_other_usable(manual):
    manual.reset(seed=0)
    first, second = manual.groups
    first.step_async(np.full((3, 2), 9, np.float32))
    second.step_async(np.zeros((2, 2), np.float32))
    with pytest.raises(WorkerError, match=r"sub-environments 0\.\.2 raised during step"):
        first.step_wait()
    assert second.step_wait()[1].shape == (2,)
    assert first.reset(seed=0)[0]["image"].shape == (3, *IMAGE.shape)


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_killed_parent_and_need_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal
            import gymnasium as gym
            from vla_rl.vector import WorkerVectorEnv

            class Still(gym.Env):
                observation_space = action_space = gym.spaces.Discrete(3)
                def reset(self, *, seed=None, options=None):
                    return 0, {}
                def pid(self):
                    return os.getpid()

            envs = WorkerVectorEnv([Still, Still], num_workers=2)
            print(*envs.call("pid"), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pids = [int(word) for word in done.stdout.split()]
    assert len(set(pids)) == 2
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in pids)
