"""RLDS data sets that TensorFlow Datasets wrote, against what its own reader makes of them (see write.py there)."""

from pathlib import Path

import numpy as np
import pytest

from vla_rl.data import import_rlds, verify

pytest.importorskip("google_crc32c")
WRITTEN = Path(__file__).parent / "rlds_written_by_tfds"


@pytest.fixture(scope="module")
def told():
    """By split and number of the episode: arrays by path, as TensorFlow gives them."""
    episodes = {}
    with np.load(WRITTEN / "read_by_tfds.npz") as file:
        for key in file.files:
            name, split, number, path = key.split("/", 3)
            episodes.setdefault((name, split), {}).setdefault(int(number), {})[path.removeprefix("steps/")] = file[key]
    return {key: [found[number] for number in sorted(found)] for key, found in episodes.items()}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_vector_of_actions_and_two_cameras(tmp_path, told, split):
    store = import_rlds(WRITTEN / "flat" / "1.0.0", tmp_path / "s", split=split)
    episodes = told["flat", split]
    assert len(store) == len(episodes) == {"train": 3, "val": 1}[split]
    kinds = set()
    for stored, theirs in zip(store, episodes, strict=True):
        count = len(theirs["action"])
        observed_only = not theirs["action"][-1].any() and theirs["reward"][-1] == 0
        steps = count - observed_only
        kinds.add((bool(observed_only), bool(theirs["is_terminal"][-1])))
        seen = np.minimum(np.arange(steps + 1), count - 1)
        assert stored.actions.tobytes() == theirs["action"][:steps].tobytes()
        assert stored.rewards.tolist() == theirs["reward"][:steps].tolist()
        assert stored.terminations.tolist() == [False] * (steps - 1) + [bool(theirs["is_terminal"][-1])]
        assert (stored.terminations ^ stored.truncations).tolist() == [False] * (steps - 1) + [True]
        assert stored.success == bool(theirs["reward"].any())
        assert stored.instruction.encode() == theirs["language_instruction"][0]
        assert stored.observations["state"].tobytes() == theirs["observation/state"][seen].tobytes()
        np.testing.assert_array_equal(stored.observations["image"], theirs["observation/image"][seen])
        np.testing.assert_array_equal(stored.observations["image_wrist_image"], theirs["observation/wrist_image"][seen])
        assert stored.observations.keys() == {"image", "image_wrist_image", "state", "task_id"}
    if split == "train":
        assert kinds == {(True, False), (False, True), (False, False)}
    assert verify(store.path).findings == []


@pytest.mark.filterwarnings("ignore:state of float64 were rounded")
def test_actions_of_parts_numbers_of_every_type_and_two_files(tmp_path, told):
    store = import_rlds(WRITTEN / "parts" / "0.2.0", tmp_path / "s")
    assert len(store) == len(told["parts", "train"]) == 4
    for stored, theirs in zip(store, told["parts", "train"], strict=True):
        seen = [0, 1, 2, 2]
        floats = [theirs["action/gripper"][:, None], theirs["action/world_vector"]]
        assert stored.actions.tobytes() == np.concatenate(floats, axis=1).tobytes()
        codes = theirs["action/terminate_episode"][seen]
        assert stored.infos["action.terminate_episode"].tolist() == codes.tolist() and codes.dtype == np.int32
        assert stored.rewards.tolist() == theirs["reward"].tolist() == [0.5] * 3
        assert stored.instruction.encode() == theirs["observation/natural_language_instruction"][0]
        np.testing.assert_array_equal(stored.observations["image"], theirs["observation/image"][seen])
        for key in ("byte", "long"):
            array = theirs[f"observation/{key}"][seen]
            assert stored.observations[key].dtype == array.dtype
            np.testing.assert_array_equal(stored.observations[key], array)
        double = theirs["observation/double"][seen]
        np.testing.assert_array_equal(stored.observations["state"], double.astype(np.float32))
        number = int(stored.instruction.removeprefix("pick "))
        assert (stored.success, bool(stored.terminations[-1])) == (number % 2 == 0, True)
    assert sorted(info.instruction for info in store.index) == [f"pick {number}" for number in range(4)]
    assert verify(store.path).findings == []
