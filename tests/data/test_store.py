import json
import multiprocessing
import shutil
import tracemalloc

import h5py
import numpy as np
import pytest
from episode_maker import assert_equal, make_episode

from vla_rl.data import EpisodeStore


@pytest.fixture
def root(tmp_path):
    return tmp_path / "demos"


def filled(root, count=3):
    with EpisodeStore(root) as store:
        for seed in range(count):
            store.append(make_episode(seed, steps=3 + seed))
    return root


def test_round_trip_is_bit_equal(root):
    nan_free = {"tiny": np.full((6, 2), 5e-324), "flag": np.ones(6, bool), "count": np.arange(6, dtype=np.int32)}
    episodes = [
        make_episode(0),
        make_episode(1, steps=9, seed=None, infos={}, instruction="schließ die Schublade", task="drawer-close"),
        make_episode(2, infos=nan_free, success=True, source="rl", iteration=7, policy_version="3f"),
        make_episode(3, steps=1),
    ]
    with EpisodeStore(root) as store:
        assert [store.append(episode) for episode in episodes] == [0, 1, 2, 3]
        for index, episode in enumerate(episodes):
            assert_equal(store[index], episode)
    store = EpisodeStore(root, "r")
    assert len(store) == 4
    for stored, episode in zip(store, episodes, strict=True):
        assert_equal(stored, episode)
    assert_equal(store[-1], episodes[-1])
    with pytest.raises(IndexError, match="episode 4 of a store with 4"):
        store[4]


def test_appending_continues_an_existing_store(root):
    filled(root, 2)
    with EpisodeStore(root) as store:
        assert store.append(make_episode(9)) == 2
    assert [info.seed for info in EpisodeStore(root, "r").index] == [0, 1, 9]


def test_index_describes_episodes_and_survives_its_own_loss(root):
    filled(root)
    before = EpisodeStore(root, "r").index
    entry = before[1]
    assert (entry.task, entry.success, entry.source, entry.total_steps) == ("drawer-open", True, "expert", 4)
    assert (entry.iteration, entry.seed) == (1, 1)
    assert entry.return_ == make_episode(1, steps=4).return_
    (root / "data" / "episodes.jsonl").unlink()
    assert EpisodeStore(root, "r").index == before
    assert EpisodeStore(root, "a").index == before
    (root / "data" / "main_data.hdf5").unlink()
    EpisodeStore(root, "a").close()
    with h5py.File(root / "data" / "main_data.hdf5") as file:
        assert sorted(file) == ["episode_0", "episode_1", "episode_2"]


def test_arrays_lie_in_one_uncompressed_piece(root):
    filled(root, 1)
    with h5py.File(root / "data" / "main_data.hdf5") as file:
        image = file["episode_0/observations/image"]
        assert image.chunks is None and image.compression is None
        content = (root / "data" / "episodes" / "000000.hdf5").read_bytes()
        start = image.id.get_offset()
        assert content[start : start + image.nbytes] == make_episode(0, steps=3).observations["image"].tobytes()


def test_single_steps_in_any_order(root):
    episode = make_episode(0, steps=6)
    with EpisodeStore(root) as store:
        store.append(episode)
    observations, actions = store.read_steps(0, [4, 0, 4])
    assert observations.keys() == episode.observations.keys()
    for key, value in observations.items():
        np.testing.assert_array_equal(value, episode.observations[key][[4, 0, 4]])
    np.testing.assert_array_equal(actions, episode.actions[[4, 0, 4]])
    observations, actions = store.read_steps(0, [])
    assert observations["image"].shape == (0, 8, 8, 3) and actions.shape == (0, 4)
    with pytest.raises(IndexError, match=r"numbers in \[0, 6\)"):
        store.read_steps(0, [6])


def test_extras_lie_beside_the_episode(root):
    features = np.random.default_rng(0).standard_normal((5, 2, 4)).astype(np.float16)
    with EpisodeStore(root) as store:
        store.append(make_episode(0), extras={"fingerprint-1": features})
        store.append(make_episode(1))
    np.testing.assert_array_equal(store.read_extras(0)["fingerprint-1"], features)
    assert store.read_extras(1) == {}
    assert_equal(store[0], make_episode(0))


