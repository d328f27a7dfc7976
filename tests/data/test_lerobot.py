"""LeRobotDataset v3, there and back, against its description, its own reader where installed, and hostile files."""

import io
import json
import shutil

import h5py
import numpy as np
import pytest
from episode_maker import assert_equal, make_episode

from vla_rl.data import EpisodeStore, Labels, UnsafeFileError, export_lerobot, import_lerobot, lerobot_layout, verify
from vla_rl.data.lerobot_statistics import array_stats, image_stats, merge_stats

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
SENTENCES = ("open the drawer", "close the drawer")


def smooth(number, steps):
    """Pictures that a video codec can keep, unlike noise; every frame differs from the others."""
    y, x = np.mgrid[:32, :48]
    frames = [
        np.stack([128 + 100 * np.sin(x / 9 + step + number), 128 + 100 * np.cos(y / 7 - step), 2 * x + 2 * y], axis=-1)
        for step in range(steps)
    ]
    return np.array(frames).astype(np.uint8)


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    with EpisodeStore(tmp_path / "demos") as store:
        for number in range(4):
            steps = 4 + number
            ended = np.arange(steps) == steps - 1
            episode = make_episode(
                number,
                steps=steps,
                task_id=number % 2,
                instruction=SENTENCES[number % 2],
                task=f"task-{number % 2}",
                seed=None if number == 3 else number,
                terminations=ended & (number != 1),
                truncations=ended & (number > 0),
                infos={
                    "success": (np.arange(steps + 1) >= 2 + number) & bool(number % 2),
                    "force": rng.normal(size=(steps + 1, 2, 3)),
                },
            )
            image = smooth(number, steps + 1)
            episode.observations |= {"image_front": image, "image_wrist": image[:, ::-1].copy()}
            del episode.observations["image"]
            episode.observations["one"] = rng.normal(size=(steps + 1, 1)).astype(np.float32)
            episode.observations["number"] = rng.integers(0, 99, steps + 1).astype(np.int32)
            store.append(episode, extras={"features": np.zeros(3)})
    return store


def table(path):
    """All rows of the parquet files below a folder."""
    return pa.concat_tables([pq.read_table(file) for file in sorted(path.rglob("*.parquet"))])


def psnr(first, second):
    return 10 * np.log10(255**2 / np.square(first.astype(float) - second).mean())


def test_png_comes_back_bit_by_bit(tmp_path, store):
    out = export_lerobot(store, tmp_path / "set")
    back = import_lerobot(out, tmp_path / "back")
    assert len(back) == 4
    for first, second in zip(store, back, strict=True):
        assert_equal(first, second)
    assert verify(back.path).findings == []
    with pytest.raises(FileExistsError):
        export_lerobot(store, out)


def test_videos_keep_all_but_the_last_digit_of_pictures(tmp_path, store):
    pytest.importorskip("av")
    out = export_lerobot(store, tmp_path / "set", video=True, where="index != 2")
    back = import_lerobot(out, tmp_path / "back")
    for stored, number in zip(back, (0, 1, 3), strict=True):
        expected = store[number]
        for key in ("image_front", "image_wrist"):
            pictures, truth = stored.observations.pop(key), expected.observations.pop(key)
            assert min(psnr(*pair) for pair in zip(pictures[:-1], truth[:-1], strict=True)) > 30
            np.testing.assert_array_equal(pictures[-1], truth[-1])
        assert_equal(expected, stored)


def test_videos_of_an_episode_of_one_step(tmp_path):
    """An encoder that looks ahead has written nothing yet when such an episode ends."""
    pytest.importorskip("av")
    with EpisodeStore(tmp_path / "demos") as store:
        store.append(make_episode(1, steps=1))
        out = export_lerobot(store, tmp_path / "set", video=True)
        back = import_lerobot(out, tmp_path / "back")
        assert len(back) == 1 and back[0].total_steps == 1
        assert back[0].observations["image"].shape == store[0].observations["image"].shape


