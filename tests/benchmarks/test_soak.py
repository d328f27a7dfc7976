"""The benchmark that looks for drift, with few steps: too few to judge memory and speed, enough for its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_thousand_steps_fill_the_report(tmp_path):
    output = tmp_path / "soak.json"
    words = ["--steps", "2000", "--num-envs", "4", "--rollout-steps", "16", "--num-workers", "1", "--turns", "2"]
    words += ["--output", output]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert output.exists(), done.stdout + done.stderr
    figures = json.loads(output.read_text())
    assert done.returncode == (not all(figures["kept"].values()))
    assert 2000 <= figures["env_steps"] < 2100 and figures["episodes"] > 20 and figures["worker_restarts"] == 0
    assert figures["kept"]["threads and files (none more)"]
    assert figures["thread_growth"] <= 0 and figures["file_growth"] <= 0
    for name in ("rss_growth_percent", "workers_rss_growth_percent"):
        assert abs(figures[name]) < 20
    (mine, fresh), *_ = figures["turns"]
    assert len(figures["turns"]) <= 2 and mine > 0 < fresh
    if len(figures["turns"]) == 1:
        assert figures["speed_change_in_turns_percent"] == pytest.approx(100 * (mine / fresh - 1), abs=1)
    first, last = (figures[f"steps_per_second_{tenth}_tenth"] for tenth in ("first", "last"))
    assert figures["speed_change_percent"] == pytest.approx(100 * (last / first - 1), abs=1)
    samples = figures["samples"]
    assert len(samples) > 20 and samples[0]["rss_mb"] > 50 < samples[0]["workers_rss_mb"]
    for name in ("steps", "seconds", "cpu_seconds"):
        values = [sample[name] for sample in samples]
        assert values == sorted(values) and values[-1] > values[0]
    assert "--steps 2000 --num-envs 4 --rollout-steps 16 --num-workers 1" in figures["command"]