def test_a_folder_can_be_moved(root, tmp_path):
    shutil.move(filled(root), tmp_path / "elsewhere")
    with EpisodeStore(tmp_path / "elsewhere") as store:
        store.append(make_episode(3))
    with h5py.File(tmp_path / "elsewhere" / "data" / "main_data.hdf5") as file:
        np.testing.assert_array_equal(file["episode_1/actions"][()], make_episode(1, steps=4).actions)
        assert file["episode_3"].attrs["seed"] == 3


def test_modes(root):
    with pytest.raises(FileNotFoundError, match="no episode store"):
        EpisodeStore(root, "r")
    assert not root.exists()
    with EpisodeStore(root, "w-") as store:
        store.append(make_episode())
    with pytest.raises(FileExistsError, match="mode='a' to append"):
        EpisodeStore(root, "w-")
    assert len(EpisodeStore(root, "r")) == 1
    with pytest.raises(OSError, match="not open for writing"):
        EpisodeStore(root, "r").append(make_episode())
    with pytest.raises(OSError, match="not open for writing"):
        store.append(make_episode())


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (
            lambda: make_episode(size=16),
            r"'image' of the episode is uint8 \[16, 16, 3\] per step, but uint8 \[8, 8, 3\]",
        ),
        (lambda: make_episode(state=5), r"'state' .* float32 \[5\]"),
        (lambda: make_episode(state=None), "'state' of the episode is absent"),
        (lambda: make_episode(actions=np.zeros((5, 7), np.float32)), r"'actions' .* float32 \[7\]"),
    ],
)
def test_other_shapes_are_refused_and_nothing_is_lost(root, episode, message):
    with EpisodeStore(root) as store:
        store.append(make_episode(0))
        with pytest.raises(ValueError, match=message):
            store.append(episode())
        assert store.append(make_episode(1)) == 1
    assert [info.seed for info in EpisodeStore(root, "r").index] == [0, 1]