def test_the_tables_say_what_the_format_asks_for(tmp_path, store, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(lerobot_layout, "DATA_MEGABYTES", 0)
    monkeypatch.setattr(lerobot_layout, "FILES_PER_CHUNK", 2)
    out = export_lerobot(store, tmp_path / "set", fps=10)
    info = json.loads((out / "meta/info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"]) == ("v3.0", 4, 22)
    assert (info["total_tasks"], info["fps"], info["splits"]) == (2, 10, {"train": "0:4"})
    tasks = pq.read_table(out / "meta/tasks.parquet")
    assert dict(zip(tasks["task"].to_pylist(), tasks["task_index"].to_pylist(), strict=True)) == {
        SENTENCES[0]: 0, SENTENCES[1]: 1
    }  # fmt: skip
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    rows = table(out / "data")
    assert set(rows.column_names) == set(info["features"])
    assert rows["index"].to_pylist() == list(range(22))
    meta = table(out / "meta" / "episodes").to_pylist()
    start = 0
    for number, (episode, row) in enumerate(zip(store, meta, strict=True)):
        steps = episode.total_steps
        assert (row["episode_index"], row["length"], row["tasks"]) == (number, steps, [episode.instruction])
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (start, start + steps)
        assert (row["success"], row["seed"], row["task"]) == (episode.success, episode.seed, episode.task)
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        assert list(place.values()) == [number // 2, number % 2]
        assert pq.read_metadata(out / info["data_path"].format(**place)).num_rows == steps
        part = rows.slice(start, steps)
        start += steps
        assert part["episode_index"].to_pylist() == [number] * steps
        assert part["frame_index"].to_pylist() == list(range(steps))
        np.testing.assert_allclose(part["timestamp"].to_pylist(), np.arange(steps) / 10, rtol=1e-6)
        assert part["task_index"].to_pylist() == [number % 2] * steps
        assert np.array(part["action"].to_pylist(), np.float32).tobytes() == episode.actions.tobytes()
        assert np.array(part["next.reward"].to_pylist()).tobytes() == episode.rewards.tobytes()
        assert part["next.done"].to_pylist() == [False] * (steps - 1) + [True]
        assert part["next.success"].to_pylist() == episode.infos["success"][1:].tolist()
        assert part["observation.number"].to_pylist() == episode.observations["number"][:-1].tolist()
        picture = Image.open(io.BytesIO(part["observation.images.wrist"][1].as_py()["bytes"]))
        np.testing.assert_array_equal(picture, episode.observations["image_wrist"][1])
    for key, feature in info["features"].items():
        if feature["dtype"] != "image":
            cell = rows[key][0].as_py()
            assert np.shape(cell) == (tuple(feature["shape"]) if feature["shape"] != [1] else ()), key
    assert info["features"]["observation.images.front"]["shape"] == [32, 48, 3]
    assert info["features"]["info.force"] == {"dtype": "float64", "shape": [2, 3], "names": None}
    back = import_lerobot(out, tmp_path / "back")
    assert_equal(back[3], store[3])


def test_statistics_are_those_of_all_steps(tmp_path, store):
    found = json.loads((export_lerobot(store, tmp_path / "set") / "meta/stats.json").read_text())
    actions = np.concatenate([episode.actions for episode in store]).astype(np.float64)
    pixels = np.concatenate([episode.observations["image_front"][:-1] for episode in store]) / 255
    for key, truth, axes, shape in (
        ("action", actions, 0, (4,)), ("observation.images.front", pixels, (0, 1, 2), (3, 1, 1))
    ):  # fmt: skip
        assert found[key]["count"] == [22]
        for name in ("min", "max", "mean", "std"):
            assert np.shape(found[key][name]) == shape
            np.testing.assert_allclose(np.ravel(found[key][name]), getattr(truth, name)(axis=axes), rtol=1e-9)
    one = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    assert array_stats(one)["q10"] == pytest.approx([0.4]) and array_stats(one)["mean"].shape == (1,)
    merged = merge_stats([array_stats(one), array_stats(one[:1])])
    assert merged["q50"] == pytest.approx([(5 * 2 + 0) / 6]) and merged["count"].tolist() == [6]
    picture = np.zeros((1, 10, 10, 3), np.uint8)
    picture[0, :2] = 255
    assert image_stats(picture)["q90"].ravel().tolist() == [1, 1, 1] and image_stats(picture)["q50"][0, 0, 0] == 0


def plain(root, **changes):
    """A data set as other programs write it: float32 rewards, no file of ours; one block of rows for two episodes."""
    root.mkdir()
    out, store = root / "set", root / "store"
    with EpisodeStore(store) as made:
        for number in range(2):
            episode = make_episode(number, steps=3 + number, infos={}, instruction=SENTENCES[number])
            made.append(episode)
    export_lerobot(made, out)
    (out / "meta/vla_rl.hdf5").unlink()
    path = out / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(path).drop_columns(["next.terminated", "next.truncated", "task_id"])
    for key, column in changes.items():
        name = key.replace("__", ".")
        rows = (
            rows.drop_columns([name])
            if column is None
            else rows.set_column(rows.column_names.index(name), name, column)
        )
    pq.write_table(rows, path)
    meta = out / "meta/episodes/chunk-000/file-000.parquet"
    columns = pq.read_table(meta)
    pq.write_table(columns.drop_columns(list(lerobot_layout.ATTRIBUTES)), meta)
    info = json.loads((out / "meta/info.json").read_text())
    info["features"] = {key: feature for key, feature in info["features"].items() if key in rows.column_names}
    (out / "meta/info.json").write_text(json.dumps(info))
    return out, made


def test_a_data_set_that_knows_less_is_told_the_rest(tmp_path):
    reward = pa.array(np.arange(7, dtype=np.float32))
    done = pa.array([False, False, True, False, False, False, False])
    out, made = plain(tmp_path / "a", next__reward=reward, next__done=done)
    back = import_lerobot(out, tmp_path / "s")
    assert [info[:3] for info in back.index] == [
        (SENTENCES[0], False, "import"), (SENTENCES[1], True, "import")
    ]  # fmt: skip
    for stored, truth in zip(back, made, strict=True):
        images = truth.observations["image"]
        np.testing.assert_array_equal(stored.observations["image"], np.concatenate([images[:-1], images[-2:-1]]))
        np.testing.assert_array_equal(stored.observations["state"][:-1], truth.observations["state"][:-1])
        assert stored.actions.tobytes() == truth.actions.tobytes()
    assert back[1].rewards.tolist() == [3, 4, 5, 6]
    assert back[0].terminations.tolist() == [False, False, True] and not back[0].truncations.any()
    assert back[1].truncations.tolist() == [False, False, False, True] and not back[1].terminations.any()
    assert [int(stored.observations["task_id"][0]) for stored in back] == [0, 1]
    labelled = import_lerobot(out, tmp_path / "t", labels=Labels(task="drawer", source="robot"))
    assert {info.task for info in labelled.index} == {"drawer"} and labelled.index[0].source == "robot"
    out, _ = plain(tmp_path / "b", next__success=None, next__reward=None)
    with pytest.raises(ValueError, match="does not say whether it succeeded"):
        import_lerobot(out, tmp_path / "u")
    assert import_lerobot(out, tmp_path / "u", labels=Labels(success=True))[0].return_ == 0


def test_cameras_called_as_liberos(tmp_path):
    with EpisodeStore(tmp_path / "demos") as store:
        episode = make_episode(0)
        episode.observations["image_wrist"] = episode.observations["image"][:, ::-1].copy()
        store.append(episode)
    out = export_lerobot(store, tmp_path / "a", fps=10)
    (out / lerobot_layout.LAST).unlink()
    rename(out, {"observation.image": "observation.images.image"})
    rename(out, {"observation.images.wrist": "observation.images.wrist_image"})
    back = import_lerobot(out, tmp_path / "b")[0]
    assert back.image_keys == ("image", "image_wrist_image")
    for ours, theirs in (("image", "image"), ("image_wrist_image", "image_wrist")):
        np.testing.assert_array_equal(back.observations[ours][:-1], episode.observations[theirs][:-1])
    rename(out, {"observation.images.wrist_image": "observation.image"})
    with pytest.raises(ValueError, match=r"two features would both be the observation 'image'; rename 'observation\."):
        import_lerobot(out, tmp_path / "c")


def rename(out, names):
    """Rename features of a data set."""
    path, info = out / "data/chunk-000/file-000.parquet", json.loads((out / "meta/info.json").read_text())
    rows = pq.read_table(path)
    pq.write_table(rows.rename_columns([names.get(name, name) for name in rows.column_names]), path)
    edit(out, features={names.get(name, name): feature for name, feature in info["features"].items()})


def edit(out, **changes):
    path = out / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def outside(out):
    shutil.copy(out / "data/chunk-000/file-000.parquet", out.parent / "secret.parquet")
    edit(out, data_path="../secret.parquet")


def absolute(out):
    shutil.copy(out / "data/chunk-000/file-000.parquet", out.parent / "secret.parquet")
    edit(out, data_path=str(out.parent / "secret.parquet"))


def linked(out):
    path = out / "data/chunk-000/file-000.parquet"
    shutil.move(path, out.parent / "secret.parquet")
    path.symlink_to(out.parent / "secret.parquet")


def template(out):
    edit(out, data_path="{chunk_index.__class__}/{chunk_index:0999999999d}")


def shape_bomb(out):
    info = json.loads((out / "meta/info.json").read_text())
    info["features"]["action"]["shape"] = [1 << 30]
    edit(out, features=info["features"])


def row_bomb(out):
    path = out / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(path).drop_columns(["observation.image"])
    many = rows.take(np.zeros(2_000_000, np.int64))
    pq.write_table(many, path, compression="zstd")
    info = json.loads((out / "meta/info.json").read_text())
    del info["features"]["observation.image"]
    edit(out, features=info["features"])


def picture_bomb(out):
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (9000, 9000)).save(data, "JPEG")
    path = out / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(path)
    cells = pa.array([{"bytes": data.getvalue()[:40_000], "path": "x"}] * rows.num_rows, rows["observation.image"].type)
    pq.write_table(rows.set_column(rows.column_names.index("observation.image"), "observation.image", cells), path)


def elsewhere(out):
    path = out / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(path)
    cells = pa.array([{"bytes": None, "path": "/etc/passwd"}] * rows.num_rows, rows["observation.image"].type)
    pq.write_table(rows.set_column(rows.column_names.index("observation.image"), "observation.image", cells), path)


def cut(out):
    path = out / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:2000])


