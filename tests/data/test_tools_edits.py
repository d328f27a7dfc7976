"""merge, split, filter, relabel and sample: what they write, read back by h5py and Minari, and what they never do."""

import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from episode_maker import assert_equal, make_episode

import vla_rl.data
from vla_rl.data import (
    BalancedSampler,
    EpisodeStore,
    UnsafeFileError,
    filter_episodes,
    merge,
    pack,
    relabel,
    sample,
    split,
    verify,
)
from vla_rl.data.writing import explained, new_file, new_folder, require_space

PACKAGE = str(Path(vla_rl.data.__file__).parent)


def episode(number):
    solved = np.arange(6) == 5 if number % 2 else np.zeros(6, dtype=bool)
    return make_episode(number, task=("drawer-open", "door-open", "a/b")[number % 3], infos={"success": solved})


def make_store(path, numbers=range(6)):
    with EpisodeStore(path) as store:
        for number in numbers:
            store.append(episode(number), extras={"features": np.full((2, 3), number, np.float32)})
    return path


@pytest.fixture
def demos(tmp_path):
    return make_store(tmp_path / "demos")


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def datasets(group):
    found = {}
    group.visititems(lambda name, item: found.__setitem__(name, item) if isinstance(item, h5py.Dataset) else None)
    return found


def check_copy(store, numbers, **changes):
    """The store holds these episodes bit by bit, for our reader, for h5py alone and for Minari."""
    assert verify(store.path).findings == []
    assert len(store) == len(numbers)
    for index, number in enumerate(numbers):
        expected = episode(number)
        for name, value in changes.items():
            setattr(expected, name, value)
        assert_equal(store[index], expected)
        np.testing.assert_array_equal(store.read_extras(index)["features"], np.full((2, 3), number, np.float32))
        with h5py.File(store.path / "data" / "main_data.hdf5") as file:
            group = file[f"episode_{index}"]
            assert group.attrs["id"] == index and group.attrs["total_steps"] == 5
            assert group["observations/image"].id.get_offset() is not None
            assert group["actions"][()].tobytes() == expected.actions.tobytes()
    minari = pytest.importorskip("minari")
    dataset = minari.MinariDataset(store.path / "data")
    assert dataset.id == f"{store.path.name}-v0"
    assert [stored.rewards.tobytes() for stored in dataset] == [episode(n).rewards.tobytes() for n in numbers]


def test_merge(tmp_path, demos):
    more = make_store(tmp_path / "more", [7, 8])
    before = files_of(demos), files_of(more)
    seen = []
    check_copy(merge([more, demos], tmp_path / "all", progress=lambda *at: seen.append(at)), [7, 8, 0, 1, 2, 3, 4, 5])
    assert seen == [(k, 8) for k in range(1, 9)]
    assert (files_of(demos), files_of(more)) == before
    with EpisodeStore(tmp_path / "all") as store:
        assert store.append(episode(0)) == 8


def test_a_merge_and_a_split_copy_files_without_decoding_them(tmp_path, demos, monkeypatch):
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: pytest.fail("decoded an array"))
    assert len(merge([demos, demos], tmp_path / "twice")) == 12
    assert sum(map(len, split(demos, tmp_path / "parts", fraction=0.5))) == 6


