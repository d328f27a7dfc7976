"""The benchmark that kills runs, with few kills: bit-equal weights, tables and episodes whenever it comes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="forks the run that it kills")
def test_killed_runs_end_with_the_numbers_of_one_that_was_not(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, SCRIPT, "--kills", "10", "--flips", "0.2", "--seed", "1"]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(output.read_text())
    assert figures["kills"] == 10 == sum(figures["kills_while"].values())
    assert len(figures["kills_while"]) >= 3  # where they hit depends on the machine; the published run covers all
    assert figures["bit_equal_runs"] == figures["runs"] > 0
