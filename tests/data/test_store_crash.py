"""A writer that is killed, or finds the disk full or closed, loses at most the episode it was writing."""

import errno
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from episode_maker import assert_equal, make_episode

import vla_rl.data
from vla_rl.data import EpisodeStore, repair, verify

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


def check(root, acknowledged, *, minari, **changes):
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
            assert_equal(episode, make_episode(index, **changes))
        assert store.append(make_episode(found, **changes)) == found
    assert [info.seed for info in EpisodeStore(root, "r").index] == list(range(found + 1))
    assert minari.MinariDataset(root / "data").total_episodes == found + 1
    return found + 1


def write_until_killed(root, log):
    """In a child: appends and says so after each; killed from outside."""
    try:
        store = EpisodeStore(root)
        with open(log, "a") as file:
            while True:
                index = store.append(make_episode(len(store), success=True))
                file.write(f"{index}\n")
                file.flush()
    finally:
        os._exit(1)


@pytest.mark.parametrize("kills", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    minari = pytest.importorskip("minari")
    log = tmp_path / "log"
    clock = random.Random(kills)
    written = kill = 0
    while kill < kills or (written < kills and kill < 3 * kills):  # a busy machine needs more of them
        if kill % 12 == 0:
            root, count = tmp_path / f"store-{kill}", 0
        log.write_text("")
        pid = os.fork()
        if pid == 0:
            write_until_killed(root, log)
        time.sleep(clock.uniform(0.005, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        kill += 1
        lines = log.read_text().splitlines()
        acknowledged = int(lines[-1]) + 1 if lines else count
        written += acknowledged - count
        count = check(root, acknowledged, minari=minari, success=True)
        assert verify(root).findings == []
    assert written >= kills


def test_repair_after_a_kill_says_what_it_did_or_that_there_was_nothing_to_do(tmp_path):
    clock = random.Random(0)
    for number in range(4):
        root, log = tmp_path / f"{number}", tmp_path / "log"
        log.write_text("")
        pid = os.fork()
        if pid == 0:
            write_until_killed(root, log)
        while len(log.read_text().splitlines()) < 3:
            time.sleep(0.005)
        time.sleep(clock.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged = len(log.read_text().splitlines())
        done = repair(root)
        assert done.lost == [] or all(".tmp" in finding.file for finding in done.lost)
        assert done.kept in (acknowledged, acknowledged + 1)
        assert done.path is None or done.findings
        repaired = EpisodeStore(done.path or root, "r")
        assert len(repaired) == done.kept
        for index, episode in enumerate(repaired):
            assert_equal(episode, make_episode(index, success=True))


FAILURES = {
    "the file": "vla_rl.data.layout.os.fsync",
    "its name": "vla_rl.data.layout.os.replace",
    "the index": "vla_rl.data.store.EpisodeStore._append_index_line",
    "the totals": "vla_rl.data.store.EpisodeStore._update_totals",
    "the shapes": "vla_rl.data.store.EpisodeStore._write_metadata",
    "the links": "vla_rl.data.store.write_links",
}


@pytest.mark.parametrize("stored", [0, 1])
@pytest.mark.parametrize("target", FAILURES.values(), ids=FAILURES.keys())
def test_a_disk_that_fills_up_anywhere_costs_the_episode_being_written(tmp_path, monkeypatch, target, stored):
    root = tmp_path / "store"
    store = EpisodeStore(root)
    for number in range(stored):
        store.append(make_episode(number, success=True))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    failed = False
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        try:
            store.append(make_episode(stored, success=True))
        except OSError as error:
            failed = True
            assert (
                f"No space left on device: free some space or write to another disk; the store keeps its {stored} "
                in (str(error))
            )
    left = stored + (not failed)  # not every append writes metadata and links
    assert failed or target.endswith(("write_links", "_write_metadata"))
    assert len(store) == left
    assert [info.seed for info in EpisodeStore(root, "r").index] == list(range(left))
    assert store.append(make_episode(left, success=True)) == left
    store.close()
    assert [info.seed for info in EpisodeStore(root, "r").index] == list(range(left + 1))
    assert verify(root).findings == []


def test_a_folder_that_may_not_be_written_stops_the_writer_with_its_name(tmp_path):
    root = tmp_path / "store"

    def work():
        store = EpisodeStore(root)
        store.append(make_episode(0))
        (root / "data" / "episodes").chmod(0o500)
        if os.geteuid() == 0:  # root may write anywhere
            os.seteuid(65534)
        with pytest.raises(OSError, match=r"store', Permission denied: choose a folder .* keeps its 1 episodes"):
            store.append(make_episode(1))
        with pytest.raises(OSError, match="Permission denied"):
            EpisodeStore(tmp_path / "store" / "data" / "episodes" / "new")

    status = in_child(work)
    (root / "data" / "episodes").chmod(0o700)
    assert os.WEXITSTATUS(status) == 0 and os.WIFEXITED(status)
    assert_equal(EpisodeStore(root, "r")[0], make_episode(0))
    assert len(EpisodeStore(root, "r")) == 1


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
