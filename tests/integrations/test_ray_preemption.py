"""SIGTERM to a driver whose environments are Ray's, to it alone and to every process of its job."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("ray")

HERE = Path(__file__).parent
SECONDS = 30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the processes from /proc"),
]


def started(folder):
    """The driver in a session of its own."""
    paths = [str(HERE), str(HERE.parent), *(str(HERE.parents[1] / part) for part in ("", "envs"))]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "RAY_worker_niceness": "0"}
    return subprocess.Popen(
        [sys.executable, str(HERE / "ray_preempted.py"), str(folder)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_through(folder):
    process = started(folder)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return json.loads((folder / "result.json").read_text()), load_file(folder / "trained" / "head.safetensors")


def with_workers(pid):
    """The process and all below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = {pid}, {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def preempted(folder, *, whole_job):
    """Exit code of a driver that gets SIGTERM after three updates, and what it said; `whole_job`: so does all below."""
    folder.mkdir()
    process = started(folder)
    try:
        updates = 0
        while updates < 3:
            line = process.stdout.readline()
            assert line, f"ended with {process.wait()}"
            updates += line == "here\n"
        below = with_workers(process.pid)
        assert len(below) > 4, "Ray's own processes and two workers"
        start = time.monotonic()
        for pid in sorted(below) if whole_job else [process.pid]:
            os.kill(pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=2 * SECONDS)
        assert time.monotonic() - start < SECONDS
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, said


@pytest.mark.parametrize("whole_job", [False, True])
def test_the_driver_writes_a_snapshot_and_goes_on_on_new_workers(tmp_path, whole_job):
    for attempt in range(3):
        folder = tmp_path / f"run-{attempt}"
        code, said = preempted(folder, whole_job=whole_job)
        assert code == 143 or (whole_job and code == 1), said
        if code == 143 or list((folder / "snapshots").glob("step*")):
            break
        # Ray has ended a driver that found its object store gone, before the snapshot was whole: begun again.
        assert run_through(folder)[0]["said"] == []
    (kept,) = (folder / "snapshots").glob("step*")
    state = json.loads((kept / "state.json").read_text())["state"]
    steps = state["collector"]["num_env_steps"]
    assert state["update"] >= 3 and 0 < steps < 600 and not (folder / "trained").exists()
    shutil.copytree(folder, tmp_path / "copy")
    result, weights = run_through(folder)
    assert result["num_env_steps"] >= 600 and result["num_episodes"] > len(state["record"]["outcomes"])
    (sentence,) = result["said"]
    assert f"goes on after {steps:,} env steps" in sentence
    assert not (folder / "snapshots").exists()
    if not whole_job:
        other, others = run_through(tmp_path / "copy")
        assert result == other and all((weights[name] == others[name]).all() for name in weights)
