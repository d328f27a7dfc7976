"""RLDS data sets, built here byte by byte as TensorFlow writes them, and files that claim what is not so."""

import io
import json
import struct

import numpy as np
import pytest

from vla_rl.data import Labels, UnsafeFileError, import_rlds
from vla_rl.data.tfrecord import parse_example, read_records

google_crc32c = pytest.importorskip("google_crc32c")
FEATURES = "tensorflow_datasets.core.features"


def varint(number):
    number &= (1 << 64) - 1
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def field(number, data):
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def encode(values):
    """A ``tf.train.Feature``: bytes, floats or integers."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, value) for value in values))
    if values.dtype.kind == "f":
        return field(2, field(1, values.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(value)) for value in values.ravel())))


def example(features):
    entries = (field(1, key.encode()) + field(2, encode(values)) for key, values in features.items())
    return field(1, b"".join(field(1, entry) for entry in entries))


def masked(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data):
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def tensor(dtype, *shape):
    dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
    return {"pythonClassName": f"{FEATURES}.tensor_feature.Tensor", "tensor": {"shape": dimensions, "dtype": dtype}}


def group(**children):
    return {"pythonClassName": f"{FEATURES}.features_dict.FeaturesDict", "featuresDict": {"features": children}}


def png(image):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def make(root, episodes, *, action=None, shards=1, **extra):
    """A data set in the layout of TensorFlow Datasets."""
    root.mkdir(parents=True)
    image = {"image": {"shape": {"dimensions": ["8", "8", "3"]}, "dtype": "uint8", "encodingFormat": "png"}}
    steps = group(
        action=action or tensor("float32", 2),
        reward=tensor("float32"),
        is_last=tensor("bool"),
        is_terminal=tensor("bool"),
        language_instruction={"pythonClassName": f"{FEATURES}.text_feature.Text", "text": {}},
        observation=group(wrist=image, front=image, state=tensor("float32", 3), gripper=tensor("int32")),
    )
    sequence = {
        "pythonClassName": f"{FEATURES}.dataset_feature.Dataset",
        "sequence": {"feature": steps, "length": "-1"},
    }
    (root / "features.json").write_text(json.dumps(group(steps=sequence, episode_metadata=group(**extra))))
    lengths = [len(part) for part in np.array_split(np.arange(len(episodes)), shards)]
    split = {"name": "train", "shardLengths": [str(length) for length in lengths]}
    (root / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord", "splits": [split]}))
    data = iter(episodes)
    for number, length in enumerate(lengths):
        content = b"".join(record(example(next(data))) for _ in range(length))
        (root / f"demo-train.tfrecord-{number:05d}-of-{shards:05d}").write_bytes(content)
    return root


def episode(number, steps=4, **changes):
    rng = np.random.default_rng(number)
    frames = rng.integers(0, 256, (2, steps, 8, 8, 3), dtype=np.uint8)
    last = np.arange(steps) == steps - 1
    features = {
        "steps/action": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "steps/reward": last.astype(np.float32) * (number % 2),
        "steps/is_last": last.astype(np.int64),
        "steps/is_terminal": last.astype(np.int64) * (number % 2),
        "steps/language_instruction": [f"pick up {number}".encode()] * steps,
        "steps/observation/front": [png(frame) for frame in frames[0]],
        "steps/observation/wrist": [png(frame) for frame in frames[1]],
        "steps/observation/state": rng.normal(size=(steps, 3)).astype(np.float32),
        "steps/observation/gripper": np.arange(steps) - 2,
    }
    return {**features, **changes}, frames


def test_episodes_come_out_bit_by_bit(tmp_path):
    made = [episode(number, steps=4 + number) for number in range(3)]
    root = make(tmp_path / "demo" / "1.0.0", [features for features, _ in made], shards=2)
    store = import_rlds(root, tmp_path / "s")
    assert [info[:3] for info in store.index] == [(f"pick up {n}", n == 1, "import") for n in range(3)]
    for stored, (features, frames) in zip(store, made, strict=True):
        steps = len(features["steps/is_last"])
        assert stored.actions.tobytes() == features["steps/action"].tobytes() and stored.total_steps == steps
        assert stored.rewards.tolist() == features["steps/reward"].tolist()
        for key, truth in zip(("image_front", "image_wrist"), frames, strict=True):
            np.testing.assert_array_equal(stored.observations[key], np.concatenate([truth, truth[-1:]]))
        assert stored.observations["state"][:-1].tobytes() == features["steps/observation/state"].tobytes()
        assert stored.observations["gripper"].tolist() == [*range(-2, steps - 2), steps - 3]
        assert stored.terminations[-1] == stored.success != stored.truncations[-1]


def test_a_last_step_without_action_and_reward_is_only_an_observation(tmp_path):
    features, frames = episode(0)
    features["steps/action"][-1] = 0
    store = import_rlds(make(tmp_path / "a", [features]), tmp_path / "s", labels=Labels(task="pick"))
    assert store[0].total_steps == 3 and store.index[0].task == "pick"
    np.testing.assert_array_equal(store[0].observations["image_front"], frames[0])
    features, _ = episode(1)
    features["steps/action"][-1] = 0
    assert import_rlds(make(tmp_path / "b", [features]), tmp_path / "t")[0].total_steps == 4


def test_actions_of_parts_and_episode_metadata(tmp_path):
    features, _ = episode(0)
    action = features.pop("steps/action")
    features |= {"steps/action/b": action[:, 1:], "steps/action/a": action[:, 0], "steps/action/done": np.arange(4)}
    features["episode_metadata/success"] = np.array([1])
    parts = group(b=tensor("float32", 1), a=tensor("float64"), done=tensor("int32"))
    root = make(tmp_path / "a", [features], action=parts, success=tensor("bool"))
    store = import_rlds(root, tmp_path / "s")
    assert store[0].actions.tobytes() == action.tobytes() and store[0].success


def test_success_is_what_the_episode_says_then_what_the_user_says_then_whether_there_was_a_reward(tmp_path):
    for number, reward in enumerate((0.0, 1.0)):
        features, _ = episode(0)
        features["steps/reward"][:] = [0, 0, 0, reward]
        root = make(tmp_path / f"{number}", [features])
        for told, expected in ((None, reward > 0), (True, True), (False, False)):
            store = import_rlds(root, tmp_path / f"{number}-{told}", labels=Labels(success=told))
            assert store[0].success == expected
    features["episode_metadata/success"] = np.array([0])
    root = make(tmp_path / "said", [features], success=tensor("bool"))
    assert not import_rlds(root, tmp_path / "s", labels=Labels(success=True))[0].success


def test_the_messages_are_those_of_protobuf():
    found = parse_example(example({"a": np.array([-1, 1 << 40]), "b": [b"x", b""], "c": np.array([0.5, -2.0])}), "here")
    assert found["a"].tolist() == [-1, 1 << 40] and found["b"] == [b"x", b""] and found["c"].tolist() == [0.5, -2]
    with pytest.raises(ValueError, match=r"here is no tf\.train\.Example"):
        parse_example(b"\x0a\xff", "here")
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of CRC-32C (RFC 3720)


def harm(root, change):
    path = root / "demo-train.tfrecord-00000-of-00001"
    path.write_bytes(bytes(change(bytearray(path.read_bytes()))))


def flipped(data):
    data[500] ^= 1
    return data


def huge(data):
    length = struct.pack("<Q", 1 << 60)
    return length + masked(length) + data[12:]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (flipped, "checksum of the data of record 0"),
        (huge, "claims 1,152,921,504,606,846,976 bytes"),
        (lambda data: data[:-9], "claims"),
        (lambda data: data[:5], "cut off in record 0"),
        (lambda data: data + data, "should have 1 episodes in 'train', but has 2"),
    ],
)
def test_damaged_and_forged_files_are_refused(tmp_path, change, expected):
    root = make(tmp_path / "a", [episode(0)[0]])
    harm(root, change)
    with pytest.raises(ValueError, match=expected):
        import_rlds(root, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'dataset_info\.json' is missing"):
        import_rlds(tmp_path, tmp_path / "s")
    root = make(tmp_path / "a", [episode(0)[0]])
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        import_rlds(root, tmp_path / "s", split="test")
    file = root / "demo-train.tfrecord-00000-of-00001"
    file.rename(tmp_path / "secret")
    with pytest.raises(FileNotFoundError, match="should have 1 files of 'train', but has 0"):
        import_rlds(root, tmp_path / "s")
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFileError, match="leaves"):
        import_rlds(root, tmp_path / "s")
    root = make(tmp_path / "b", [episode(0, **{"steps/reward": np.zeros(3, np.float32)})[0]])
    with pytest.raises(ValueError, match="'steps/reward' has 3 steps, but 'steps/action' has 4"):
        import_rlds(root, tmp_path / "s")
    (root / "features.json").write_text(json.dumps(group(steps=tensor("float32"))))
    with pytest.raises(ValueError, match="no 'steps/action'"):
        import_rlds(root, tmp_path / "s")


def test_records_are_those_of_another_writer(tmp_path):
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    texts = [b"first", b"", b"third" * 1000]
    with open(tmp_path / "x", "wb") as file:
        writer = record_writer.RecordWriter(file)
        for text in texts:
            writer.write(text)
        writer.flush()
    assert list(read_records(tmp_path / "x")) == texts
    assert (tmp_path / "x").read_bytes() == b"".join(record(text) for text in texts)
