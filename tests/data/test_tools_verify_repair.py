"""verify finds what we broke, and repair brings back every episode that we left whole."""

import json
import os
import shutil

import h5py
import numpy as np
import pytest
from episode_maker import assert_equal, make_episode

from vla_rl.data import EpisodeStore, repair, verify


def episode(number, **changes):
    return make_episode(number, **{"infos": {}, **changes})


@pytest.fixture
def root(tmp_path):
    with EpisodeStore(tmp_path / "demos") as store:
        for number in range(5):
            store.append(episode(number), extras={"features": np.ones(3)})
    return tmp_path / "demos"


def path(root, number):
    return root / "data" / "episodes" / f"{number:06d}.hdf5"


def messages(root):
    return [f"{finding.severity} {finding.file}: {finding.message}" for finding in verify(root).findings]


def contents(root):
    return {file: (file.read_bytes(), file.stat().st_ino) for file in sorted(root.rglob("*")) if file.is_file()}


def check_repaired(result, numbers):
    with EpisodeStore(result.path, mode="a") as store:
        assert result.kept == len(store) == len(numbers)
        for stored, number in zip(store, numbers, strict=True):
            assert_equal(stored, episode(number))
        assert store.append(episode(9)) == len(numbers)
    assert verify(result.path).findings == []
    minari = pytest.importorskip("minari")
    dataset = minari.MinariDataset(result.path / "data")
    assert [int(e["seed"]) for e in dataset.storage.get_episode_metadata(range(len(numbers) + 1))] == [*numbers, 9]
    assert dataset.id == f"{result.path.name}-v0"


def test_a_whole_store_has_no_findings_and_every_array_its_checksum(root):
    result = verify(root)
    assert (result.episodes, result.findings) == (5, [])
    assert result.checksums == result.arrays == 5 * 8
    before = contents(root)
    done = repair(root)
    assert (done.path, done.kept, done.lost) == (None, 5, [])
    assert contents(root) == before and not root.with_name("demos-repaired").exists()


def test_the_store_is_whole_while_a_writer_has_it_open(root):
    with EpisodeStore(root) as store:
        store.append(episode(5))
        assert verify(root).findings == []
        with pytest.raises(BlockingIOError):
            repair(root)


def test_one_flipped_bit_of_a_picture_is_found(root):
    raw = bytearray(path(root, 3).read_bytes())
    at = raw.index(episode(3).observations["image"][2].tobytes())
    raw[at + 50] ^= 1
    path(root, 3).write_bytes(raw)
    assert len(EpisodeStore(root, "r")) == 5  # nothing else would notice
    (message,) = messages(root)
    assert message.startswith("error data/episodes/000003.hdf5: 'observations/image' has checksum")
    done = repair(root)
    assert [finding.file for finding in done.lost] == ["data/episodes/000003.hdf5"]
    assert done.renumbered == {3: 4}
    check_repaired(done, [0, 1, 2, 4])


def test_episodes_without_checksums_are_fine(root):
    with h5py.File(path(root, 1), "r+") as file:
        found = []
        file.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
        for dataset in found:
            del dataset.attrs["crc32"]
    result = verify(root)
    assert result.checksums == result.arrays - 8
    assert not any("checksum" in finding.message for finding in result.findings)


def edit(root, number, change):
    """Changes an episode file by hand, and notes its new size as the store would."""
    with h5py.File(path(root, number), "r+") as file:
        change(file[f"episode_{number}"])
    lines = (root / "data" / "episodes.jsonl").read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), "num_bytes": path(root, number).stat().st_size})
    (root / "data" / "episodes.jsonl").write_text("\n".join(lines) + "\n")


def put(name, array, **options):
    def change(group):
        if name in group:
            del group[name]
        if options:
            group.create_dataset(name, data=array, **options)
        else:
            group[name] = array

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put("actions", np.full((5, 4), np.nan, np.float32)), "error .*actions holds NaN"),
        (put("actions", np.full((5, 4), 3, np.float32)), r"warning .*actions reach 3, outside \[-1, 1\]"),
        (put("rewards", np.zeros(4)), "error .*rewards has length 4"),
        (put("observations/state", np.zeros((6, 3))), "error .*must be float32"),
        (put("observations/state", np.zeros((6, 7), np.float32)), "error .*its steps hold"),
        (put("observations/task_id", np.full(6, -1)), "error .*negative"),
        (
            put("observations/image", np.zeros((6, 8, 8, 3), np.uint8), chunks=(2, 8, 8, 3)),
            "error .*several frames per chunk",
        ),
        (put("observations/image", np.zeros((6, 8, 8, 3), np.uint8)), "warning .*all of one colour"),
        (put("infos/success", np.arange(6) == 4), "error .*success is False, but infos/success is true at step 4"),
        (put("infos/force", np.full(6, np.inf)), "warning .*'force' holds NaN or infinite"),
        (put("terminations", np.arange(5) == 1), "warning .*ends at step 1 but goes on to step 4"),
        (lambda group: group.attrs.__setitem__("total_steps", 6), "error .*total_steps is 6, but there are 5"),
        (lambda group: group.attrs.__setitem__("task", 3), "error .*attribute 'task' is"),
        (lambda group: group.attrs.__delitem__("success"), "error .*success"),
        (lambda group: group.attrs.__setitem__("id", 4), "error .*the attribute id is 4"),
        (lambda group: group.attrs.__setitem__("task", "door"), "error .*line 3 says task 'drawer-open', not 'door'"),
        (put("actions", h5py.SoftLink("/episode_2/rewards")), "error .*link to something else"),
        (put("actions", h5py.ExternalLink("000001.hdf5", "/episode_1/actions")), "error .*link to something else"),
        (lambda group: group.__setitem__("infos/loop", group), "error .*deeper than"),
        (
            lambda group: group.create_dataset("extras/bomb", (1 << 40,), "u1", chunks=(1 << 20,)),
            "error .*claims 1,099,511,627,776 bytes but 0 are stored",
        ),
        (
            lambda group: group.create_dataset("extras/bomb", (1 << 40,), "u1", chunks=(1 << 20,), compression="gzip"),
            "error .*claims",
        ),
        (
            lambda group: group.create_dataset("extras/raw", (4,), "u1", external=[("/etc/passwd", 0, 4)]),
            "error .*lies in other files",
        ),
    ],
)
def test_verify_names_what_is_wrong_with_an_episode(root, change, expected):
    edit(root, 2, change)
    found = messages(root)
    assert [message for message in found if __import__("re").match(expected, message)], found
    assert not any("000001" in message or "000003" in message for message in found)


