"""Tools on a full disk or without permission: one sentence, nothing left behind, and the source as it was."""

import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest
import tiny
from episode_maker import make_episode

from vla_rl.data import (
    EpisodeStore,
    export_lerobot,
    export_minari,
    export_robomimic,
    filter_episodes,
    merge,
    pack,
    play,
    reencode,
    relabel,
    repair,
    split,
    writing,
)

Usage = namedtuple("Usage", "total used free")


def damaged(store):
    """Merged twice, so that it is a store of its own, and one file less."""
    root = store.path.parent / "damaged"
    merge([store.path, store.path], root)
    (root / "data" / "episodes" / "000001.hdf5").unlink()
    return root


TOOLS = {
    "merge": lambda store, out: merge([store.path, store.path], out),
    "split": lambda store, out: split(store.path, out, fraction=0.5),
    "filter": lambda store, out: filter_episodes(store.path, out, where="success"),
    "relabel": lambda store, out: relabel(store.path, out, task="new"),
    "pack": lambda store, out: pack(store.path, out, images="png"),
    "play": lambda store, out: play(store, out.with_suffix(".png"), [0]),
    "export minari": export_minari,
    "export robomimic": lambda store, out: export_robomimic(store, out.with_suffix(".hdf5"), materialize=True),
    "export lerobot": lambda store, out: export_lerobot(store, out, fps=20),
    "re-encode": lambda store, out: reencode(store.path, tiny.tiny_encoder()),
    "repair": lambda store, out: repair(store.path.parent / "damaged", out),
}
SMALL = {"play", "repair"}  # a picture; and second names of files that are there


@pytest.fixture
def store(tmp_path):
    with EpisodeStore(tmp_path / "home" / "demos") as store:
        for number in range(4):
            store.append(make_episode(number, size=32, instruction=tiny.INSTRUCTIONS[0]))
    damaged(store)
    return EpisodeStore(store.path, mode="r")


def contents(root):
    """Every file but the lock, which a reader of features may have made."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "writer.lock")
    return {path.relative_to(root): path.read_bytes() for path in files}


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool not in SMALL])
def test_a_full_disk_is_noticed_before_it_is_full(tmp_path, store, monkeypatch, tool):
    before = contents(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"cannot write .*it needs .* MB and the disk has 0.0 MB left; free some space"):
        TOOLS[tool](store, tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "choose a folder")])
@pytest.mark.parametrize("tool", TOOLS)
def test_what_the_system_refuses_is_told_in_a_sentence(tmp_path, store, monkeypatch, tool, number, advice):
    before = contents(tmp_path)

    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writing.os, "rename", refused)
    monkeypatch.setattr(writing.os, "replace", refused)
    with pytest.raises(OSError, match=rf"cannot write '.*', {os.strerror(number)}: {advice}"):
        TOOLS[tool](store, tmp_path / "out")
    assert contents(tmp_path) == before
    assert [path for path in Path(tmp_path).iterdir() if path.name != "home"] == []
