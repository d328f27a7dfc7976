"""Minari and robomimic, there and back, bit by bit; and what hostile files cannot do."""

import io
import json

import h5py
import numpy as np
import pytest
from episode_maker import assert_equal, make_episode
from gymnasium import spaces

from vla_rl.data import (
    EpisodeStore,
    Labels,
    UnsafeFileError,
    export_minari,
    export_robomimic,
    import_minari,
    import_robomimic,
    verify,
)

LABELS = Labels(task="reach", instruction="reach the dot", success=True)


@pytest.fixture
def store(tmp_path):
    with EpisodeStore(tmp_path / "demos") as store:
        for number in range(4):
            task_id = number % 2
            infos = {"success": np.full(7, bool(number % 2)), "force": np.arange(7.0)}
            episode = make_episode(number, steps=6, task_id=task_id, infos=infos)
            store.append(episode, extras={"features": np.zeros(3)})
    return store


def test_export_minari_is_a_data_set_of_its_own(tmp_path, store, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    out = export_minari(store, tmp_path / "minari" / "me" / "drawers-v3", where="index != 1")
    store.path.rename(tmp_path / "gone")
    assert sorted(path.name for path in (out / "data").iterdir()) == ["main_data.hdf5", "metadata.json"]
    dataset = minari.load_dataset("me/drawers-v3")
    assert (dataset.id, dataset.total_episodes, dataset.total_steps) == ("me/drawers-v3", 3, 18)
    for stored, number in zip(dataset, (0, 2, 3), strict=True):
        expected = make_episode(number, steps=6, task_id=number % 2)
        for key, array in expected.observations.items():
            assert stored.observations[key].dtype == array.dtype
            np.testing.assert_array_equal(stored.observations[key], array)
        for name in ("actions", "rewards", "terminations", "truncations"):
            assert getattr(stored, name).tobytes() == getattr(expected, name).tobytes()
        np.testing.assert_array_equal(stored.infos["force"], np.arange(7.0))
    assert dataset.observation_space["task_id"].n == 2
    with h5py.File(out / "data" / "main_data.hdf5") as file:
        assert "extras" not in file["episode_0"]
        assert isinstance(file.get("episode_0", getlink=True), h5py.HardLink)
    with pytest.raises(FileExistsError):
        export_minari(store, out)


def test_import_minari_brings_back_what_was_exported(tmp_path, store):
    export_minari(store, tmp_path / "out-v0")
    for dataset in (tmp_path / "out-v0", tmp_path / "out-v0" / "data", store.path):
        back = import_minari(dataset, tmp_path / "back", overwrite=True)
        assert len(back) == 4
        for first, second in zip(back, store, strict=True):
            assert_equal(first, second)
        assert verify(back.path).findings == []
        assert json.loads((back.path / "data" / "metadata.json").read_text())["dataset_id"] == "back-v0"


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function that lets Minari itself record a data set of three episodes."""
    minari = pytest.importorskip("minari")
    from gymnasium.spaces import Box, Dict
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def record(spaces, **options):
        space, actions = Dict(spaces), Box(-1, 1, (2,), np.float32)
        space.seed(0)
        buffers = []
        for seed in range(3):
            frames = [space.sample() for _ in range(5)]
            columns = {key: [frame[key] for frame in frames] for key in spaces}
            buffers.append(
                EpisodeBuffer(
                    id=seed,
                    seed=seed,
                    observations={
                        key: column if isinstance(column[0], str) else np.stack(column)
                        for key, column in columns.items()
                    },
                    actions=np.stack([actions.sample() for _ in range(4)]),
                    rewards=[0.25, 0.5, 0.75, 1.0],
                    terminations=[False, False, False, True],
                    truncations=[False] * 4,
                    infos={"success": np.arange(5) == 4},
                )
            )
        return minari.create_dataset_from_buffers(
            "test/env-v0", buffers, observation_space=space, action_space=actions, **options
        )

    return record


def boxes(**shapes):
    from gymnasium.spaces import Box

    return {
        key: Box(0, 255, shape, np.uint8) if len(shape) == 3 else Box(-1, 1, shape, np.float64)
        for key, shape in shapes.items()
    }


@pytest.mark.filterwarnings("ignore")
def test_import_minari_reads_what_minari_wrote(tmp_path, recorded):
    dataset = recorded(boxes(front=(16, 16, 3), wrist=(16, 16, 3), joints=(3,), goal=(2,)), jpeg_encoding=False)
    with pytest.raises(ValueError, match=r"no instruction; give one \(--instruction\)"):
        import_minari("test/env-v0", tmp_path / "s")
    labels = Labels(instruction="go", state_keys=("joints", "goal"))
    store = import_minari("test/env-v0", tmp_path / "s", labels=labels)
    assert store.index[0][:3] == ("test/env-v0", True, "import") and [info.seed for info in store.index] == [0, 1, 2]
    for stored, theirs in zip(store, dataset, strict=True):
        np.testing.assert_array_equal(stored.observations["image_front"], theirs.observations["front"])
        np.testing.assert_array_equal(stored.observations["image_wrist"], theirs.observations["wrist"])
        state = np.concatenate([theirs.observations["joints"], theirs.observations["goal"]], axis=1)
        np.testing.assert_array_equal(stored.observations["state"], state.astype(np.float32))
        assert stored.actions.tobytes() == theirs.actions.tobytes()
        assert stored.rewards.tobytes() == theirs.rewards.astype(np.float64).tobytes()
        assert stored.terminations.tolist() == theirs.terminations.tolist()
    with pytest.raises(ValueError, match="no observation 'goals'; it has"):
        import_minari("test/env-v0", tmp_path / "t", labels=Labels(instruction="go", state_keys=("goals",)))


@pytest.mark.filterwarnings("ignore")
def test_import_minari_decodes_jpeg_as_minari_does(tmp_path, recorded):
    from gymnasium.spaces import Text

    dataset = recorded(boxes(front=(16, 16, 3)) | {"mission": Text(8, min_length=3, charset="abc")})
    store = import_minari("test/env-v0", tmp_path / "s")
    for stored, theirs in zip(store, dataset, strict=True):
        np.testing.assert_array_equal(stored.observations["image"], theirs.observations["front"])
        assert stored.instruction == theirs.observations["mission"][0]
    assert [int(stored.observations["task_id"][0]) for stored in store] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["arrow", "parquet"])
@pytest.mark.parametrize("jpeg", [False, True])
def test_import_minari_reads_arrow_and_parquet(tmp_path, monkeypatch, form, jpeg):
    minari = pytest.importorskip("minari")
    pytest.importorskip("pyarrow")
    pillow = pytest.importorskip("PIL.Image")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    episodes = [make_episode(number, steps=4 + number, size=32) for number in range(2)]
    space = spaces.Dict(
        {"image": spaces.Box(0, 255, (32, 32, 3), np.uint8), "state": spaces.Box(-9, 9, (3,), np.float32)}
    )
    minari.create_dataset_from_buffers(
        "test/columns-v0",
        buffer=[
            EpisodeBuffer(
                id=number,
                seed=number + 7,
                observations={key: episode.observations[key] for key in space},
                actions=episode.actions,
                rewards=episode.rewards,
                terminations=episode.terminations,
                truncations=episode.truncations,
                infos={"success": np.arange(len(episode.actions) + 1) == len(episode.actions) * number},
            )
            for number, episode in enumerate(episodes)
        ],
        observation_space=space,
        action_space=spaces.Box(-1, 1, (4,), np.float32),
        data_format=form,
        jpeg_encoding=jpeg,
    )
    store = import_minari("test/columns-v0", tmp_path / "s", labels=Labels(instruction="go"))
    for number, episode in enumerate(episodes):
        back = store[number]
        for name in ("actions", "rewards", "terminations", "truncations"):
            assert getattr(back, name).tobytes() == getattr(episode, name).tobytes()
        assert (back.success, back.seed, back.task) == (True, number + 7, "test/columns-v0")
        assert back.infos["success"].tolist() == [t == len(back.actions) * number for t in range(len(back.actions) + 1)]
        assert back.observations["state"].tobytes() == episode.observations["state"].tobytes()
        if jpeg:
            for mine, frame in zip(back.observations["image"], episode.observations["image"], strict=True):
                buffer = io.BytesIO()
                pillow.fromarray(frame).save(buffer, "JPEG")  # what Minari does
                np.testing.assert_array_equal(mine, np.asarray(pillow.open(buffer)))
        else:
            np.testing.assert_array_equal(back.observations["image"], episode.observations["image"])
    metadata = tmp_path / "minari" / "test" / "columns-v0" / "data" / "metadata.json"
    content = json.loads(metadata.read_text())
    del content["action_space"]  # Minari would now make an environment
    metadata.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="notes no action_space, which Arrow and Parquet"):
        import_minari("test/columns-v0", tmp_path / "t", labels=Labels(instruction="go"))
    assert not (tmp_path / "t").exists()


def test_columns_that_are_hostile_are_refused(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    box = json.dumps({"type": "Box", "dtype": "float32", "shape": [2], "low": [-1, -1], "high": [1, 1]})
    data = tmp_path / "bad" / "data"
    (data / "0").mkdir(parents=True)
    (data / "0" / "metadata.json").write_text("{}")

    def write(form, rows=3, **options):
        for path in (data / "0").glob("part-0.*"):
            path.unlink()
        metadata = {"total_episodes": 1, "data_format": form, "observation_space": box, "action_space": box}
        (data / "metadata.json").write_text(json.dumps(metadata))
        pairs = pa.FixedSizeListArray.from_arrays(np.zeros(2 * rows, np.float32), 2)
        columns = {"observations": pairs, "actions": pairs, "rewards": np.zeros(rows)}
        columns |= {name: np.zeros(rows, bool) for name in ("terminations", "truncations")}
        table, path = pa.table(columns), data / "0" / f"part-0.{form}"
        if form == "parquet":
            pq.write_table(table, path, **options)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, **options) as writer:
                writer.write_table(table)
        return path

    def render(arrays):
        return np.zeros((len(arrays["observations"]), 8, 8, 3), np.uint8)

    def attempt():
        return import_minari(tmp_path / "bad", tmp_path / "s", labels=LABELS, render=render, overwrite=True)

    for form in ("arrow", "parquet"):
        write(form)
        assert attempt()[0].observations["state"].shape == (3, 2)
    for compression in ("lz4", "zstd"):
        write("arrow", 10**6, options=pa.ipc.IpcWriteOptions(compression=compression))
        with pytest.raises(UnsafeFileError, match="compressed"):
            attempt()
    write("parquet", 10**6, compression="brotli", use_dictionary=False)
    with monkeypatch.context() as patch, pytest.raises(UnsafeFileError, match="claims"):
        patch.setattr("vla_rl.data.parquet.MAX_COMPRESSION", 900)  # this one packs 1,119 bytes into one
        attempt()
    offsets, astray = (np.array([0, middle, 4, 6], np.int32).tobytes() for middle in (2, 1 << 30))
    for column, told in ((pa.array([[0.0, 0.0]] * 3), "part-0"), (pa.array([[{"x": 1.0}]] * 3), "expected 3 times")):
        path = data / "0" / "part-0.arrow"
        path.unlink(missing_ok=True)
        write("arrow")
        with pa.OSFile(str(path), "wb") as sink:
            table = pa.table({"observations": column, "actions": column, "rewards": np.zeros(3)})
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_batch(table.to_batches()[0])
        assert told != "part-0" or offsets in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(offsets, astray))
        with pytest.raises(ValueError, match=told):
            attempt()
    for form in ("arrow", "parquet"):
        path = write(form)
        content = path.read_bytes()
        for size in (0, 7, 100, len(content) // 2, len(content) - 20):
            path.write_bytes(content[:size])
            if form == "parquet" or size < len(content) // 2:
                with pytest.raises(ValueError, match="part-0"):
                    attempt()
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
        with pytest.raises(UnsafeFileError, match="leaves"):
            attempt()


def test_import_minari_renders_states(tmp_path, recorded):
    dataset = recorded(boxes(joints=(3,)))
    labels = Labels(task="reach", instruction="go", success_key="success")
    with pytest.raises(ValueError, match=r"no pictures, only \['joints'\].*--render"):
        import_minari("test/env-v0", tmp_path / "s", labels=labels)

    def render(arrays):
        brightness = (arrays["observations/joints"][:, :1] * 100 + 100).astype(np.uint8)
        return np.broadcast_to(brightness[:, :, None, None], (5, 8, 8, 3))

    store = import_minari("test/env-v0", tmp_path / "s", labels=labels, render=render)
    expected = (dataset[1].observations["joints"][:, 0] * 100 + 100).astype(np.uint8)
    np.testing.assert_array_equal(store[1].observations["image"][:, 3, 3, 2], expected)


def plain(root, count=1, **arrays):
    """A hand-made Minari data set."""
    (root / "data").mkdir(parents=True)
    (root / "data" / "metadata.json").write_text(json.dumps({"total_episodes": count, "data_format": "hdf5"}))
    file = h5py.File(root / "data" / "main_data.hdf5", "w")
    for number in range(count):
        group = file.create_group(f"episode_{number}")
        fields = {
            "observations": np.zeros((4, 8, 8, 3), np.uint8), "actions": np.zeros((3, 2), np.float32),
            "rewards": np.zeros(3), "terminations": np.zeros(3, bool), "truncations": np.arange(3) == 2,
        }  # fmt: skip
        for name, array in {**fields, **arrays}.items():
            group[name] = array
    return file


def test_what_rounding_and_guessing_there_is_is_said(tmp_path):
    plain(tmp_path / "a", actions=np.full((3, 2), 0.1)).close()
    with pytest.warns(UserWarning, match="actions of float64 were rounded to float32"):
        store = import_minari(tmp_path / "a", tmp_path / "s", labels=LABELS)
    assert store[0].observations["image"].shape == (4, 8, 8, 3) and store.index[0].task == "reach"
    with pytest.raises(ValueError, match="does not say whether it succeeded"):
        import_minari(tmp_path / "a", tmp_path / "t", labels=Labels(instruction="go"))
    plain(tmp_path / "b", actions=np.zeros(3, np.int64)).close()
    with pytest.raises(ValueError, match=r"'int64 \[3\]'\}, and metadata.json notes no action_space"):
        import_minari(tmp_path / "b", tmp_path / "t", labels=LABELS)
    plain(tmp_path / "c", rewards=np.zeros(5)).close()
    with pytest.raises(ValueError, match="rewards has length 5"):
        import_minari(tmp_path / "c", tmp_path / "t", labels=LABELS)
    with pytest.raises(FileNotFoundError, match="minari download nobody/nothing-v0"):
        import_minari("nobody/nothing-v0", tmp_path / "t", labels=LABELS)
    assert not (tmp_path / "t").exists()


def soft(file):
    del file["episode_0"]
    file["episode_0"] = h5py.SoftLink("/somewhere")


def outside(file):
    del file["episode_0"]
    file["episode_0"] = h5py.ExternalLink("../../secret.hdf5", "/episode_0")


def inner(file):
    file["episode_0/infos/x"] = h5py.ExternalLink("../../secret.hdf5", "/episode_0/actions")


def passwd(file):
    file.create_dataset("episode_0/infos/x", (4,), "u1", external=[("/etc/passwd", 0, 4)])


def virtual(file):
    layout = h5py.VirtualLayout((3, 2), "f4")
    layout[...] = h5py.VirtualSource("../../secret.hdf5", "/episode_0/actions", (3, 2))
    del file["episode_0/actions"]
    file["episode_0"].create_virtual_dataset("actions", layout)


def bomb(file):
    del file["episode_0/observations"]
    file.create_dataset("episode_0/observations", (1 << 20, 1024, 1024, 3), "u1", chunks=(1, 1024, 1024, 3))


def jpeg_bomb(file):
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(data, "JPEG")
    frame = np.frombuffer(data.getvalue(), np.uint8)
    del file["episode_0/observations"]
    file.create_dataset("episode_0/observations", data=np.tile(frame, (100, 1)), compression="gzip")


def pickled(file):
    file["episode_0"].attrs["task"] = np.void(b"\x80\x04cos\nsystem\n")
    file["episode_0"].attrs["instruction"] = "x" * 20_000


@pytest.mark.parametrize("harm", [soft, outside, inner, passwd, virtual, bomb, jpeg_bomb, pickled])
def test_a_hostile_data_set_is_refused_before_it_is_read(tmp_path, harm):
    plain(tmp_path / "secret").close()
    (tmp_path / "secret/data/main_data.hdf5").rename(tmp_path / "secret.hdf5")
    with plain(tmp_path / "bad") as file:
        harm(file)
    expected = UnsafeFileError if harm is not soft else ValueError
    with pytest.raises(expected):
        import_minari(tmp_path / "bad", tmp_path / "s", labels=LABELS)
    assert not (tmp_path / "s").exists()


def test_metadata_that_name_an_environment_make_none(tmp_path):
    plain(tmp_path / "bad").close()
    spec = json.dumps({"id": "Evil-v0", "entry_point": "vla_rl.nothing:Evil"})
    (tmp_path / "bad/data/metadata.json").write_text(json.dumps({"total_episodes": 1, "env_spec": spec}))
    assert len(import_minari(tmp_path / "bad", tmp_path / "s", labels=LABELS)) == 1
    for text in (
        "",
        "[]",
        "{}",
        '{"total_episodes": -1}',
        '{"total_episodes": 1, "data_format": "zarr"}',
        "[" * 99999,
    ):
        (tmp_path / "bad/data/metadata.json").write_text(text)
        with pytest.raises(ValueError, match="not that of a Minari data set"):
            import_minari(tmp_path / "bad", tmp_path / "t", labels=LABELS)


def check_demo(demo, episode):
    assert demo.attrs["num_samples"] == 6
    for key, array in episode.observations.items():
        np.testing.assert_array_equal(demo[f"obs/{key}"][()], array[:-1])
        np.testing.assert_array_equal(demo[f"next_obs/{key}"][()], array[1:])
    assert demo["actions"][()].tobytes() == episode.actions.tobytes()
    assert demo["rewards"][()].tobytes() == episode.rewards.tobytes()
    assert demo["dones"][()].tolist() == [0, 0, 0, 0, 0, 1]


def test_export_robomimic_is_a_view_that_moves_with_the_store(tmp_path, store, monkeypatch):
    out = export_robomimic(store, tmp_path / "views" / "demos.hdf5")
    frames = sum(episode.observations["image"].nbytes for episode in store)
    with h5py.File(out) as file:
        assert file["data/demo_0/obs/image"].is_virtual
        assert sum(dataset.id.get_storage_size() for dataset in file["data/demo_0/obs"].values()) == 0 < frames
    new = tmp_path / "elsewhere"
    new.mkdir()
    out.parent.rename(new / "views")
    store.path.rename(new / "demos")
    monkeypatch.chdir("/")
    moved = EpisodeStore(new / "demos", "r")
    with h5py.File(new / "views" / "demos.hdf5") as file:
        assert json.loads(file["data"].attrs["env_args"])["env_name"] == "vla_rl"
        assert file["data"].attrs["total"] == 24
        assert file["mask/drawer-open"][()].tolist() == [b"demo_0", b"demo_1", b"demo_2", b"demo_3"]
        for number, episode in enumerate(moved):
            check_demo(file[f"data/demo_{number}"], episode)


def test_robomimic_there_and_back(tmp_path, store):
    out = export_robomimic(store, tmp_path / "alone.hdf5", materialize=True, where="index > 0")
    with h5py.File(out) as file:
        for number in range(3):
            check_demo(file[f"data/demo_{number}"], store[number + 1])
            assert not file[f"data/demo_{number}/obs/image"].is_virtual
    back = import_robomimic(out, tmp_path / "back")
    for stored, number in zip(back, (1, 2, 3), strict=True):
        expected = store[number]
        expected.infos = {}
        assert_equal(stored, expected)
    export_robomimic(store, tmp_path / "view.hdf5")
    with pytest.raises(UnsafeFileError, match="lies in other files"):
        import_robomimic(tmp_path / "view.hdf5", tmp_path / "never")
    with pytest.raises(ValueError, match="not of robomimic"):
        import_robomimic(store.path / "data" / "main_data.hdf5", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_import_robomimic_of_a_file_in_their_way(tmp_path):
    """As robomimic's own dataset_states_to_obs writes it, without attributes of ours."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "lift.hdf5", "w") as file:
        for number in (0, 2, 10):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["model_file"] = "<mujoco/>"
            demo["actions"] = rng.uniform(-1, 1, (3, 7))
            demo["rewards"] = [0.0, 0.0, float(number > 0)]
            demo["dones"] = [0, 0, int(number == 2)]
            demo["states"] = rng.normal(size=(3, 5))
            demo["obs/agentview_image"] = rng.integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
            demo["obs/robot0_eef_pos"] = rng.normal(size=(3, 3)).astype(np.float32)
        first = file["data/demo_2"]
        actions, pictures = first["actions"][()], first["obs/agentview_image"][()]
    with pytest.warns(UserWarning, match="rounded"):
        store = import_robomimic(tmp_path / "lift.hdf5", tmp_path / "s", labels=Labels(instruction="lift the cube"))
    assert [info.success for info in store.index] == [False, True, True]
    episode = store[1]
    np.testing.assert_array_equal(episode.actions, actions.astype(np.float32))
    np.testing.assert_array_equal(episode.observations["image"], np.concatenate([pictures, pictures[-1:]]))
    assert episode.observations["state"].shape == (4, 3) and episode.infos["states"].shape == (4, 5)
    assert [bool(stored.terminations[-1]) for stored in store] == [False, True, False]
    assert [bool(stored.truncations[-1]) for stored in store] == [True, False, True]
    assert (episode.task, episode.source) == ("lift", "import")


def test_robomimics_own_loader_reads_both_exports(tmp_path, store):
    observations = pytest.importorskip("robomimic.utils.obs_utils")
    dataset = pytest.importorskip("robomimic.utils.dataset")
    observations.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": ["state"], "rgb": ["image"]}})
    for materialize in (False, True):
        path = export_robomimic(store, tmp_path / f"{materialize}.hdf5", materialize=materialize)
        loaded = dataset.SequenceDataset(
            hdf5_path=str(path),
            obs_keys=("state", "image"),
            dataset_keys=("actions", "rewards", "dones"),
            load_next_obs=True,
            hdf5_cache_mode=None,
        )
        assert (len(loaded), loaded.n_demos) == (24, 4)
        for number, episode in enumerate(store):
            for step in range(6):
                row = loaded[6 * number + step]
                assert row["actions"][0].tobytes() == episode.actions[step].tobytes()
                assert row["rewards"][0] == episode.rewards[step]
                np.testing.assert_array_equal(row["obs"]["image"][0], episode.observations["image"][step])
                np.testing.assert_array_equal(row["next_obs"]["state"][0], episode.observations["state"][step + 1])
