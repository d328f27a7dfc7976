"""Pictures stored in other formats than raw: what comes back, who can read it, and what damage does."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.data.episode_maker import assert_equal, make_episode
from vla_rl.data import (
    BalancedSampler,
    Episode,
    EpisodeStore,
    ImageFormat,
    export_lerobot,
    export_minari,
    export_robomimic,
    import_minari,
    import_robomimic,
    merge,
    pack,
    repair,
    verify,
)
from vla_rl.data.encoded_frames import decode_frames
from vla_rl.data.image_formats import LOSSY, read_images


def hdf5(path: Path, mode: Any = "r") -> Any:
    """A file without h5py's types, which do not say what a name stands for."""
    return h5py.File(path, mode)


EXACT = [form for form in get_args(ImageFormat) if form not in LOSSY]
PACKED = [form for form in get_args(ImageFormat) if form != "raw"]


def smooth_episode(number: int = 0, *, steps: int = 5, cameras: tuple[str, ...] = ("image",)) -> Episode:
    """Pictures that a camera could have taken, so that lossy formats keep them: a square that moves over a slope."""
    episode = make_episode(number, steps=steps, success=True)
    slope = np.linspace(40, 200, 32)[:, None, None] + np.zeros((32, 48, 3))
    del episode.observations["image"]
    for k, camera in enumerate(cameras):
        images = np.repeat(slope[None], steps + 1, 0)
        for t in range(steps + 1):
            images[t, 8:16, 4 + 4 * t : 12 + 4 * t] = (220, 30 + 60 * k, 40 + 9 * number)
        episode.observations[camera] = images.astype(np.uint8)
    return episode


@pytest.fixture
def raw(tmp_path: Path) -> EpisodeStore:
    with EpisodeStore(tmp_path / "raw") as store:
        for number in range(3):
            store.append(
                smooth_episode(number, steps=4 + number), extras={"log_probs": np.arange(4 + number, dtype=np.float32)}
            )
    return EpisodeStore(tmp_path / "raw", mode="r")


@pytest.mark.parametrize("form", EXACT)
def test_exact_formats_give_back_every_bit(raw: EpisodeStore, tmp_path: Path, form: Any) -> None:
    packed = pack(raw.path, tmp_path / "packed", images=form)
    for index, episode in enumerate(raw):
        assert_equal(packed[index], episode)
        assert np.array_equal(packed.read_extras(index)["log_probs"], raw.read_extras(index)["log_probs"])
    assert verify(packed.path).findings == []
    assert [info._replace(num_bytes=0) for info in packed.index] == [
        info._replace(num_bytes=0, images=form) for info in raw.index
    ]


@pytest.mark.parametrize("form", LOSSY)
def test_lossy_formats_come_close_and_keep_the_order_of_frames(raw: EpisodeStore, tmp_path: Path, form: Any) -> None:
    packed = pack(raw.path, tmp_path / "packed", images=form)
    for index, episode in enumerate(raw):
        mine, theirs = packed[index].observations.pop("image"), episode.observations.pop("image")
        distance = np.abs(mine[:, None].astype(float) - theirs[None]).mean((2, 3, 4))
        assert (distance.argmin(1) == np.arange(len(mine))).all() and distance.diagonal().max() < 6
        assert np.array_equal(packed[index].actions, episode.actions)
    assert verify(packed.path).findings == []


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("max_ram_bytes", [0, 10**9], ids=["from disk", "from RAM"])
def test_samplers_draw_single_frames_of_packed_stores(
    raw: EpisodeStore, tmp_path: Path, form: Any, max_ram_bytes: int
) -> None:
    packed = pack(raw.path, tmp_path / "packed", images=form)
    sampler = BalancedSampler([raw, packed], batch_size=64, seed=0, max_ram_bytes=max_ram_bytes)
    assert sampler.images_in_ram == (max_ram_bytes > 0)
    ids = np.array([0, 14, 9, 3, 9, 17, 29, 20])  # the first three episodes are the raw ones, of 4 + 5 + 6 steps
    batch = sampler.rows(ids)
    for image, store, episode, step in zip(
        batch.images, batch.store_index, batch.episode_index, batch.step_index, strict=True
    ):
        expected = [raw, packed][store][int(episode)].observations["image"][step]
        assert np.array_equal(image, expected)
    observations, _ = packed.read_steps(2, [5, 0, 5])
    assert np.array_equal(observations["image"], packed[2].observations["image"][[5, 0, 5]])
    with pytest.raises(IndexError, match="steps must be"):
        packed.read_steps(2, [6])


