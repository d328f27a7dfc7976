"""Traces that RoboHive's own loggers write, from its own rollouts, against what its environment gave.

Pictures are put among the infos before the logger saves them: RoboHive draws its own only where torch is installed.
"""

import os
import subprocess

import numpy as np
import pytest
from robohive_python import build

from vla_rl.data import Labels, import_roboset, verify

WRITE = """
import sys
import numpy as np, gymnasium as gym, robohive
from robohive.logger.grouped_datasets import Trace
from robohive.logger.roboset_logger import RoboSet_Trace

env = gym.make("FK1_SdoorOpenRandom_v2d-v4", visual_keys=None).unwrapped
env.seed(3)
truth = {}

class Policy:
    rng = np.random.default_rng(0)
    def get_action(self, observation):
        action = self.rng.uniform(-1, 1, env.action_space.shape)
        return action, {"evaluation": action}

trace = env.examine_policy_new(Policy(), horizon=4, num_episodes=2)
for name, group in trace.trace.items():
    for key in ("observations", "actions", "rewards"):
        truth[f"{name}/{key}"] = np.array(group[key], dtype=np.float64)
    infos, moments = group["env_infos"], len(group["actions"])
    infos["visual_dict"] = {
        "rgb:left_cam:8x10:2d": Policy.rng.integers(0, 256, (moments, 1, 8, 10, 3), dtype=np.uint8),
        "rgb:right_cam:8x10:1d": Policy.rng.integers(0, 256, (moments, 240), dtype=np.uint8),
    }
    truth |= {f"{name}/{key}": array.copy() for key, array in infos["visual_dict"].items()}
    truth[f"{name}/solved"] = np.array(infos["solved"], dtype=bool)
    truth[f"{name}/qp"] = np.array(infos["obs_dict"]["robot_jnt"])
trace.save("exact.h5", verify_length=True, f_res=np.float64)

rng = np.random.default_rng(1)
robot = RoboSet_Trace("robot")
for name in ("Trial0", "Trial1"):
    robot.create_group(name)
    for step in range(5):
        last = step == 4
        moment = {
            "actions": np.full(8, np.nan) if last else rng.uniform(-1, 1, 8),
            "env_infos": {
                "obs_dict": {"time": np.array([0.1 * step]), "qp_arm": rng.normal(size=7), "qp_ee": rng.normal(size=1)},
                "visual_dict": {"rgb:left_cam:8x10:2d": rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)},
            },
            "user_cmt": float(name == "Trial1"),
        }
        robot.append_datums(name, moment)
        for key in ("qp_arm", "qp_ee"):
            truth.setdefault(f"set/{name}/{key}", []).append(moment["env_infos"]["obs_dict"][key])
        truth.setdefault(f"set/{name}/actions", []).append(moment["actions"])
        truth.setdefault(f"set/{name}/left", []).append(moment["env_infos"]["visual_dict"]["rgb:left_cam:8x10:2d"])
robot.save("roboset.h5")
np.savez("truth.npz", **truth)
"""


@pytest.fixture(scope="module")
def written(request, tmp_path_factory):
    """A folder in which RoboHive has saved its traces, and what was in them."""
    folder = tmp_path_factory.mktemp("robohive")
    python = build(request.config.cache.mkdir("robohive"))
    environment = os.environ | {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl"), "PYTHONPATH": ""}
    done = subprocess.run([python, "-c", WRITE], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with np.load(folder / "truth.npz") as file:
        return folder, {key: file[key] for key in file.files}


pytestmark = [pytest.mark.slow, pytest.mark.simulator]


@pytest.mark.filterwarnings("ignore:.*were rounded to float32")
def test_rollouts_that_robohive_recorded(tmp_path, written):
    folder, truth = written
    store = import_roboset(folder / "exact.h5", tmp_path / "s", labels=Labels(instruction="open the slide door"))
    assert len(store) == 2
    for number, stored in enumerate(store):
        told = {key.split("/", 1)[1]: array for key, array in truth.items() if key.startswith(f"Trial{number}/")}
        steps = int(np.flatnonzero(~np.isnan(told["actions"]).all(axis=1))[-1]) + 1
        assert stored.total_steps == steps >= 3
        np.testing.assert_array_equal(stored.actions, told["actions"][:steps].astype(np.float32))
        np.testing.assert_array_equal(stored.rewards, told["rewards"].reshape(-1)[1 : steps + 1])
        np.testing.assert_array_equal(
            stored.observations["state"], told["observations"][: steps + 1].astype(np.float32)
        )
        assert stored.success == bool(told["solved"].any())
        np.testing.assert_array_equal(stored.observations["robot_jnt"], told["qp"][: steps + 1])
        for key, camera in (("left_cam", "rgb:left_cam:8x10:2d"), ("right_cam", "rgb:right_cam:8x10:1d")):
            pictures = told[camera].reshape(-1, 8, 10, 3)[: steps + 1]
            np.testing.assert_array_equal(stored.observations[f"image_{key}"], pictures)
    errors = [finding for finding in verify(store.path).findings if finding.severity == "error"]
    assert errors == []


def test_files_of_robosets_own_logger(tmp_path, written):
    folder, truth = written
    store = import_roboset(folder / "roboset.h5", tmp_path / "s", labels=Labels(instruction="open the flap"))
    assert [info.success for info in store.index] == [False, True]
    for number, stored in enumerate(store):
        told = {key.split("/")[-1]: array for key, array in truth.items() if key.startswith(f"set/Trial{number}/")}

        def kept(array):
            """As the logger keeps numbers unless told otherwise."""
            return array.astype(np.float16).astype(np.float32)

        np.testing.assert_array_equal(stored.actions, kept(told["actions"][:4]))
        joints = np.concatenate([told["qp_arm"], told["qp_ee"]], axis=1)
        np.testing.assert_array_equal(stored.observations["state"], kept(joints))
        np.testing.assert_array_equal(stored.observations["image"], told["left"])
