import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="forks")
def test_random_damage_ends_in_words_or_in_the_data():
    command = [sys.executable, Path(__file__).with_name("fuzz_store.py"), "--rounds", "200", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