def test_rows_of_encoded_pictures_are_those_of_an_array(raw: EpisodeStore, tmp_path: Path) -> None:
    expected = raw[2].observations["image"]
    packed = pack(raw.path, tmp_path / "packed", images="png")
    rows: Any
    with hdf5(packed.episode_path(2), "r") as file:
        image = file["episode_2/observations/image"]
        for rows in (None, slice(None), slice(-3, None), slice(4, 0, -2), slice(9, 2), [3, -1, 3], np.array([0]), []):
            wanted = slice(None) if rows is None else rows if isinstance(rows, slice) else np.asarray(rows, int)
            assert np.array_equal(read_images(image, rows), expected[wanted])
        for rows in ([len(expected)], [0, -len(expected) - 1]):
            with pytest.raises(IndexError, match=f"row {rows[-1]} is asked for, but there are {len(expected)}"):
                read_images(image, rows)


def test_others_read_the_frames_with_their_own_decoders(raw: EpisodeStore, tmp_path: Path) -> None:
    import hdf5plugin  # noqa: F401  registers zstd with HDF5

    expected = raw[1].observations["image"]
    form: Any
    for form in ("lzf", "zstd"):
        packed = pack(raw.path, tmp_path / form, images=form)
        with hdf5(packed.episode_path(1), "r") as file:
            assert np.array_equal(file["episode_1/observations/image"][()], expected)
    for form, name in (("png", "PNG"), ("webp", "WEBP")):
        packed = pack(raw.path, tmp_path / form, images=form)
        with hdf5(packed.episode_path(1), "r") as file:
            data, ends = file["episode_1/observations/image"][()], file["episode_1/frame_ends/image"][()]
        picture = Image.open(io.BytesIO(data[ends[1] : ends[2]].tobytes()))
        assert picture.format == name and np.array_equal(np.asarray(picture), expected[2])
    packed = pack(raw.path, tmp_path / "video", images="video")
    with hdf5(packed.episode_path(1), "r") as file:
        film = tmp_path / "film.mp4"
        film.write_bytes(file["episode_1/observations/image"][()].tobytes())
    import imageio.v3 as iio

    assert np.abs(iio.imread(film, plugin="FFMPEG").astype(float) - expected).mean() < 6


def test_unpacking_gives_the_first_store_again(raw: EpisodeStore, tmp_path: Path) -> None:
    packed = pack(raw.path, tmp_path / "packed", images="webp")
    back = pack(packed.path, tmp_path / "back", images="raw")
    for index in range(len(raw)):
        assert_equal(back[index], raw[index])
        assert back.index[index] == raw.index[index]  # its size, too


def test_one_store_may_hold_several_formats(tmp_path: Path) -> None:
    for number, form in enumerate(get_args(ImageFormat)):
        with EpisodeStore(tmp_path / "mixed", images=form) as store:
            store.append(smooth_episode(number, cameras=("image_front", "image_wrist")))
    mixed = EpisodeStore(tmp_path / "mixed", mode="r")
    expected = smooth_episode(2, cameras=("image_front", "image_wrist"))
    assert np.array_equal(mixed[2].observations["image_wrist"], expected.observations["image_wrist"])
    joined = merge([mixed.path, mixed.path], tmp_path / "joined")
    assert len(joined) == 14 and verify(joined.path).errors == []
    batch = BalancedSampler([joined], batch_size=64, seed=0, max_ram_bytes=0).sample()
    assert batch.images.shape == (64, 2, 32, 48, 3)
    (tmp_path / "joined/data/episodes/000003.hdf5").unlink()
    repaired = repair(tmp_path / "joined")
    assert repaired.kept == 13 and verify(tmp_path / "joined-repaired").errors == []


