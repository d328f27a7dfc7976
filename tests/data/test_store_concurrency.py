"""One writer and many readers, in processes of every kind; several writers with a shard each."""

import json
import multiprocessing
import os

import numpy as np
import pytest
from episode_maker import assert_equal, make_episode

from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics, filter_episodes, merge, stats, summarize


def filled(root, numbers, **changes):
    with EpisodeStore(root) as store:
        for number in numbers:
            store.append(make_episode(number, steps=3 + number % 4, **changes))
    return EpisodeStore(root, "r")


def write(root, first, count, written):
    """In a process: appends episodes of its own."""
    with EpisodeStore(root) as store:
        for number in range(first, first + count):
            store.append(make_episode(number))
            if written is not None:
                written.value += 1


def read_while_written(root, written, answers):
    """In a process: opens the store again and again; each time all episodes written before must be there and right."""
    seen = []
    try:
        while not seen or seen[-1] < 30:
            before = written.value
            store = EpisodeStore(root, "r")
            assert before <= len(store)
            for index in {0, len(store) // 2, len(store) - 1} if len(store) else ():
                assert_equal(store[index], make_episode(index))
            seen.append(len(store))
        answers.put(seen)
    except BaseException as error:
        answers.put(repr(error))
        raise


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_see_whole_episodes_while_one_writes(tmp_path, method):
    context = multiprocessing.get_context(method)
    root, written, answers = tmp_path / "store", context.Value("i", 0), context.Queue()
    EpisodeStore(root).close()
    readers = [context.Process(target=read_while_written, args=(root, written, answers)) for _ in range(2)]
    writer = context.Process(target=write, args=(root, 0, 30, written))
    for process in (*readers, writer):
        process.start()
    for _ in readers:
        seen = answers.get(timeout=120)
        assert isinstance(seen, list), seen
        assert seen == sorted(seen) and seen[-1] == 30
    for process in (*readers, writer):
        process.join()
        assert process.exitcode == 0


class Steps:
    """The data set of the guide: batches of row numbers in, arrays out."""

    def __init__(self, store):
        self.sampler = BalancedSampler([store], batch_size=1, seed=0, max_ram_bytes=0)

    def __len__(self):
        return self.sampler.num_rows

    def __getitem__(self, rows):
        batch = self.sampler.rows(rows)
        return {"images": batch.images, "actions": batch.actions, "rows": batch.row_id, "pid": np.array([os.getpid()])}


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_data_loader_workers_read_what_this_process_reads_while_it_writes(tmp_path, method):
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    with EpisodeStore(tmp_path / "store") as store:  # open for writing, and so given to the workers
        for number in range(6):
            store.append(make_episode(number, steps=7))
        steps = Steps(store)
        expected = steps.sampler.rows(np.arange(42))  # has read from the files before the fork
        loader = DataLoader(
            steps,
            sampler=BatchSampler(RandomSampler(steps), batch_size=5, drop_last=False),
            batch_size=None,
            num_workers=2,
            multiprocessing_context=method,
        )
        seen, pids = [], set()
        for number, batch in enumerate(loader):
            rows = batch["rows"].numpy()
            np.testing.assert_array_equal(batch["images"].numpy(), expected.images[rows])
            np.testing.assert_array_equal(batch["actions"].numpy(), expected.actions[rows])
            seen += rows.tolist()
            pids.add(int(batch["pid"]))
            store.append(make_episode(6 + number))
    assert sorted(seen) == list(range(42)) and len(pids) == 2 and os.getpid() not in pids
    assert len(EpisodeStore(tmp_path / "store", "r")) == 6 + 9


def append_in_worker(store, answers):
    try:
        store.append(make_episode(9))
        answers.put("appended")
    except OSError as error:
        answers.put(str(error))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_writer_given_to_another_process_only_reads_there(tmp_path, method):
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    with EpisodeStore(tmp_path / "store") as store:
        store.append(make_episode(0))
        process = context.Process(target=append_in_worker, args=(store, answers))
        process.start()
        assert "not open for writing in this process" in answers.get(timeout=60)
        process.join()
        assert store.append(make_episode(1)) == 1


def test_a_second_writer_of_another_origin_is_told_and_changes_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    with EpisodeStore(tmp_path / "store") as store:
        store.append(make_episode(0))
        process = context.Process(target=write, args=(tmp_path / "store", 5, 1, None))
        process.start()
        process.join()
        assert process.exitcode == 1
        assert store.append(make_episode(1)) == 1
    assert [info.seed for info in EpisodeStore(tmp_path / "store", "r").index] == [0, 1]


def test_writers_with_a_shard_each_are_read_as_one(tmp_path):
    context = multiprocessing.get_context("fork")
    root = tmp_path / "demos"
    writers = [context.Process(target=write, args=(root / f"{k:05d}", 10 * k, 3 + k, None)) for k in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    store = EpisodeStore(root, "r")
    numbers = [0, 1, 2, 10, 11, 12, 13, 20, 21, 22, 23, 24]
    assert [info.seed for info in store.index] == numbers
    assert (len(store), store.total_steps) == (12, 60)
    for index, (episode, number) in enumerate(zip(store, numbers, strict=True)):
        assert_equal(episode, make_episode(number))
        np.testing.assert_array_equal(store.read_steps(index, [3])[1][0], make_episode(number).actions[3])
    assert_equal(store[-1], make_episode(24))
    assert [store.locate(index)[1] for index in (0, 2, 3, 11)] == [0, 2, 0, 4]
    with pytest.raises(IndexError, match="episode 12 of a store with 12"):
        store[12]


@pytest.fixture
def shards(tmp_path):
    filled(tmp_path / "demos" / "b", [3, 4, 5], task="push")
    filled(tmp_path / "demos" / "a", [0, 1, 2])
    EpisodeStore(tmp_path / "demos" / "c").close()  # nothing in it yet
    (tmp_path / "demos" / "d" / "data" / "episodes").mkdir(parents=True)  # just being made
    (tmp_path / "demos" / "README.md").write_text("three arms")
    filled(tmp_path / "one", [0, 1, 2], task="drawer-open")
    with EpisodeStore(tmp_path / "one") as one:
        for number in (3, 4, 5):
            one.append(make_episode(number, steps=3 + number % 4, task="push"))
    return EpisodeStore(tmp_path / "demos", "r"), EpisodeStore(tmp_path / "one", "r")


def test_the_tools_take_shards_for_one_store(tmp_path, shards):
    store, one = shards
    assert store.step_shapes == one.step_shapes and len(store) == len(one) == 6
    assert summarize(store) == summarize(one)
    assert repr(stats(store)) == repr(stats(one))
    assert repr(compute_statistics([store])) == repr(compute_statistics([one]))
    for max_ram_bytes in (0, 10**9):
        batches = [
            BalancedSampler([each], batch_size=64, seed=0, max_ram_bytes=max_ram_bytes).sample() for each in shards
        ]
        for name in ("images", "actions", "episode_index", "row_id"):
            np.testing.assert_array_equal(*(getattr(batch, name) for batch in batches))
    merged = merge([store.path], tmp_path / "merged")
    chosen = filter_episodes(store.path, tmp_path / "chosen", where="index >= 2 and index < 5")
    for found, numbers in ((merged, range(6)), (chosen, range(2, 5))):
        assert [info.seed for info in found.index] == list(numbers)
        for episode, number in zip(found, numbers, strict=True):
            assert_equal(episode, one[number])


def test_a_folder_of_shards_is_not_written_and_must_hold_stores_of_one_shape_and_nothing_else(tmp_path, shards):
    root = tmp_path / "demos"
    for mode in ("a", "w-"):
        with pytest.raises(ValueError, match=r"read as one; write to one of them, such as '.*a', or to a new one"):
            EpisodeStore(root, mode)
    assert not (root / "data").exists()
    (root / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no episode store"):
        EpisodeStore(root, "r")
    (root / "checkpoints").rmdir()
    filled(root / "e", [6], size=16)
    with pytest.raises(ValueError, match=r"'image' of '.*e' is uint8 \[16, 16, 3\] per step, but uint8 \[8, 8, 3\]"):
        EpisodeStore(root, "r")


def test_a_store_made_while_another_writer_waited_for_it_is_continued(tmp_path, monkeypatch):
    import vla_rl.data.store as module

    root, metadata = tmp_path / "store", tmp_path / "store" / "data" / "metadata.json"
    original, calls = module.store_exists, []

    def looked_too_early(path):
        if calls:
            return original(path)
        calls.append(path)
        monkeypatch.setattr(module, "store_exists", original)
        filled(root, [0])
        metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "author": "someone"}))
        return False

    monkeypatch.setattr(module, "store_exists", looked_too_early)
    with EpisodeStore(root) as second:
        assert calls and second.append(make_episode(1)) == 1
    assert json.loads(metadata.read_text())["author"] == "someone"
    early = iter([False])
    monkeypatch.setattr(module, "store_exists", lambda path: next(early, None) is None and original(path))
    with pytest.raises(FileExistsError, match="exists at"):
        EpisodeStore(root, "w-")
    with EpisodeStore(root) as third:  # the lock was given back
        assert len(third) == 2