def test_stores_of_other_shapes_are_not_merged(tmp_path, demos):
    with EpisodeStore(tmp_path / "other") as store:
        store.append(make_episode(0, size=16))
    with pytest.raises(ValueError, match=r"'image' is uint8 \[8, 8, 3\] per step in .* but uint8 \[16, 16, 3\]"):
        merge([demos, tmp_path / "other"], tmp_path / "all")
    with pytest.raises(ValueError, match="at least one"):
        merge([], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_split_by_fraction_and_by_task(tmp_path, demos):
    train, val = split(demos, tmp_path / "parts", fraction=0.5, seed=1)
    assert (train.path, val.path) == (tmp_path / "parts" / "train", tmp_path / "parts" / "val")
    numbers = [[info.seed for info in part.index] for part in (train, val)]
    assert sorted(numbers[0] + numbers[1]) == list(range(6))
    for part, chosen in zip((train, val), numbers, strict=True):
        check_copy(part, chosen)
        assert {info.task for info in part.index} == {"drawer-open", "door-open", "a/b"}
    tasks = split(demos, tmp_path / "tasks")
    assert {part.path.name: [info.seed for info in part.index] for part in tasks} == {
        "a_b": [2, 5],
        "door-open": [1, 4],
        "drawer-open": [0, 3],
    }


def test_a_split_stays_in_its_folder(tmp_path, demos):
    with pytest.raises(ValueError, match="both parts would go to 'train'"):
        split(demos, tmp_path / "parts", fraction=0.5, names=("train", "train"))
    with pytest.raises(ValueError, match=r"cannot be called '\.\./out'"):
        split(demos, tmp_path / "parts", fraction=0.5, names=("../out", "val"))
    relabel(demos, tmp_path / "evil", task="..", where="index == 0")
    assert {part.path.parent for part in split(tmp_path / "evil", tmp_path / "parts")} == {tmp_path / "parts"}
    relabel(demos, tmp_path / "twins", task="a:b", where="index == 0")
    with pytest.raises(ValueError, match="would both go to 'a_b'"):
        split(tmp_path / "twins", tmp_path / "more")
    with pytest.raises(ValueError, match=r"no episodes for .*val"):
        split(demos, tmp_path / "more", fraction=0.99)


def test_filter_and_sample(tmp_path, demos):
    check_copy(filter_episodes(demos, tmp_path / "good", where="success and index > 1"), [3, 5])
    with pytest.raises(ValueError, match="fits 'total_steps > 99'"):
        filter_episodes(demos, tmp_path / "none", where="total_steps > 99")
    chosen = sample(demos, tmp_path / "two", 2, seed=0, where="not success")
    numbers = [info.seed for info in chosen.index]
    assert set(numbers) < {0, 2, 4} and len(set(numbers)) == 2
    check_copy(chosen, numbers)


def test_relabel_changes_the_chosen_episodes_only(tmp_path, demos):
    new = {"task": "drawer", "instruction": "open the drawer, please", "source": "human"}
    store = relabel(demos, tmp_path / "new", where="task == 'drawer-open'", **new)
    for index, stored in enumerate(store):
        expected = episode(index)
        if index in (0, 3):
            vars(expected).update(new)
        assert_equal(stored, expected)
        assert store.index[index].instruction == expected.instruction
    assert verify(store.path).findings == []
    with pytest.raises(ValueError, match="nothing to relabel"):
        relabel(demos, tmp_path / "other")
    with pytest.raises(ValueError, match="empty"):
        relabel(demos, tmp_path / "other", task="")


def test_nothing_is_replaced_unasked(tmp_path, demos):
    before = files_of(demos)
    with pytest.raises(FileExistsError, match="--overwrite"):
        filter_episodes(demos, demos, where="success")
    assert files_of(demos) == before
    check_copy(filter_episodes(demos, demos, where="success", overwrite=True), [1, 3, 5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos"]


def test_overwrite_replaces_data_sets_only_and_none_that_is_being_written(tmp_path, demos):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("...")
    with pytest.raises(FileExistsError, match="not a data set"):
        merge([demos], precious, overwrite=True)
    with EpisodeStore(tmp_path / "busy") as store:
        store.append(episode(0))
        (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
        for parent in (tmp_path, tmp_path.parent / f"{tmp_path.name}-link"):
            with pytest.raises(BlockingIOError, match="another writer"):
                merge([demos], parent / "busy", overwrite=True)
    assert len(merge([demos], tmp_path / "busy", overwrite=True)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy", "demos", "thesis"]


def test_a_store_that_points_elsewhere_is_refused(tmp_path, demos):
    secret = shutil.copyfile(demos / "data" / "episodes" / "000000.hdf5", tmp_path / "secret.hdf5")
    first = demos / "data" / "episodes" / "000000.hdf5"
    size = first.stat().st_size
    first.unlink()
    first.symlink_to(secret)
    assert first.stat().st_size == size
    with pytest.raises(UnsafeFileError, match="leaves"):
        merge([demos], tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(UnsafeFileError, match="leaves"):
        EpisodeStore(demos, "r")[0]
    with pytest.raises(UnsafeFileError, match="leaves"):
        BalancedSampler([EpisodeStore(demos, "r")], batch_size=4, seed=0)
    (demos / "data" / "episodes.jsonl").unlink()
    with pytest.raises(UnsafeFileError, match="leaves"):
        EpisodeStore(demos, "r")


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path, demos):
    for left in (f".out.{os.getpid()}.tmp", f".out.{os.getpid()}.old"):
        (tmp_path / left).mkdir()
    assert len(filter_episodes(demos, tmp_path / "out", where="index > 3")) == 2


@pytest.mark.parametrize(
    ("tool", "every"),
    [
        (lambda store, out: filter_episodes(store, out, where="index > 3", overwrite=True), 41),
        (lambda store, out: pack(store, out, images="png", overwrite=True), 397),
    ],
    ids=["filter", "pack"],
)
def test_killed_anywhere_the_result_is_whole_or_absent(tmp_path, demos, tool, every):
    """The process dies at a line of ours; what it replaces is the old or the new store, and never something between."""
    parts = [filter_episodes(demos, tmp_path / "two", where="index > 3")] if every > 41 else [EpisodeStore(demos, "r")]
    number, seen = 1, set()
    while True:
        out = tmp_path / "work" / "out"
        make_store(out, [0])
        pid = os.fork()
        if pid == 0:
            lines = 0

            def trace(frame, event, _):
                nonlocal lines
                lines += event == "line" and frame.f_code.co_filename.startswith(PACKAGE)
                if lines == number:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys.settrace(trace)
            try:
                tool(parts[0].path, out)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        if not out.exists():  # between two renames: the old one lies beside it
            (old,) = out.parent.glob(".out.*.old")
            old.rename(out)
            seen.add("aside")
        numbers = tuple(info.seed for info in EpisodeStore(out, "r").index)
        assert numbers in ((0,), (4, 5)) and verify(out).errors == []
        seen.add(numbers)
        shutil.rmtree(out.parent)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        number += every
    assert seen >= {(0,), (4, 5)}


def test_errors_of_the_disk_are_told_in_one_sentence(tmp_path):
    hdf5 = OSError(f"Can't write data (write failed: errno = {errno.ENOSPC}, error message = 'No space', buf = 0x)")
    told = r"^cannot write 'x', No space left on device: free some space .*; all is kept$"
    with pytest.raises(OSError, match=told) as caught, explained("x", "all is kept"):
        raise hdf5
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="Permission denied: choose"), explained("x", "all is kept"):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(OSError, match=r"^other$"), explained("x", "all is kept"):
        raise OSError("other")
    with pytest.raises(OSError, match="MB left"):
        require_space(tmp_path / "deep" / "er", 1 << 60)


@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_a_failed_write_leaves_nothing_and_a_full_disk_keeps_the_store(tmp_path, demos, kind, monkeypatch):
    with pytest.raises(KeyError), kind(tmp_path / "out" / "x.bin") as temporary:
        (temporary if kind is new_file else temporary / "part").write_text("half")
        raise KeyError("stop")
    assert list((tmp_path / "out").iterdir()) == []

    class Full:
        free = 1000

    with EpisodeStore(demos) as store:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Full)
        with pytest.raises(OSError, match="the store keeps its 6 episodes"):
            store.append(episode(6))
        monkeypatch.undo()
        assert store.append(episode(6)) == 6
    with pytest.raises(OSError, match="MB left"), monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Full)
        merge([demos], tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_write_that_the_system_refuses_keeps_what_was_written(tmp_path):
    """A limit on the size of files stands in for the full disk, with HDF5's own error."""
    pid = os.fork()
    if pid == 0:
        import resource

        try:
            store = EpisodeStore(tmp_path / "s")
            store.append(make_episode(0, size=8))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            try:
                store.append(make_episode(1, size=8, steps=400))
            except OSError as error:
                os._exit(0 if "keeps its 1 episodes" in str(error) and "\n" not in str(error) else 2)
            os._exit(3)
        finally:
            os._exit(1)
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 0
    assert_equal(EpisodeStore(tmp_path / "s", "r")[0], make_episode(0, size=8))
    assert [path.name for path in (tmp_path / "s/data/episodes").iterdir()] == ["000000.hdf5"]
