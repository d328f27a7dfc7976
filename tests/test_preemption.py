"""SIGTERM to real processes, as a scheduler sends it: in order, in time, and no work is lost that could be kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_policy, toy_env

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from toy_run import outcome

from vla_rl.data import EpisodeStore, compute_statistics
from vla_rl.preemption import PreemptedError, put_off_sigterm, stop_on_sigterm
from vla_rl.vector import WorkerVectorEnv

SCRIPT = Path(__file__).with_name("preempted_run.py")
TORCHRUN = "torchrun --standalone --nproc-per-node 2"
SECONDS = 30

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the processes from /proc")


def test_what_is_put_off_is_left_to_the_body():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    done = []
    with pytest.raises(PreemptedError), stop_on_sigterm(), put_off_sigterm() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(asked())
    assert done == [True]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_is_put_off_for_too_long_is_broken_off():
    start = time.monotonic()
    with pytest.raises(PreemptedError), stop_on_sigterm(), put_off_sigterm(grace=0.2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    assert 0.15 < time.monotonic() - start < 10


def test_an_error_after_sigterm_ends_the_body_in_order():
    """Helpers of the body may have got the signal too, and be gone before it."""
    done = []
    with pytest.raises(PreemptedError) as stopped, stop_on_sigterm(), put_off_sigterm(last=done.append):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ConnectionError("the worker is gone")
    assert isinstance(stopped.value.__cause__, ConnectionError) and len(done) == 1
    with pytest.raises(ConnectionError), stop_on_sigterm(), put_off_sigterm(last=done.append):
        raise ConnectionError("without SIGTERM")
    assert len(done) == 1


def test_nothing_is_put_off_where_sigterm_is_not_ours():
    before = signal.getsignal(signal.SIGTERM)
    with put_off_sigterm() as asked:
        assert signal.getsignal(signal.SIGTERM) == before and not asked()


def descendants(pid):
    """Running processes below one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents.setdefault(int(parent), []).append(int(path.parent.name))
    found, new = set(), {pid}
    while new:
        new = {child for one in new for child in parents.get(one, ())} - found
        found |= new
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def environment():
    paths = [str(Path(__file__).parents[1] / part) for part in ("", "envs")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run_through(command):
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def terminate(command, *, ready, fewest, group=False):
    """Send SIGTERM to a command once it is `ready`, with at least some processes below it; what it printed.

    With `group` these get it too, as from schedulers that signal every process of a job.
    """
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        ready(process)
        below = descendants(process.pid)
        assert len(below) >= fewest
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM) if group else process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=2 * SECONDS)
        assert time.monotonic() - start < SECONDS
        assert process.returncode == 143, said
        while any(map(is_running, below)) and time.monotonic() - start < SECONDS:
            time.sleep(0.1)  # Python's own helpers end when they notice
        assert not any(map(is_running, below))
        return said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def says_here(process):
    for line in process.stdout:
        if line == "here\n":
            return
    raise AssertionError(f"ended with {process.wait()} and never said where it is")


def steps(folder):
    return sorted(path.name for path in folder.glob("step*"))


def run_of(folder, expert, *, at="", method="ire-vla", launch=None):
    return [sys.executable, str(SCRIPT), str(folder), str(expert), at, method, *([launch] if launch else [])]