def test_exports_decode(raw: EpisodeStore, tmp_path: Path) -> None:
    import minari

    expected = raw[2].observations["image"]
    for form in ("zstd", "png"):
        packed = pack(raw.path, tmp_path / form, images=form)
        dataset = minari.MinariDataset(export_minari(packed, tmp_path / f"minari-{form}-v0") / "data")
        assert np.array_equal(dataset[2].observations["image"], expected)
        with pytest.raises(ValueError, match=f"stored as {form}, which a view does not decode; export with --mat"):
            export_robomimic(packed, tmp_path / f"{form}.hdf5")
        alone = export_robomimic(packed, tmp_path / f"{form}.hdf5", materialize=True)
        assert_equal(import_robomimic(alone, tmp_path / f"back-{form}")[2], _as_robomimic_keeps(raw[2]))
        assert export_lerobot(packed, tmp_path / f"lerobot-{form}", fps=20).is_dir()


def _as_robomimic_keeps(episode: Episode) -> Episode:
    episode.infos = {}
    return episode


def test_minari_refuses_what_it_would_misread(raw: EpisodeStore, tmp_path: Path) -> None:
    import minari

    for form in PACKED:
        packed = pack(raw.path, tmp_path / form, images=form)
        if form in ("lzf", "zstd"):
            dataset = minari.MinariDataset(packed.path / "data")
            assert np.array_equal(dataset[2].observations["image"], raw[2].observations["image"])
        else:
            with pytest.raises(KeyError, match="packed"):
                minari.MinariDataset(packed.path / "data")
            with pytest.raises(ValueError, match="store with packed pictures; read it as such, or pack it"):
                import_minari(packed.path, tmp_path / "imported")
    joined = merge([raw.path, tmp_path / "png"], tmp_path / "joined")
    assert [info.images for info in joined.index] == ["raw"] * 3 + ["png"] * 3
    with pytest.raises(KeyError, match="packed"):
        minari.MinariDataset(joined.path / "data")
    with EpisodeStore(tmp_path / "grows") as store:
        store.append(raw[0])
    with EpisodeStore(tmp_path / "grows", images="png") as store:
        assert len(minari.MinariDataset(store.path / "data")) == 1
        store.append(raw[1])
    with pytest.raises(KeyError, match="packed"):
        minari.MinariDataset(store.path / "data")


@pytest.mark.parametrize("form", get_args(ImageFormat))
def test_black_pictures_come_back_from_every_format(tmp_path: Path, form: Any) -> None:
    episode = smooth_episode(0, steps=40)
    episode.observations["image"] = np.zeros((41, 224, 224, 3), np.uint8)
    with EpisodeStore(tmp_path / "black", images=form) as store:
        store.append(episode)
    (tmp_path / "black/data/episodes.jsonl").unlink()  # the next reader takes all from the file
    again = EpisodeStore(tmp_path / "black", mode="r")
    assert not again[0].observations["image"].any()
    assert again.index[0].images == {"zstd": "png", "webp": "png"}.get(form, form)


def test_features_of_a_packed_store(raw: EpisodeStore, tmp_path: Path) -> None:
    from vla_rl.data import read_features, reencode
    from vla_rl.encoders import small_vlm

    encoder = small_vlm(["open the drawer"], image_size=32)
    packed = pack(raw.path, tmp_path / "packed", images="png")
    for store in (raw, packed):
        reencode(store.path, encoder)
    for index in range(len(raw)):
        ours, theirs = (read_features(store, index, encoder.fingerprint) for store in (packed, raw))
        assert ours is not None and theirs is not None and np.array_equal(ours[0], theirs[0])


