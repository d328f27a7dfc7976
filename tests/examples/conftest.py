"""Demonstrations and a policy, each made by a script in a process of its own, that the tests of the scripts share."""

import subprocess
import sys

import pytest
from scripts import EXAMPLES, SMALL_HEAD, SMALL_VLM


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="session")
def demos(root):
    options = "--out demos --episodes 4 --seed 5"
    subprocess.run([sys.executable, EXAMPLES / "collect_demos.py", *options.split()], cwd=root, check=True)
    return root / "demos"


@pytest.fixture(scope="session")
def sft(root, demos):
    """The directory of a policy from `sft_vlm.py`, made by a process of its own."""
    options = "--demos demos --total-timesteps 4 --batch-size 8 --eval-episodes 2 --num-envs 2 --save-model"
    options = f"{options} {SMALL_VLM} {SMALL_HEAD}"
    subprocess.run([sys.executable, EXAMPLES / "sft_vlm.py", *options.split()], cwd=root, check=True)
    (model,) = root.glob("runs/*/*__sft_vlm__1__*/model")
    return model
