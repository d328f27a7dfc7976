"""Large files: reading raw episodes takes no memory beyond their size, reading others none beyond twice theirs."""

import os
import resource
import shutil
import struct
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_policy

sys.path.append(str(Path(__file__).parents[1] / "data"))

from episode_maker import make_episode
from resident import KNOWN, forget_peak, resident

from vla_rl.data import EpisodeStore
from vla_rl.data.verification import verify
from vla_rl.policy import VLAPolicy
from vla_rl.rundir import RunDirectory

SIZE = 64 << 20
SLACK = 48 << 20  # of whole files alone, as for making the VLM; less than a third copy of the file would be

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KNOWN, reason="asks Linux for the peak of a process"),
]


def peak_growth(work):
    """By how much the memory of a fork of this process grows at most while it does `work`; and the error's words."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        told = ""
        try:
            before = forget_peak()
            try:
                work()
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
            os.write(write, f"{resident('VmHWM') - before} {told}".encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        growth, _, told = answer.read().partition(" ")
    os.waitpid(pid, 0)
    return int(growth), told


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def claim_more(path):
    """A header of safetensors as long as the file."""
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", path.stat().st_size * 100))


def check(root, large, damage, work, expected, *, times=2):
    """Of a copy of a folder with one large file, once `damage` has been done to it."""
    path = root / large
    size = path.stat().st_size
    assert size >= SIZE > SLACK
    if damage is not None:
        damage(path)
    growth, told = peak_growth(partial(work, root))
    assert growth < (times * size + SLACK if damage is None else 2 * size), f"{growth >> 20} MiB for {size >> 20}"
    assert expected in told if expected else not told
    return growth


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("large") / "store"
    with EpisodeStore(root) as store:
        store.append(make_episode(0, steps=SIZE // (256 * 256 * 3), size=256, infos={}))
    return root


def read(root):
    for episode in EpisodeStore(root, mode="r"):
        assert len(episode.actions) > 0


def verify_aloud(root):
    for finding in verify(root).errors:
        raise ValueError(finding.message)


@pytest.mark.parametrize(
    ("work", "damage", "expected"),
    [
        (read, None, ""),
        (read, cut, "ValueError"),
        (verify_aloud, None, ""),
        (verify_aloud, flip, "ValueError"),
        (verify_aloud, cut, "ValueError"),
    ],
)
def test_an_episode(tmp_path, store, work, damage, expected):
    root = shutil.copytree(store, tmp_path / "store")
    read(store)
    check(root, "data/episodes/000000.hdf5", damage, work, expected, times=1)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """One whose head has most of the weights."""
    root = tmp_path_factory.mktemp("large") / "policy"
    tiny_policy(width=64, num_queries=64, hidden_dim=4096).save_pretrained(root)
    return root


@pytest.mark.parametrize(
    ("damage", "expected"), [(None, ""), (cut, "is no whole safetensors file"), (claim_more, "is no whole safetensors")]
)
def test_the_weights_of_a_policy(tmp_path, policy, damage, expected):
    root = shutil.copytree(policy, tmp_path / "policy")
    VLAPolicy.from_pretrained(policy)
    check(root, "head.safetensors", damage, VLAPolicy.from_pretrained, expected)


def resume(root):
    if RunDirectory(root, resume=True).usable_checkpoint() is None:
        raise ValueError("the checkpoint was passed over")


@pytest.mark.parametrize(("damage", "expected"), [(None, ""), (flip, "passed over"), (cut, "passed over")])
def test_a_checkpoint_of_a_run(tmp_path, policy, damage, expected):
    root = tmp_path / "run"
    run = RunDirectory(root)

    def save(folder):
        shutil.copytree(policy, folder)

    run.finish("stage0", checkpoint=run.save_checkpoint("stage0", save))
    run.close()
    growth = check(root, "checkpoints/stage0/head.safetensors", damage, resume, expected)
    assert growth < SIZE / 4  # its checksum is taken piece by piece
