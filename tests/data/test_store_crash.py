"""A writer killed anywhere loses at most the episode it was writing."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from episode_maker import assert_equal, make_episode

import vla_rl.data
from vla_rl.data import EpisodeStore

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PACKAGE = str(Path(vla_rl.data.__file__).parent)


def in_child(work):
    """Runs ``work`` in a forked process and returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def check(root, acknowledged, *, minari):
    """All acknowledged episodes are there, for Minari before we reopen and for us after, and appending goes on."""
    if acknowledged:
        dataset = minari.MinariDataset(root / "data")
        assert dataset.total_episodes in (acknowledged, acknowledged + 1)
        assert dataset.total_steps == 5 * dataset.total_episodes
        assert [len(episode) for episode in dataset] == [5] * dataset.total_episodes
    if not (root / "data" / "metadata.json").exists():
        assert acknowledged == 0
    else:
        assert len(EpisodeStore(root, "r")) in (acknowledged, acknowledged + 1)
    with EpisodeStore(root) as store:
        found = len(store)
        assert found in (acknowledged, acknowledged + 1)
        for index, episode in enumerate(store):
            assert_equal(episode, make_episode(index))
        assert store.append(make_episode(found)) == found
    assert [info.seed for info in EpisodeStore(root, "r").index] == list(range(found + 1))
    assert minari.MinariDataset(root / "data").total_episodes == found + 1
    return found + 1


def test_killed_at_random_moments(tmp_path):
    minari = pytest.importorskip("minari")
    root, log = tmp_path / "store", tmp_path / "log"
    clock = random.Random(0)
    count = kills = 0
    while kills < 8 or (count <= 16 and kills < 100):  # a busy machine needs more of them
        kills += 1
        log.write_text("")
        pid = os.fork()
        if pid == 0:
            try:
                store = EpisodeStore(root)
                with open(log, "a") as file:
                    while True:
                        index = store.append(make_episode(len(store)))
                        file.write(f"{index}\n")
                        file.flush()
            finally:
                os._exit(1)
        time.sleep(clock.uniform(0.005, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        lines = log.read_text().splitlines()
        count = check(root, int(lines[-1]) + 1 if lines else count, minari=minari)
    assert count > 16


def killed_at_line(root, number, work):
    """Does ``work`` on a store, but dies at the ``number``-th line of ours; returns False if there were fewer lines."""

    def child():
        lines = 0

        def trace(frame, event, _):
            nonlocal lines
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                lines += 1
                if lines == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work(root)

    status = in_child(child)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def create(root):
    EpisodeStore(root)


def create_and_append(root):
    EpisodeStore(root).append(make_episode(0))


def append_and_close(root):
    with EpisodeStore(root) as store:
        store.append(make_episode(len(store)))


@pytest.mark.slow
@pytest.mark.parametrize(("work", "stored"), [(create, 0), (create_and_append, 0), (append_and_close, 3)])
def test_killed_at_every_line(tmp_path, work, stored):
    minari = pytest.importorskip("minari")
    number, kills = 1, 0
    while True:
        root = tmp_path / f"{number}"
        if stored:
            with EpisodeStore(root) as store:
                for seed in range(stored):
                    store.append(make_episode(seed))
        if not killed_at_line(root, number, work):
            break
        check(root, stored, minari=minari)
        number, kills = number + 5, kills + 1
    assert kills > 10