def shorter(out):
    path = out / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 6), path)


def older(out):
    edit(out, codebase_version="v2.1")


def nonsense(out):
    (out / "meta/info.json").write_text("[" * 99999)


HARMS = {
    outside: "leaves",
    absolute: "leaves",
    linked: "leaves",
    template: "is missing",
    shape_bomb: "far more",
    row_bomb: "far more",
    picture_bomb: "decoded",
    elsewhere: "lie elsewhere",
    cut: "no parquet file",
    shorter: "has 3 rows",
    older: "only v3",
    nonsense: "is not JSON",
}


@pytest.mark.parametrize(("harm", "expected"), HARMS.items())
def test_a_hostile_data_set_is_refused(tmp_path, harm, expected):
    out, _ = plain(tmp_path / "a")
    harm(out)
    unsafe = expected in ("leaves", "far more", "decoded")
    error = UnsafeFileError if unsafe else (FileNotFoundError if expected == "is missing" else ValueError)
    with pytest.raises(error, match=expected):
        import_lerobot(out, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_video_that_is_something_else_is_refused(tmp_path, store):
    av = pytest.importorskip("av")
    out = export_lerobot(store, tmp_path / "set", video=True)
    path = out / "videos/observation.images.front/chunk-000/file-000.mp4"
    right = path.read_bytes()
    path.write_text(f"ffconcat version 1.0\nfile '{tmp_path}/secret.mp4'\n")
    with pytest.raises(ValueError, match="cannot read"):
        import_lerobot(out, tmp_path / "s")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(UnsafeFileError, match="frames of 64 x 64, expected 32 x 48"):
        import_lerobot(out, tmp_path / "s")
    path.write_bytes(right)
    meta = out / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(meta)
    name = "videos/observation.images.front/from_timestamp"
    pq.write_table(rows.set_column(rows.column_names.index(name), name, pa.array([0.0, 0.2, 0.45, 9.0])), meta)
    with pytest.raises(ValueError, match=r"no frame at 9\.000 s"):
        import_lerobot(out, tmp_path / "s")


def test_a_file_of_ours_that_no_longer_fits_is_done_without(tmp_path, store):
    out = export_lerobot(store, tmp_path / "set")
    with h5py.File(out / "meta/vla_rl.hdf5", "r+") as file:
        file["episode_1"].attrs["total_steps"] = 99
        del file["episode_2"]
    back = import_lerobot(out, tmp_path / "back")
    for number in (1, 2):
        images = store[number].observations["image_front"]
        np.testing.assert_array_equal(back[number].observations["image_front"][-2:], images[[-2, -2]])
    assert_equal(back[3], store[3])


def test_an_export_can_replace_an_earlier_one(tmp_path, store):
    out = export_lerobot(store, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite"):
        export_lerobot(store, out)
    again = export_lerobot(store, out, overwrite=True)
    assert len(import_lerobot(again, tmp_path / "back")) == len(store)


def test_misuse_says_what_to_do(tmp_path, store):
    with pytest.raises(ValueError, match="fits 'index > 99'"):
        export_lerobot(store, tmp_path / "set", where="index > 99")
    with pytest.raises(ValueError, match="fps must be at least 1"):
        export_lerobot(store, tmp_path / "set", fps=0)
    with pytest.raises(FileNotFoundError, match="hf download"):
        import_lerobot(tmp_path / "nothing", tmp_path / "s")
    with EpisodeStore(tmp_path / "odd") as odd:
        odd.append(make_episode(0, size=9))
    with pytest.raises(ValueError, match="videos need even sizes"):
        export_lerobot(odd, tmp_path / "set", video=True)
    with EpisodeStore(tmp_path / "mixed") as mixed:
        mixed.append(make_episode(0))
        mixed.append(make_episode(1, infos={}))
    with pytest.raises(ValueError, match="same infos together"):
        export_lerobot(mixed, tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos", "mixed", "odd"]


@pytest.mark.slow
@pytest.mark.parametrize("video", [False, True])
def test_lerobots_own_reader_reads_the_export(tmp_path, store, video, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    out = export_lerobot(store, tmp_path / "set", video=video)
    dataset = module.LeRobotDataset("me/demos", root=out)
    assert (dataset.meta.total_episodes, len(dataset)) == (4, 22)
    row = 0
    for number, episode in enumerate(store):
        assert dataset.meta.episodes[number]["success"] == episode.success
        for step in range(episode.total_steps):
            item = dataset[row]
            row += 1
            assert item["action"].numpy().tobytes() == episode.actions[step].tobytes()
            assert item["observation.state"].numpy().tobytes() == episode.observations["state"][step].tobytes()
            assert item["next.reward"].item() == np.float32(episode.rewards[step])
            assert item["task"] == episode.instruction
            picture = (item["observation.images.front"].permute(1, 2, 0).numpy() * 255).round()
            assert psnr(picture + 1e-6, episode.observations["image_front"][step]) > (30 if video else 90)
