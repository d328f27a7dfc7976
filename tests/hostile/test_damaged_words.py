"""Words in a heap of an HDF5 file: whatever is damaged on the way to them, the reader says so and comes back."""

import json
import os
import re
import resource
import struct
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))

from episode_maker import assert_equal, make_episode

from vla_rl.data import EpisodeStore
from vla_rl.data.foreign import flatten, read_attributes
from vla_rl.data.heaps import check_words
from vla_rl.data.safety import check_group
from vla_rl.data.verification import verify

SECONDS, MEMORY = 20, 1 << 30  # that reading a damaged file may take, beyond what the process has
TEXT = h5py.string_dtype()

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def in_a_fork(work):
    """What `work` returns or the words of its error, computed in a process that may hang or crash."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (used, used))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
            try:
                told = f"returned {work()}"
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
            os.write(write, told.encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        told = answer.read()
    return told or f"died with status {os.waitpid(pid, 0)[1]}"


def heap_of(content):
    assert content.count(b"GCOL") == 1
    return content.index(b"GCOL")


def pointer_of(content, name):
    """Where the pointer of an attribute with a single word lies: after its name, 24 bytes of type, 8 of space."""
    return content.index(name + b"\0") + len(name) + (8 - len(name) % 8) + 32


def size_of(number):
    """Where the size of an object lies, seen from the heap."""

    def find(content):
        at = heap_of(content) + 16
        while (found := struct.unpack_from("<H6xQ", content, at))[0] != number:
            at += 16 + -(-found[1] // 8) * 8
        return at + 8

    return find


DAMAGE = {
    "free room of no bytes": (size_of(0), bytes(8)),
    "free room of 2**64 - 1 bytes": (size_of(0), b"\xff" * 8),
    "an object of no bytes": (size_of(1), bytes(8)),
    "an object that swallows the next": (size_of(1), struct.pack("<Q", 70)),
    "an object of 2**63 bytes": (size_of(2), struct.pack("<Q", 1 << 63)),
    "a heap of no bytes": (lambda content: heap_of(content) + 8, bytes(8)),
    "a heap longer than the file": (lambda content: heap_of(content) + 8, b"\xff" * 8),
    "a heap one object long": (lambda content: heap_of(content) + 8, struct.pack("<Q", 24)),
    "no heap": (heap_of, b"COAL"),
    "a word of 4 GiB": (lambda content: pointer_of(content, b"task"), b"\xff" * 4),
    "a heap outside the file": (lambda content: pointer_of(content, b"task") + 4, b"\xff" * 8),
    "a heap elsewhere": (lambda content: pointer_of(content, b"task") + 4, struct.pack("<Q", 8)),
    "another object": (lambda content: pointer_of(content, b"task") + 12, struct.pack("<I", 77)),
    "an unknown type": (lambda content: pointer_of(content, b"task") - 31, b"\3"),
    "a longer name": (lambda content: pointer_of(content, b"task") - 44, b"\xff\xff"),
}


OTHERWISE = {"an unknown type": "an unknown type", "a longer name": ""}


@forks
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_episode_gets_a_sentence(tmp_path, what):
    root = tmp_path / "store"
    with EpisodeStore(root) as store:
        store.append(make_episode(0))
    path = store.episode_path(0)
    content = bytearray(path.read_bytes())
    find, value = DAMAGE[what]
    at = find(bytes(content))
    assert content[at : at + len(value)] != value
    content[at : at + len(value)] = value
    path.write_bytes(content)
    expected = OTHERWISE.get(what, "holds damaged text")
    told = in_a_fork(lambda: EpisodeStore(root, mode="r")[0].task)
    assert re.match(f"ValueError: .*000000.hdf5.*{expected}.*restore (it|the file) from a copy$", told), told
    found = in_a_fork(lambda: json.dumps([finding.message for finding in verify(root).errors]))
    assert re.match(f"returned .*no whole episode: .*{expected}", found), found


def every_damage(content, places):
    for at in places:
        for value in (*(bytes([content[at] ^ 1 << bit]) for bit in range(8)), b"\0", b"\xff", bytes(8), b"\xff" * 8):
            yield content[:at] + value + content[at + len(value) :]


@forks
@pytest.mark.slow
def test_every_byte_on_the_way_to_a_word(tmp_path):
    path = tmp_path / "words.hdf5"
    with h5py.File(path, "w") as file:
        group = file.create_group("episode_0")
        group.attrs["task"], group.attrs["list"] = "drawer", ["open", "the", ""]
        group["text"] = np.array([b"ab", b"cd"], dtype=object).astype(TEXT)
    good, heap = path.read_bytes(), heap_of(path.read_bytes())
    near = pointer_of(good, b"task")
    lists = good.index(b"list\0")
    places = [*range(heap, heap + 160), *range(near - 56, near + 16), *range(lists - 16, lists + 100)]
    with h5py.File(path) as file:
        start = file["episode_0/text"].id.get_offset()
    places += range(start, start + 32)

    def read():
        with h5py.File(path) as file:
            group = file["episode_0"]
            check_group(group)
            return dict(group.attrs), group["text"][()]

    def read_all(damaged):
        outcomes = {"read": 0, "told": 0}
        for content in damaged:
            path.write_bytes(content)
            try:
                read()
                outcomes["read"] += 1
            except (ValueError, OSError, RuntimeError, KeyError, TypeError):
                outcomes["told"] += 1
        return outcomes

    damaged = list(every_damage(good, places))
    for start in range(0, len(damaged), 400):  # for an h5py that raises leaves files open
        told = in_a_fork(lambda part=damaged[start : start + 400]: read_all(part))
        assert told.startswith("returned "), f"{start}: {told}"


def write_words(path, **options):
    """Groups and arrays with words of all kinds; returns how many bytes each has."""
    sizes = {}
    with h5py.File(path, "w", **options) as file:
        for name, count in (("few", 3), ("many", 30)):  # many lie elsewhere in newer files: not looked at one by one
            group = file.create_group(name, track_order=False)
            for number in range(count):
                group.attrs[f"word{number}"] = "wörd" * number
            dense = count > 8 and options
            sizes[name] = 0 if dense else sum(5 * number for number in range(count))
        file["few"].attrs["number"], file["few"].attrs["none"] = 3, h5py.Empty(TEXT)
        file["few"].attrs["list"] = ["a", "", "ccc"]
        sizes["few"] += 4
        file.create_dataset("chunked", data=["ab", "cde"], dtype=TEXT, chunks=(1,))
        file.create_dataset("compressed", data=["ab", "cde"], dtype=TEXT, compression="gzip")
        file.create_dataset("never", (5,), dtype=TEXT)
        file.create_dataset("long", data="x" * 100_000)
        frames = file.create_dataset("frames", (2, 2), dtype=h5py.vlen_dtype(np.uint8))
        frames[0, 1] = np.arange(9, dtype=np.uint8)
        floats = file.create_dataset("floats", (2,), dtype=h5py.vlen_dtype(np.float64))
        floats[1] = np.arange(9.0)
        file["numbers"] = np.arange(5)
        file["numbers"].attrs["reference"] = file["few"].ref
    return sizes | {"chunked": 5, "compressed": 0, "never": 0, "long": 100_000, "frames": 9, "floats": 72, "numbers": 0}


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}], ids=["old", "latest"])
def test_words_of_all_kinds_are_found(tmp_path, options):
    sizes = write_words(tmp_path / "words.hdf5", **options)
    with h5py.File(tmp_path / "words.hdf5") as file:
        assert {name: check_words(file[name], {}) for name in file} == sizes


def test_words_that_are_not_looked_at_one_by_one_lie_in_sound_heaps(tmp_path):
    path = tmp_path / "words.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("compressed", data=["ab", "cde"], dtype=TEXT, compression="gzip")
    content = bytearray(path.read_bytes())
    at = size_of(0)(bytes(content))
    content[at : at + 8] = bytes(8)
    path.write_bytes(content)
    with h5py.File(path) as file, pytest.raises(ValueError, match="'/compressed' holds damaged text"):
        check_words(file["compressed"], {})


@pytest.mark.parametrize("within", ["structure", "list"])
def test_words_within_structures_are_refused(tmp_path, within):
    inner = np.dtype([("word", TEXT), ("number", "i8")]) if within == "structure" else np.dtype((TEXT, (2,)))
    with h5py.File(tmp_path / "words.hdf5", "w") as file:
        if within == "list":
            file.create_group("item").attrs.create("words", np.array(["a", "b"], object), shape=(2,), dtype=inner)
        else:
            file.create_dataset("item", (2,), dtype=inner)
        with pytest.raises(ValueError, match="within structures"):
            check_words(file["item"], {})


@pytest.mark.parametrize(
    "words", ["", "öffne die Schublade", "抽屉を開け 🤖", "open " * 20_000], ids=["empty", "umlaut", "signs", "100 kB"]
)
def test_words_come_back(tmp_path, words):
    episode = make_episode(1, instruction=words or "open", policy_version=words)
    with EpisodeStore(tmp_path / "store") as store:
        store.append(episode)
    assert_equal(EpisodeStore(tmp_path / "store", mode="r")[0], episode)
    assert not verify(tmp_path / "store").findings


def test_a_foreign_episode_with_texts_and_frames_of_any_length_is_read(tmp_path):
    with h5py.File(tmp_path / "trace.h5", "w") as file:
        group = file.create_group("Trial0")
        group.attrs["task"] = "drawer"
        group.create_dataset("mission", data=["open it", "open it"], dtype=TEXT)
        group["actions"] = np.zeros((2, 4))
    with h5py.File(tmp_path / "trace.h5") as file:
        check_group(file["Trial0"])
        assert str(flatten(file["Trial0"])["mission"]) == "open it"
        assert read_attributes(file["Trial0"].attrs, "Trial0") == {"task": "drawer"}


def test_many_pointers_to_one_large_word_are_refused(tmp_path):
    path = tmp_path / "bomb.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("episode_0")
        group.create_dataset("text", data=["x" * 10_000] + [""] * 999, dtype=TEXT)
        start = group["text"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[start : start + 16_000] = content[start : start + 16] * 1000
    path.write_bytes(content)
    with h5py.File(path) as file:
        assert check_words(file["episode_0/text"], {}) == 10_000_000
        with pytest.raises(ValueError, match="more than the 1,000,000 allowed"):
            check_group(file["episode_0"], max_bytes=1_000_000)
