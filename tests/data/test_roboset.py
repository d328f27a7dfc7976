"""Traces of RoboHive and RoboSet, written as their own logger does: flattened keys, gzip, a last action of NaN."""

import h5py
import numpy as np
import pytest

from vla_rl.data import Labels, UnsafeFileError, import_roboset, verify

LABELS = Labels(instruction="open the slide door")


def save(path, trials):
    """As ``Trace.save`` of RoboHive 0.7: one group per trial, nested by the slashes of flattened keys."""
    with h5py.File(path, "w") as file:
        for name, arrays in trials.items():
            group = file.create_group(name)
            for key, array in arrays.items():
                group.create_dataset(key, data=array, compression="gzip", compression_opts=4)
    return path


def robohive(number, steps=4, dtype=np.float32):
    rng = np.random.default_rng(number)
    moments = steps + 1
    actions = rng.uniform(-1, 1, (moments, 3)).astype(dtype)
    actions[-1] = np.nan
    solved = (np.arange(moments) == steps) & (number > 0)
    return {
        "time": np.arange(moments) * 0.1,
        "observations": rng.normal(size=(moments, 5)).astype(dtype),
        "actions": actions,
        "rewards": np.arange(moments) + 10.0 * number,
        "done": solved & (number == 2),
        "env_infos/solved": solved,
        "env_infos/rwd_dict/dense": rng.normal(size=moments),
        "env_infos/obs_dict/qp": rng.normal(size=(moments, 2)).astype(dtype),
        "env_infos/obs_dict/time": np.arange(moments) * 0.1,
        "env_infos/state/act": np.full(moments, np.nan, np.float16),
        "env_infos/visual_dict/rgb:left_cam:6x8:2d": rng.integers(0, 256, (moments, 6, 8, 3), dtype=np.uint8),
        "env_infos/visual_dict/rgb:top_cam:6x8:1d": rng.integers(0, 256, (moments, 144), dtype=np.uint8),
    }


def test_rewards_belong_to_the_action_before_them(tmp_path):
    trials = {f"Trial{number}": robohive(number) for number in (0, 1, 2, 10)}
    store = import_roboset(save(tmp_path / "slide.h5", trials), tmp_path / "s", labels=LABELS)
    assert [(info.task, info.success, info.total_steps) for info in store.index] == [
        ("slide", False, 4), ("slide", True, 4), ("slide", True, 4), ("slide", True, 4)
    ]  # fmt: skip
    for stored, trial in zip(store, trials.values(), strict=True):
        assert stored.actions.tobytes() == trial["actions"][:-1].tobytes()
        assert stored.rewards.tobytes() == trial["rewards"][1:].tobytes()
        assert stored.observations["state"].tobytes() == trial["observations"].tobytes()
        np.testing.assert_array_equal(stored.observations["qp"], trial["env_infos/obs_dict/qp"])
        left, top = (trial[f"env_infos/visual_dict/rgb:{name}"] for name in ("left_cam:6x8:2d", "top_cam:6x8:1d"))
        np.testing.assert_array_equal(stored.observations["image_left_cam"], left)
        np.testing.assert_array_equal(stored.observations["image_top_cam"], top.reshape(5, 6, 8, 3))
        np.testing.assert_array_equal(stored.infos["success"], trial["env_infos/solved"])
        assert sorted(stored.infos) == ["rwd_dict.dense", "success", "time"]
    assert [bool(stored.terminations[-1]) for stored in store] == [False, False, True, False]
    assert verify(store.path).findings == []


def test_half_precision_as_the_logger_keeps_it_is_exact(tmp_path):
    trial = robohive(1, dtype=np.float16)
    store = import_roboset(
        save(tmp_path / "a.h5", {"Trial0": trial}), tmp_path / "s",
        labels=Labels(instruction="go", state_keys=("qp", "observation"), task="slide"),
    )  # fmt: skip
    state = np.concatenate([trial["env_infos/obs_dict/qp"], trial["observations"]], axis=1)
    np.testing.assert_array_equal(store[0].observations["state"], state.astype(np.float32))
    np.testing.assert_array_equal(store[0].actions, trial["actions"][:-1].astype(np.float32))


