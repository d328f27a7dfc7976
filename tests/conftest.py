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