@pytest.fixture(scope="module")
def whole(expert_path, tmp_path_factory):
    """What the run gives that nobody stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_through(run_of(folder, expert_path))
    return outcome(folder)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "done", "phase"),
    [
        ("stage0", 0, "stage0"),
        ("after-stage0", 1, "eval-stage0"),
        ("task0-round0-stage2", 4, "task0-round0-stage2"),
    ],
)
def test_a_run_goes_on_with_the_same_numbers(whole, expert_path, tmp_path, at, done, phase):
    folder = tmp_path / "run"
    terminate(run_of(folder, expert_path, at=at), ready=says_here, fewest=0 if at == "stage0" else 2)
    assert outcome_so_far(folder) == (whole["done"][:done], phase)
    if at in ("stage0", "task0-round0-stage2"):
        assert steps(folder / "jobs" / at / ".trained.steps") == ["step0000002"], "the step that was running is kept"
    run_through(run_of(folder, expert_path))
    assert outcome(folder) == whole
    assert not any((folder / "jobs").glob("*"))


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "episode"), [("ire-vla", 9), ("ppo-replay", 9), ("ire-vla-sacfd", 9), ("filtered-bc", 7)]
)
def test_a_stage_1_goes_on_where_it_was_and_the_same_way_every_time(expert_path, tmp_path, method, episode):
    """SIGTERM to the run and its env workers, in the middle of a rollout."""
    folder, phase = tmp_path / "run", "task0-round0-stage1"
    stopping = run_of(folder, expert_path, at=f"episode {episode}", method=method)
    terminate(stopping, ready=says_here, fewest=2, group=True)
    assert outcome_so_far(folder) == (["stage0", "eval-stage0"], phase)
    (kept,) = (folder / "jobs" / phase).glob("step*")
    state = json.loads((kept / "state.json").read_text())["state"]
    steps, episodes = state["collector"]["num_env_steps"], len(state["record"]["outcomes"])
    assert steps > 0 and episodes >= episode
    shutil.copytree(folder, tmp_path / "copy")
    for name in ("run", "copy"):
        run_through(run_of(tmp_path / name, expert_path, method=method))
    assert outcome(folder) == outcome(tmp_path / "copy")
    results = json.loads((folder / "results.json").read_text())
    assert next(entry["guard"] for entry in results["guards"] if entry["phase"] == phase) == "preempted"
    assert not any(entry["guard"] == "worker_restarted" for entry in results["guards"])
    assert results[phase]["num_episodes"] > episodes and results[phase]["num_env_steps"] > steps
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    at = [entry["step"] for entry in logged if entry["phase"] == phase]
    assert at == sorted(set(at)) and at[-1] == results[phase]["num_env_steps"]
    assert not any((folder / "jobs").glob("*"))


def outcome_so_far(folder):
    state = json.loads((folder / "state.json").read_text())
    return state["done"], state["stopped"]


@linux
@pytest.mark.slow
def test_a_launched_stage_goes_on_with_the_same_numbers(expert_path, tmp_path):
    """Two processes under torchrun, and no snapshots but those that SIGTERM asks for."""
    pytest.importorskip("accelerate")
    for name in ("whole", "cut"):
        command = run_of(tmp_path / name, expert_path, method="sft", launch=TORCHRUN)
        if name == "cut":
            waiting = run_of(tmp_path / name, expert_path, at="stage0", method="sft", launch=TORCHRUN)
            terminate(waiting, ready=says_here, fewest=3)
            (kept,) = steps(tmp_path / "cut" / "jobs" / "stage0" / ".trained.steps")
            assert "step0000000" < kept < "step0000200"
        run_through(command)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@linux
@pytest.mark.slow
def test_sft_goes_on_with_the_same_numbers(expert_path, tmp_path):
    with EpisodeStore(expert_path, mode="r") as store:
        tiny_policy(statistics=compute_statistics([store])).save_pretrained(tmp_path / "start")
    words = [sys.executable, "-m", "vla_rl", "sft", str(tmp_path / "start"), "--data", str(expert_path)]
    words += ["--sl.scope", "head", "--sl.steps", "1000", "--sl.batch-size", "16", "--sl.snapshot-every", "100"]
    kept = tmp_path / ".cut.steps"

    def has_a_snapshot(process):
        while not steps(kept):
            assert process.poll() is None
            time.sleep(0.01)

    said = terminate([*words, "--out", str(tmp_path / "cut")], ready=has_a_snapshot, fewest=0)
    assert "SIGTERM: the same command goes on from" in said and not (tmp_path / "cut").exists()
    assert 1 <= len(steps(kept)) <= 2 and steps(kept)[-1] < "step0001000"
    for name in ("cut", "whole"):
        run_through([*words, "--out", str(tmp_path / name)])
    cut, expected = (load_file(tmp_path / name / "head.safetensors") for name in ("cut", "whole"))
    assert cut.keys() == expected.keys() and all(torch.equal(cut[key], expected[key]) for key in cut)
    assert not kept.exists()


def test_a_worker_leaves_sigterm_to_its_parent():
    """Schedulers send it to every process of a job."""
    env = WorkerVectorEnv([toy_env] * 2, num_workers=1)
    try:
        env.reset(seed=0)
        os.kill(env._processes[0].process.pid, signal.SIGTERM)
        time.sleep(0.3)
        env.step(env.action_space.sample())
        assert env.num_restarts == 0
    finally:
        env.close()


def test_workers_that_nobody_closed_do_not_hold_up_the_end():
    code = "from tiny import toy_env\nfrom vla_rl.vector import WorkerVectorEnv\nimport builtins\n"
    code += "builtins.kept = WorkerVectorEnv([toy_env], num_workers=1)\nprint(kept._processes[0].process.pid)"
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
