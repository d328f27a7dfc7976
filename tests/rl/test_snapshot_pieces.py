"""The large parts of a stage 1's snapshot: written newest first, as far as time and disk allow."""

import json
import time
from functools import partial

import torch
from safetensors.torch import load_file
from stopped_stages import SAC, act, names, same, same_episodes

from vla_rl.preemption import put_off_sigterm
from vla_rl.rl import snapshots as snapshots_module
from vla_rl.rl import stage1_sac
from vla_rl.rl.snapshots import write_tensors
from vla_rl.rl.stage1_sac import LatentMemory


def stored(folder):
    """What each of the newest snapshot's files holds, and what it lacks."""
    path = sorted(folder.glob("step*"))[-1]
    state = json.loads((path / "state.json").read_text())
    return {name: sum(piece["count"] for piece in pieces) for name, pieces in state["pieces"].items()}, state[
        "left_out"
    ]


def test_what_there_is_no_time_for_is_left_out_the_oldest_first(tmp_path, monkeypatch):
    """The same stage and SIGTERM, with a disk that takes .3 s for each piece, of which 4 fit."""
    act("sac", tmp_path / "whole", sigterm_at=36)
    whole, _ = stored(tmp_path / "whole")
    monkeypatch.setattr(stage1_sac, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(snapshots_module, "RESERVE", 0.5)
    monkeypatch.setattr(snapshots_module, "put_off_sigterm", partial(put_off_sigterm, until=2.5))
    original = snapshots_module.sync

    def slow(path):
        time.sleep(0.3 * path.name.startswith(("demos", "online")))
        original(path)

    monkeypatch.setattr(snapshots_module, "sync", slow)
    start = time.monotonic()
    act("sac", tmp_path / "stage", sigterm_at=36)
    kept, left_out = stored(tmp_path / "stage")
    assert 0 < kept["online"] < whole["online"] and left_out == {"online": whole["online"] - kept["online"]}
    assert (kept["demos"], kept["successes"]) == (whole["demos"], whole["successes"])
    memories, load = [], LatentMemory.load_state_dict

    def look(self, *args):
        load(self, *args)
        memories.append((self.online.num_added, self.online._valid.clone()))

    monkeypatch.setattr(LatentMemory, "load_state_dict", look)
    second = act("sac", tmp_path / "stage")
    assert f"the oldest {left_out['online']} frames of replay memory were not written" in second.said[0]
    assert second.result is not None and second.result.num_env_steps >= SAC.total_timesteps
    ((added, valid),) = memories
    assert added == whole["online"] and not valid[: left_out["online"]].any() and valid[left_out["online"] :].any()
    assert time.monotonic() - start < 60


def test_a_full_disk_costs_the_pieces_that_do_not_fit(tmp_path, monkeypatch):
    original = snapshots_module.write_tensors

    def full(path, tensors):
        if path.name.startswith("successes"):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(path, tensors)

    monkeypatch.setattr(snapshots_module, "write_tensors", full)
    first = act("ppo", tmp_path / "stage", sigterm_at=14)
    kept, left_out = stored(tmp_path / "stage")
    assert kept == {"successes": 0} and left_out["successes"] > 0
    assert not [name for name in names(sorted((tmp_path / "stage").glob("step*"))[-1]) if "successes" in name]
    monkeypatch.undo()
    second = act("ppo", tmp_path / "stage")
    assert same_episodes(second.result.successes, [episode for episode in second.episodes if episode.success])
    assert second.log[0][0] > first.log[-1][0]


def test_a_file_of_tensors_of_every_type(tmp_path):
    tensors = {str(dtype): torch.ones(3, 1).to(dtype) for dtype in snapshots_module._DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "turned": torch.arange(6).view(2, 3).T}
    write_tensors(tmp_path / "file", tensors)
    assert same(load_file(tmp_path / "file"), tensors)
