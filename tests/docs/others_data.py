"""Small data sets as other programs write them, where the data page names them: on a hub, and beside the reader."""

import json
import sys
from pathlib import Path

import h5py
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "data"))

from test_lerobot import plain
from test_rlds import episode, make
from test_roboset import robohive, roboset, save


def publish(root, monkeypatch):
    """Folders for `hub_server.hub`: the Minari sets, as Farama has them there, and one of LeRobot without our files."""
    farama = root / "datasets" / "farama-minari"
    farama.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(farama))
        minari_dataset("some/dataset-v0")
        minari_dataset("D4RL/kitchen/complete-v2")
    for group in ("some", "D4RL"):
        sets = [path.parents[1].relative_to(farama).as_posix() for path in (farama / group).rglob("main_data.hdf5")]
        spaces = sorted({name.rpartition("/")[0] for name in sets})
        told = json.dumps({"datasets": sets, "namespaces": spaces})
        for place in (group, *spaces):
            (farama / place / "namespace_metadata.json").write_text(told)
    made, _ = plain(root / "written", next__success=None)
    (root / "datasets" / "OWNER").mkdir()
    made.rename(root / "datasets" / "OWNER" / "NAME")


def minari_dataset(name):
    """Two episodes that Minari itself records; D4RL's kitchen has no pictures."""
    import minari
    from gymnasium.spaces import Box, Dict
    from minari.data_collector import EpisodeBuffer

    if name.startswith("D4RL/kitchen"):
        spaces, actions = {"observation": Box(-1, 1, (59,), np.float64)}, Box(-1, 1, (9,), np.float64)
    else:
        spaces = {
            "front": Box(0, 255, (16, 16, 3), np.uint8),
            "joints": Box(-1, 1, (3,), np.float32),
            "gripper": Box(-1, 1, (1,), np.float32),
        }
        actions = Box(-1, 1, (2,), np.float32)
    rng = np.random.default_rng(0)
    buffers = [
        EpisodeBuffer(
            id=number,
            observations={
                key: rng.integers(0, 256, (5, *space.shape), dtype=np.uint8)
                if space.dtype == np.uint8
                else rng.uniform(-1, 1, (5, *space.shape)).astype(space.dtype)
                for key, space in spaces.items()
            },
            actions=rng.uniform(-1, 1, (4, *actions.shape)).astype(actions.dtype),
            rewards=[0.0, 0.0, 0.0, 1.0],
            terminations=[False, False, False, True],
            truncations=[False] * 4,
            infos={"success": np.arange(5) == 4},
        )
        for number in range(2)
    ]
    minari.create_dataset_from_buffers(name, buffers, observation_space=Dict(spaces), action_space=actions)


def files():
    """The files of a reader who has data of robomimic, RoboHive, RoboSet and Open X-Embodiment here."""
    rng = np.random.default_rng(0)
    with h5py.File("lift_image.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"] = rng.uniform(-1, 1, (3, 7))
        demo["rewards"], demo["dones"] = [0.0, 0.0, 1.0], [0, 0, 1]
        demo["states"] = rng.normal(size=(3, 5))
        demo["obs/agentview_image"] = rng.integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    save("rollouts.h5", {"Trial0": robohive(0), "Trial1": robohive(1)})
    Path("flap_open").mkdir()
    save("flap_open/a.h5", {"Trial0": roboset(1)})
    make(Path("bridge_dataset/1.0.0"), [episode(number)[0] for number in range(2)])
