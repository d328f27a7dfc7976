import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import tiny
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run next to each other on few cores; and a test that leaves another number behind changes no other."""
    torch.set_num_threads(1)


@pytest.fixture
def policy():
    return tiny.tiny_policy()


@pytest.fixture(scope="session")
def expert_path(tmp_path_factory):
    """Eight expert episodes: four of the red task, four of the blue one."""
    return tiny.toy_store(tmp_path_factory.mktemp("toy") / "expert", ("reach-red", "reach-blue"), episodes=4)


@pytest.fixture
def make_trainer(tmp_path, expert_path):
    """Makes trainers whose workdirs lie in `tmp_path`, and closes them."""
    from trainers import trainers_in

    yield from trainers_in(tmp_path, expert_path)