def test_a_failed_write_leaves_the_store_as_it_was(root, monkeypatch):
    store = EpisodeStore(root)
    store.append(make_episode(0))
    with monkeypatch.context() as patch:
        patch.setattr("vla_rl.data.layout.os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            store.append(make_episode(1))
    assert len(store) == 1
    assert store.append(make_episode(2)) == 1
    store.close()
    assert [info.seed for info in EpisodeStore(root, "r").index] == [0, 2]
    assert not list(root.rglob("*.tmp"))


def open_for_writing(root, answers):
    try:
        EpisodeStore(root)
        answers.put("opened")
    except BlockingIOError as error:
        answers.put(str(error))


def test_a_second_writer_is_refused_in_this_and_in_other_processes(root):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def ask_other_process():
        process = context.Process(target=open_for_writing, args=(root, answers))
        process.start()
        process.join()
        return answers.get(timeout=10)

    store = EpisodeStore(root)
    with pytest.raises(BlockingIOError, match="another writer has the episode store"):
        EpisodeStore(root)
    # A forked child knows of its parent's store; one of another origin has only the lock on the file.
    assert "another writer" in ask_other_process()
    from vla_rl import file_lock as lock

    lock._held.clear()
    assert "another writer" in ask_other_process()
    assert len(EpisodeStore(root, "r")) == 0
    store.append(make_episode())
    store.close()
    assert ask_other_process() == "opened"
    del store
    EpisodeStore(root)


def test_an_unclosed_store_that_is_dropped_lets_the_next_writer_in(root):
    store = EpisodeStore(root)
    store.append(make_episode())
    del store
    with EpisodeStore(root) as store:
        assert store.append(make_episode(1)) == 1


def test_truncated_and_missing_episode_files_are_named(root):
    filled(root)
    path = root / "data" / "episodes" / "000001.hdf5"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    for mode in ("a", "r"):
        with pytest.raises(ValueError, match=r"000001.hdf5' has 1000 bytes, expected \d+ bytes; restore"):
            EpisodeStore(root, mode)
    (root / "data" / "episodes.jsonl").rename(root / "index")
    with pytest.raises(ValueError, match=r"cannot read .*000001.hdf5.*restore"):
        EpisodeStore(root)
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*000001.hdf5"):
        EpisodeStore(root)
    (root / "index").rename(root / "data" / "episodes.jsonl")
    with pytest.raises(ValueError, match=r"000001.hdf5' is missing"):
        EpisodeStore(root)
    path.write_bytes(content)
    assert len(EpisodeStore(root)) == 3


def test_a_file_damaged_while_the_store_is_open_is_named_when_read(root):
    store = EpisodeStore(filled(root), "r")
    (root / "data" / "episodes" / "000002.hdf5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*000002.hdf5.*restore it"):
        store[2]
    assert_equal(store[1], make_episode(1, steps=4))


def test_foreign_folders_are_refused_and_untouched(tmp_path):
    (tmp_path / "plain.hdf5").write_bytes(b"not a folder")
    with pytest.raises(ValueError, match="is a file, but an episode store is a folder"):
        EpisodeStore(tmp_path / "plain.hdf5")

    no_metadata = tmp_path / "no_metadata" / "data"
    no_metadata.mkdir(parents=True)
    (no_metadata / "main_data.hdf5").write_bytes(b"not HDF5")
    for mode in ("a", "r", "w-"):
        with pytest.raises(ValueError, match=r"'main_data.hdf5' but no metadata.json, so it is not a whole"):
            EpisodeStore(no_metadata.parent, mode)
    assert [path.name for path in no_metadata.iterdir()] == ["main_data.hdf5"]

    for name, text, message in (
        ("other", json.dumps({"data_format": "hdf5"}), "was not written by EpisodeStore"),
        ("later", json.dumps({"vla_rl_format": 99}), "vla_rl_format is 99, expected 1"),
        ("broken", '{"data_for', "is not JSON"),
    ):
        data = tmp_path / name / "data"
        data.mkdir(parents=True)
        (data / "metadata.json").write_text(text)
        for mode in ("a", "r"):
            with pytest.raises(ValueError, match=message):
                EpisodeStore(data.parent, mode)
        assert (data / "metadata.json").read_text() == text


def test_a_lost_metadata_file_of_a_store_does_not_lose_episodes(root):
    filled(root)
    metadata = root / "data" / "metadata.json"
    before = json.loads(metadata.read_text())
    metadata.write_text("")
    assert len(EpisodeStore(root, "r")) == 3
    EpisodeStore(root).close()
    assert json.loads(metadata.read_text()) == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda shapes: shapes.pop("actions"),
        lambda shapes: shapes.update(state=["floau32", [3]]),
        lambda shapes: shapes.update(state=["S4", [3]]),
        lambda shapes: shapes.update(state=["float32", [10**12]]),
        lambda shapes: shapes.update(state=["float32", [-3]]),
    ],
)
def test_noted_shapes_that_no_episode_has_are_noted_anew(root, spoil):
    path = filled(root) / "data" / "metadata.json"
    before = json.loads(path.read_text())
    damaged = json.loads(path.read_text())
    spoil(damaged["step_shapes"])
    path.write_text(json.dumps(damaged))
    assert EpisodeStore(root, "r").step_shapes["state"] == ("float32", (3,))
    EpisodeStore(root).close()
    assert json.loads(path.read_text()) == before


def test_metadata_added_by_hand_is_kept(root):
    filled(root)
    path = root / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "author": ["someone"]}, indent=2))
    with EpisodeStore(root) as store:
        store.append(make_episode(3))
        store.append(make_episode(4))
    metadata = json.loads(path.read_text())
    assert (metadata["author"], metadata["total_episodes"]) == (["someone"], 5)
    assert metadata["total_steps"] == 3 + 4 + 5 + 5 + 5


def test_memory_does_not_grow_with_the_frames(root):
    episode = make_episode(steps=20, size=64)
    frames = episode.observations["image"].nbytes
    with EpisodeStore(root) as store:
        for _ in range(3):
            store.append(episode)
        tracemalloc.start()
        for _ in range(50):
            store.append(episode)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert kept < 0.5 * frames
    assert peak < 2 * frames