def test_verify_compares_the_records_with_the_files(root):
    data = root / "data"
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        del file["episode_1"]
        file["episode_1"] = h5py.ExternalLink("episodes/000002.hdf5", "/episode_2")
    (data / "metadata.json").write_text((data / "metadata.json").read_text().replace("25,", "26,", 1))
    (data / "episodes" / "000005.hdf5.tmp").write_bytes(b"half")
    path(root, 0).unlink()
    found = "\n".join(messages(root))
    for expected in (
        "error data/main_data.hdf5: 'episode_1' does not link to",
        "error data/metadata.json: total_steps is 26, but the files hold 20",
        "error data/metadata.json: total_episodes is 5, but the files hold 4",
        "error data/episodes/000000.hdf5: the file is missing",
        "warning data/episodes/000005.hdf5.tmp: no file of the store",
    ):
        assert expected in found
    check_repaired(repair(root), [1, 2, 3, 4])


def test_a_link_of_a_kind_that_hdf5_does_not_know_is_told(root):
    links = root / "data" / "main_data.hdf5"
    content = bytearray(links.read_bytes())
    kind = content.rindex(0x40, 0, content.index(b"episode_0"))  # 64 is an external link, 65 a program's own
    content[kind] += 1
    links.write_bytes(content)
    assert any("main_data.hdf5: cannot be read (Unknown link type" in message for message in messages(root))


@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5", "episodes.jsonl"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99, None])
def test_records_cut_anywhere_or_lost_cost_no_episode(root, name, share):
    file = root / "data" / name
    if share is None:
        file.unlink()
    else:
        os.truncate(file, int(share * file.stat().st_size))
    before = contents(root)
    done = repair(root)
    if done.path is None:  # an index that lacks lines is what a killed writer leaves; the next writer completes it
        assert name == "episodes.jsonl"
        return
    assert done.lost == [] and done.original == root
    assert {key: value for key, value in contents(root).items() if key.name != "writer.lock"} == {
        key: value for key, value in before.items() if key.name != "writer.lock"
    }
    check_repaired(done, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("number", [0, 2, 4])
def test_an_episode_cut_anywhere_costs_that_episode_only(root, tmp_path, number):
    size = path(root, number).stat().st_size
    for cut in [0, 1, 100, *np.random.default_rng(number).integers(0, size, 6), size - 1]:
        broken = tmp_path / "broken"
        shutil.copytree(root, broken)
        os.truncate(path(broken, number), int(cut))
        with pytest.raises(ValueError, match="restore it from a copy"):
            EpisodeStore(broken)
        done = repair(broken, tmp_path / "fixed", overwrite=True)
        assert [finding.file for finding in done.lost] == [f"data/episodes/{number:06d}.hdf5"]
        check_repaired(done, [n for n in range(5) if n != number])
        assert path(broken, number).stat().st_size == cut
        shutil.rmtree(broken)


def test_a_finished_episode_that_never_got_its_name_is_recovered(root):
    path(root, 4).rename(path(root, 4).with_suffix(".hdf5.tmp"))
    done = repair(root)
    assert done.lost == []
    check_repaired(done, [0, 1, 2, 3, 4])


def test_episodes_of_another_shape_do_not_get_into_the_repaired_store(root, tmp_path):
    with EpisodeStore(tmp_path / "other") as store:
        store.append(episode(0, size=16))
    shutil.copyfile(path(tmp_path / "other", 0), path(root, 0))
    done = repair(root)
    assert "most episodes" in done.lost[0].message
    check_repaired(done, [1, 2, 3, 4])


def test_in_place_puts_the_damaged_store_aside(root):
    os.truncate(path(root, 1), 1000)
    before = {file.relative_to(root): data for file, data in contents(root).items()}
    done = repair(root, in_place=True)
    assert done.path == root and done.original == root.with_name("demos-damaged")
    assert {f.relative_to(done.original): data for f, data in contents(done.original).items()} == before
    check_repaired(done, [0, 2, 3, 4])
    assert {f.relative_to(done.original): data for f, data in contents(done.original).items()} == before


def test_repair_replaces_nothing_unasked_and_says_when_nothing_is_left(root, tmp_path):
    os.truncate(path(root, 1), 1000)
    root.with_name("demos-repaired").mkdir()
    with pytest.raises(FileExistsError, match="--overwrite"):
        repair(root)
    with pytest.raises(ValueError, match="--in-place"):
        repair(root, root, overwrite=True)
    with pytest.raises(ValueError, match="not both"):
        repair(root, tmp_path / "out", in_place=True)
    for number in range(5):
        os.truncate(path(root, number), 1000)
    with pytest.raises(ValueError, match="not one complete episode"):
        repair(root, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no folder 'data'"):
        repair(tmp_path / "nothing")