def roboset(number, *, rows=6, blank=2):
    rng = np.random.default_rng(number)
    arm, hand = rng.normal(size=(rows, 7)).astype(np.float16), rng.normal(size=(rows, 1)).astype(np.float16)
    if blank:
        arm[-blank:] = hand[-blank:] = np.nan
    return {
        "data/time": np.arange(rows, dtype=np.float16),
        "data/ctrl_arm": arm,
        "data/ctrl_ee": hand,
        "data/qp_arm": rng.normal(size=(rows, 7)).astype(np.float16),
        "data/qp_ee": rng.normal(size=rows).astype(np.float16),
        "data/qv_arm": rng.normal(size=(rows, 7)).astype(np.float16),
        "data/rgb_left": rng.integers(0, 256, (rows, 6, 8, 3), dtype=np.uint8),
        "data/rgb_wrist": rng.integers(0, 256, (rows, 6, 8, 3), dtype=np.uint8),
        "data/d_left": rng.integers(0, 9, (rows, 6, 8), dtype=np.uint16),
        "config/solved": np.array(float(number % 2)).reshape(1).astype(np.float16),
        "derived/pose_ee": rng.normal(size=(rows, 6)).astype(np.float16),
    }


def test_a_folder_of_robosets_is_one_store(tmp_path):
    (tmp_path / "flap_open").mkdir()
    trials = [roboset(0), roboset(1), roboset(3, rows=5, blank=0)]
    save(tmp_path / "flap_open" / "a.h5", {"Trial0": trials[0], "Trial1": trials[1]})
    save(tmp_path / "flap_open" / "b.h5", {"Trial0": trials[2]})
    store = import_roboset(tmp_path / "flap_open", tmp_path / "s", labels=LABELS)
    assert [(info.task, info.success, info.total_steps) for info in store.index] == [
        ("flap_open", False, 4), ("flap_open", True, 4), ("flap_open", True, 5)
    ]  # fmt: skip
    for stored, trial in zip(store, trials, strict=True):
        steps = stored.total_steps
        actions = np.concatenate([trial["data/ctrl_arm"], trial["data/ctrl_ee"]], axis=1)[:steps]
        np.testing.assert_array_equal(stored.actions, actions.astype(np.float32))
        joints = np.concatenate([trial["data/qp_arm"], trial["data/qp_ee"][:, None]], axis=1).astype(np.float32)
        rows = np.minimum(np.arange(steps + 1), len(joints) - 1)
        np.testing.assert_array_equal(stored.observations["state"], joints[rows])
        for camera in ("left", "wrist"):
            pictures = trial[f"data/rgb_{camera}"]
            np.testing.assert_array_equal(stored.observations[f"image_{camera}"], pictures[rows])
        np.testing.assert_array_equal(stored.observations["qv_arm"], trial["data/qv_arm"][rows])
        assert not stored.rewards.any() and stored.truncations.tolist() == [False] * (steps - 1) + [True]


def test_what_is_no_trace_or_is_hostile_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trace"):
        import_roboset(tmp_path / "nothing.h5", tmp_path / "s", labels=LABELS)
    (tmp_path / "a.pickle").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ValueError, match="pickle, which could run code"):
        import_roboset(tmp_path / "a.pickle", tmp_path / "s", labels=LABELS)
    with pytest.raises(ValueError, match="no group such as 'Trial0'"):
        import_roboset(save(tmp_path / "a.h5", {"notes": {}}), tmp_path / "s", labels=LABELS)
    with pytest.raises(ValueError, match="no 'actions'"):
        import_roboset(save(tmp_path / "b.h5", {"Trial0": {"time": np.zeros(3)}}), tmp_path / "s", labels=LABELS)
    blank = robohive(0) | {"actions": np.full((5, 3), np.nan)}
    with pytest.raises(ValueError, match="no action that is not NaN"):
        import_roboset(save(tmp_path / "c.h5", {"Trial0": blank}), tmp_path / "s", labels=LABELS)
    with pytest.raises(ValueError, match="has no instruction"):
        import_roboset(save(tmp_path / "d.h5", {"Trial0": robohive(0)}), tmp_path / "s")
    with h5py.File(save(tmp_path / "e.h5", {}), "r+") as file:
        file["Trial0"] = h5py.ExternalLink("d.h5", "/Trial0")
    with pytest.raises(ValueError, match="link to something else"):
        import_roboset(tmp_path / "e.h5", tmp_path / "s", labels=LABELS)
    with h5py.File(tmp_path / "d.h5", "r+") as file:
        file["Trial0"].create_dataset("bomb", (1 << 40,), "u1", chunks=(1 << 20,), compression="gzip")
    with pytest.raises(UnsafeFileError, match="claims"):
        import_roboset(tmp_path / "d.h5", tmp_path / "s", labels=LABELS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.h5").symlink_to(tmp_path / "b.h5")
    with pytest.raises(UnsafeFileError, match="leaves"):
        import_roboset(tmp_path / "folder", tmp_path / "s", labels=LABELS)
    assert not (tmp_path / "s").exists()