def test_a_packed_file_that_is_cut_is_left_out_by_repair(raw: EpisodeStore, tmp_path: Path) -> None:
    packed = pack(raw.path, tmp_path / "packed", images="webp")
    path = packed.episode_path(1)
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        repaired = repair(packed.path, tmp_path / f"repaired-{share}")
        assert repaired.kept == 2 and repaired.path is not None
        assert [info.seed for info in EpisodeStore(repaired.path, mode="r").index] == [0, 2]


def test_small_pictures_get_smaller(raw: EpisodeStore, tmp_path: Path) -> None:
    before = sum(info.num_bytes for info in raw.index)
    for form in PACKED:
        packed = pack(raw.path, tmp_path / form, images=form)
        assert sum(info.num_bytes for info in packed.index) < before, form


def test_features_belong_to_pictures_whatever_their_format(raw: EpisodeStore, tmp_path: Path) -> None:
    from vla_rl.data.reencoding import origin

    def known(store: EpisodeStore) -> str:
        with store.open_episode(0) as group:
            return origin(group, "some-encoder")["pictures"]

    for form in PACKED:
        same = known(pack(raw.path, tmp_path / form, images=form)) == known(raw)
        assert same == (form not in LOSSY), form


def test_what_cannot_be_packed_leaves_nothing(raw: EpisodeStore, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="images must be one of raw, lzf, zstd, png, webp, jpeg, video, got 'gif'"):
        pack(raw.path, tmp_path / "packed", images="gif")  # type: ignore[arg-type]
    with EpisodeStore(tmp_path / "odd") as odd:
        odd.append(make_episode(0, size=9))
    with pytest.raises(ValueError, match="pictures are 9 x 9, but videos need even sizes"):
        pack(tmp_path / "odd", tmp_path / "packed", images="video")
    EpisodeStore(tmp_path / "empty").close()
    with pytest.raises(ValueError, match="holds no episodes"):
        pack(tmp_path / "empty", tmp_path / "packed", images="png")
    packed = pack(raw.path, tmp_path / "zstd", images="zstd")
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(ImportError, match=r'pip install "vla-rl\[archive\]"'):
        packed[0]
    with pytest.raises(ImportError, match=r'pip install "vla-rl\[archive\]"'):
        EpisodeStore(tmp_path / "packed", images="zstd")  # at once, not after a first episode
    with pytest.raises(ImportError, match=r'pip install "vla-rl\[archive\]"'):
        pack(raw.path, tmp_path / "packed", images="zstd")
    with pytest.raises(FileExistsError, match="--overwrite"):
        pack(raw.path, tmp_path / "zstd", images="png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "odd", "raw", "zstd"]


def test_a_format_that_changes_a_pixel_is_noticed(raw: EpisodeStore, tmp_path: Path, monkeypatch: Any) -> None:
    from vla_rl.data import image_formats

    original = image_formats.encode_frame

    def careless(image: np.ndarray, *args: Any, **options: Any) -> bytes:
        image = image.copy()
        image[0, 0, 0] ^= 1
        return original(image, *args, **options)

    monkeypatch.setattr(image_formats, "encode_frame", careless)
    with pytest.raises(ValueError, match="'image' of episode 0 does not come back from png as it was"):
        pack(raw.path, tmp_path / "packed", images="png")
    assert not (tmp_path / "packed").exists()


def _spoil(store: EpisodeStore, how: str) -> None:
    path = store.episode_path(0)
    size = path.stat().st_size
    with hdf5(path, "r+") as file:
        group = file["episode_0"]
        image = group["observations/image"]
        if how == "bytes":
            image[len(image) // 2 : len(image) // 2 + 8] = 0
        elif how == "encoding":
            image.attrs["encoding"] = "av3"
        elif how == "huge":
            image.attrs["shape"] = (2**20, 2**20, 2**20, 3)
        elif how == "many":
            image.attrs["shape"] = (2_500_000_000, 1, 1, 3)  # their numbers alone would take 20 GB
        elif how == "other size":
            image.attrs["shape"] = (image.attrs["shape"][0], 16, 16, 3)
        elif how == "no shape":
            del image.attrs["shape"]
        elif how == "short shape":
            image.attrs["shape"] = (5, 3)
        elif how == "more frames":
            image.attrs["shape"] = (image.attrs["shape"][0] + 1, *image.attrs["shape"][1:])
        elif how == "ends":
            ends = group["frame_ends/image"]
            ends[1] = 2**40
        elif how == "ends back":
            ends = group["frame_ends/image"]
            ends[0], ends[1] = ends[1], ends[0]
        elif how == "float ends":
            ends = group["frame_ends/image"][()].astype(float)
            del group["frame_ends/image"]
            group["frame_ends/image"] = ends
        elif how == "no ends":
            del group["frame_ends"]
        elif how == "another kind":
            image.attrs["encoding"] = "jpeg"
        elif how == "no bytes":
            attributes = dict(image.attrs)
            del group["observations/image"]
            group["observations/image"] = np.zeros(3)
            group["observations/image"].attrs.update(attributes)
    index = path.parents[1] / "episodes.jsonl"  # or the store would notice by the size alone
    index.write_text(index.read_text().replace(f'"num_bytes": {size},', f'"num_bytes": {path.stat().st_size},'))


DAMAGE = (
    "bytes", "encoding", "huge", "many", "other size", "no shape", "short shape", "more frames", "ends", "ends back",
    "float ends", "no ends", "another kind", "no bytes",
)  # fmt: skip


@pytest.mark.parametrize("form", ["png", "video"])
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_told_in_a_sentence(raw: EpisodeStore, tmp_path: Path, form: Any, how: str) -> None:
    if form == "video" and "ends" in how:
        pytest.skip("a video has no ends of frames")
    packed = pack(raw.path, tmp_path / "packed", images=form)
    _spoil(packed, how)
    errors = [finding for finding in verify(packed.path).findings if finding.file.endswith("000000.hdf5")]
    assert errors and errors[0].severity == "error"
    store = EpisodeStore(packed.path, mode="r")
    if form == "video" and how == "bytes":
        return  # a decoder may conceal it; the checksum does not
    with pytest.raises(ValueError, match=r"'.*000000.hdf5'"):
        store[0]
    if how != "bytes" and (form, how) != ("video", "more frames"):  # these do not touch the first frames
        with pytest.raises(ValueError, match=r"'.*000000.hdf5'"):
            BalancedSampler([packed], batch_size=4, seed=0, max_ram_bytes=0).rows(np.arange(4))


@pytest.mark.parametrize(("size", "count", "honest"), [((30_000, 30_000), 5, False), ((625, 600), 800, True)])
def test_a_bomb_is_refused_before_it_is_unpacked(
    raw: EpisodeStore, tmp_path: Path, size: tuple[int, int], count: int, honest: bool
) -> None:
    packed = pack(raw.path, tmp_path / "packed", images="png")
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "PNG")
    frames = [buffer.getvalue()] * count
    with hdf5(packed.episode_path(0), "r+") as file:
        attributes = dict(file["episode_0/observations/image"].attrs)
        del file["episode_0/observations/image"], file["episode_0/frame_ends/image"]
        file["episode_0/observations/image"] = np.frombuffer(b"".join(frames), np.uint8)
        file["episode_0/frame_ends/image"] = np.cumsum([len(frame) for frame in frames])
        file["episode_0/observations/image"].attrs.update(attributes)
        if honest:
            file["episode_0/observations/image"].attrs["shape"] = (count, *size[::-1], 3)
    (packed.path / "data/episodes.jsonl").unlink()  # or the size alone would give it away
    with pytest.raises(ValueError, match=r"forged|refused|pixels|has frames of"):
        EpisodeStore(packed.path, mode="r")
    with pytest.raises(ValueError, match=r"refused|pixels"):
        decode_frames(frames, "frames")
