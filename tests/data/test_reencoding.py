"""Features beside the episodes: what the encoder gives, the same after any kill, and none of another encoder."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
import torch
from episode_maker import make_episode

sys.path.append(str(Path(__file__).parents[1] / "outside"))

from outside_encoder import PatchEncoder

from vla_rl.cli import main
from vla_rl.data import EpisodeStore, UnsafeFileError, feature_groups, read_features, reencode, verify
from vla_rl.file_lock import WriterLock


@pytest.fixture(scope="module")
def encoder():
    return tiny.tiny_encoder()


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "demos")


def make_store(path, episodes=3):
    with EpisodeStore(path, "w-") as store:
        for number in range(episodes):
            store.append(make_episode(number, steps=4 + number, size=32, instruction=tiny.INSTRUCTIONS[number % 3]))
    return store


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_features_are_what_the_encoder_gives(store, encoder):
    episodes = contents(store.path / "data" / "episodes")
    calls = []
    group = reencode(store.path, encoder, batch_size=2, progress=lambda *call: calls.append(call))
    assert (group.fingerprint, group.episodes) == (encoder.fingerprint, 3) and calls == [(1, 3), (2, 3), (3, 3)]
    for index in range(3):
        tokens, mask = read_features(store, index, encoder.fingerprint)
        episode = store[index]
        for step in range(episode.total_steps + 1):
            expected = encoder.encode(episode.observations["image"][step][None], [episode.instruction])
            np.testing.assert_allclose(tokens[step], expected.tokens[0].numpy(), atol=2e-3)
            np.testing.assert_array_equal(mask[step], expected.mask[0].numpy())
    assert tokens.dtype == np.float16
    steps = np.array([5, 0, 5])
    some, some_mask = read_features(store, 2, encoder.fingerprint, steps=steps)
    np.testing.assert_array_equal(some, tokens[steps])
    np.testing.assert_array_equal(some_mask, mask[steps])
    with pytest.raises(IndexError, match=r"in \[0, 6\], got \[7\]"):
        read_features(store, 2, encoder.fingerprint, steps=np.array([7]))
    assert contents(store.path / "data" / "episodes") == episodes


def test_cameras_of_two_sizes_are_named(tmp_path, encoder):
    front, wrist = np.zeros((5, 32, 32, 3), np.uint8), np.zeros((5, 16, 16, 3), np.uint8)
    with EpisodeStore(tmp_path / "two") as store:
        episode = make_episode(0, steps=4, size=32)
        rest = {key: array for key, array in episode.observations.items() if key != "image"}
        store.append(replace(episode, observations={**rest, "image_front": front, "image_wrist": wrist}))
    said = r"share one size .*'image_front': \[32, 32, 3\], 'image_wrist': \[16, 16, 3\]\}; record .* one image_size"
    with pytest.raises(ValueError, match=said):
        reencode(tmp_path / "two", encoder)


def test_a_second_call_computes_only_what_is_new(store, encoder):
    reencode(store.path, encoder)
    before = encoder.num_frames
    reencode(store.path, encoder)
    assert encoder.num_frames == before
    with EpisodeStore(store.path) as longer:
        longer.append(make_episode(9, steps=5, size=32, instruction=tiny.INSTRUCTIONS[0]))
    assert reencode(store.path, encoder).episodes == 4
    assert encoder.num_frames == before + 6


def test_features_that_would_fill_the_memory_or_lie_elsewhere_are_refused(store, encoder, tmp_path):
    reencode(store.path, encoder)
    path = store.path / "data" / "features" / encoder.fingerprint / "000000.hdf5"
    with h5py.File(path, "r+") as file:
        file.create_dataset("bomb", (6, 1 << 20, 400), np.float16, chunks=(1, 1 << 10, 400))
    with pytest.raises(UnsafeFileError, match="claims"):
        read_features(store, 0, encoder.fingerprint)
    with h5py.File(path, "r+") as file:
        del file["bomb"]
        file.move("tokens", "kept")
        file["tokens"] = h5py.ExternalLink("000001.hdf5", "/tokens")
    with pytest.raises(UnsafeFileError, match="link"):
        read_features(store, 0, encoder.fingerprint)
    path.rename(tmp_path / "outside.hdf5")
    path.symlink_to(tmp_path / "outside.hdf5")
    with pytest.raises(UnsafeFileError, match="leaves"):
        read_features(store, 0, encoder.fingerprint)


def test_two_cameras_are_encoded_as_samplers_stack_them(tmp_path, encoder):
    one, two = make_episode(0, size=32), make_episode(1, size=32)
    one.observations |= {"image_wrist": two.observations["image"], "image_front": one.observations.pop("image")}
    with EpisodeStore(tmp_path / "two") as store:
        store.append(one)
    reencode(store.path, encoder, batch_size=6)
    views = np.stack([one.observations["image_front"], one.observations["image_wrist"]], axis=1)
    expected = encoder.encode(views, [one.instruction] * 6)
    tokens, _ = read_features(store, 0, encoder.fingerprint)
    np.testing.assert_array_equal(tokens, expected.tokens.numpy())


def test_shards_keep_the_features_of_their_own_episodes(tmp_path, encoder):
    shards = [make_store(tmp_path / "all" / f"{rank}", 1 + rank) for rank in range(2)]
    everything = EpisodeStore(tmp_path / "all", "r")
    assert reencode(everything.path, encoder).episodes == len(everything) == 3
    tokens, _ = read_features(everything, 2, encoder.fingerprint)
    np.testing.assert_array_equal(tokens, read_features(shards[1], 1, encoder.fingerprint)[0])
    assert [group.episodes for shard in shards for group in feature_groups(shard)] == [1, 2]


def test_only_features_of_this_encoder_and_this_episode_are_given(store, encoder):
    other = tiny.tiny_encoder(seed=1)
    reencode(store.path, encoder)
    assert read_features(store, 0, other.fingerprint) is None
    reencode(store.path, other)
    assert {group.fingerprint for group in feature_groups(store)} == {encoder.fingerprint, other.fingerprint}
    assert not np.array_equal(
        read_features(store, 0, encoder.fingerprint)[0], read_features(store, 0, other.fingerprint)[0]
    )
    folder = store.path / "data" / "features" / other.fingerprint
    right = (folder / "000000.hdf5").read_bytes()
    shutil.copy(folder / "000001.hdf5", folder / "000000.hdf5")
    assert read_features(store, 0, other.fingerprint) is None
    reencode(store.path, other, drop_stale=True)
    assert (folder / "000000.hdf5").read_bytes() == right
    assert [group.fingerprint for group in feature_groups(store)] == [other.fingerprint]
    with pytest.raises(ValueError, match="no fingerprint"):
        read_features(store, 0, "../../elsewhere")


def test_a_broken_off_call_leaves_whole_episodes_and_ends_bit_equal(tmp_path, store, encoder):
    whole = make_store(tmp_path / "whole")
    reencode(whole.path, encoder, batch_size=3)

    class Failing:
        fingerprint, calls = encoder.fingerprint, 0

        def encode(self, images, instructions):
            self.calls += 1
            if self.calls == 4:
                raise RuntimeError("out of memory")
            return encoder.encode(images, instructions)

    with pytest.raises(RuntimeError, match="out of memory"):
        reencode(store.path, Failing(), batch_size=3)
    folder = store.path / "data" / "features" / encoder.fingerprint
    assert [path.name for path in folder.iterdir()] == ["000000.hdf5"]
    (folder / "000001.hdf5").write_bytes((folder / "000000.hdf5").read_bytes()[:5000])
    reencode(store.path, encoder, batch_size=3)
    assert contents(folder) == contents(whole.path / "data" / "features" / encoder.fingerprint)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_forward_pass_it_ends_bit_equal(tmp_path, encoder):
    killed, whole = make_store(tmp_path / "killed", 6), make_store(tmp_path / "whole", 6)
    encoder.save_pretrained(tmp_path / "encoder")
    code = """
        import os, signal, sys
        import torch
        from vla_rl.data import reencode
        from vla_rl.encoders import FrozenVLMEncoder
        torch.set_num_threads(1)
        encoder = FrozenVLMEncoder.from_pretrained(sys.argv[2])
        encode, calls = encoder.encode, 0
        def counted(*args):
            global calls
            calls += 1
            if calls == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*args)
        encoder.encode = counted
        reencode(sys.argv[1], encoder, batch_size=4)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(killed.path), str(tmp_path / "encoder")]
    assert (
        subprocess.run(command, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    )
    name = encoder.fingerprint
    left = sorted(path.name for path in (killed.path / "data" / "features" / name).iterdir())
    assert left == ["000000.hdf5", "000001.hdf5.tmp"]
    assert read_features(killed, 1, name) is None
    reencode(killed.path, encoder, batch_size=4)
    reencode(whole.path, encoder, batch_size=4)
    assert contents(killed.path / "data" / "features") == contents(whole.path / "data" / "features")


def test_a_bfloat16_encoder_loses_nothing(store, encoder):
    class Wide:
        fingerprint = "wide"

        def encode(self, images, instructions):
            features = encoder.encode(images, instructions)
            return features.to(dtype=torch.bfloat16)

    reencode(store.path, Wide())
    tokens, _ = read_features(store, 0, "wide")
    episode = store[0]
    expected = encoder.encode(episode.observations["image"], [episode.instruction] * 5).tokens.to(torch.bfloat16)
    assert tokens.dtype == np.float32 and torch.equal(torch.from_numpy(tokens), expected.float())


def test_misuse_says_what_to_do(store, encoder, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        reencode(store.path, encoder, batch_size=0)
    with pytest.raises(FileNotFoundError, match="no episode store"):
        reencode(tmp_path / "nothing", encoder)
    lock = WriterLock(store.path)
    with pytest.raises(BlockingIOError, match="another writer"):
        reencode(store.path, encoder)
    lock.release()
    assert feature_groups(store) == []


def test_on_the_command_line(store, tmp_path, capsys):
    policy = tiny.tiny_policy(seed=2)
    policy.save_pretrained(tmp_path / "policy")
    reencode(store.path, tiny.tiny_encoder(seed=3))
    words = ["data", "re-encode", str(store.path), "--encoder", str(tmp_path / "policy"), "--drop-stale"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"3 episodes of encoder {policy.encoder.fingerprint}" in lines[0] and lines[1].startswith("dropped the feat")
    assert [group.episodes for group in feature_groups(store)] == [3]
    assert Path(store.path / "data" / "features" / policy.encoder.fingerprint).is_dir()


def test_an_own_encoder_re_encodes_on_the_command_line(store, tmp_path, capsys):
    own = PatchEncoder()
    own.save_pretrained(tmp_path / "own")
    assert main(["data", "re-encode", str(store.path), "--encoder", str(tmp_path / "own")]) == 0
    assert f"3 episodes of encoder {own.fingerprint}" in capsys.readouterr().out


def test_verify_reads_features_and_names_what_is_wrong_with_them(store, encoder, tmp_path):
    def found():
        return [finding for finding in verify(store.path).findings if "features" in finding.file]

    reencode(store.path, encoder, batch_size=2)
    assert found() == []
    folder = store.path / "data" / "features" / encoder.fingerprint

    def flip(file):
        tokens = file["tokens"][()]
        tokens[2, 1, 3] += 1
        file["tokens"][...] = tokens

    def poison(file):
        file["tokens"][1, 0, 0] = np.nan

    def shorten(file):
        del file["mask"]
        file["mask"] = np.ones((2, 2), dtype=bool)

    def disguise(file):
        file.attrs["fingerprint"] = "other"

    def link(file):
        del file["tokens"]
        file["tokens"] = h5py.ExternalLink(str(tmp_path / "elsewhere.hdf5"), "/tokens")

    for change, severity, message in (
        (flip, "error", "tokens have checksum"),
        (poison, "error", "NaN"),
        (shorten, "error", "mask is bool [2, 2], expected bool"),
        (link, "error", "damaged"),
        (disguise, "warning", "its fingerprint is not that of the episode"),
    ):
        target = folder / "000001.hdf5"
        whole = target.read_bytes()
        with h5py.File(target, "r+") as file:
            change(file)
        (finding,) = found()
        assert (finding.severity, finding.file) == (severity, target.relative_to(store.path).as_posix())
        assert message in finding.message
        target.write_bytes(whole)
    (folder / "000001.hdf5").write_bytes(whole[: len(whole) // 2])
    (folder / "000009.hdf5").write_bytes(whole)
    damaged, spare = found()
    assert damaged.severity == "error" and spare.message == "it belongs to no episode; delete it"
