"""Lets TensorFlow Datasets write two small RLDS data sets, and what its own reader makes of them, as truth for a test.

Run once, in an environment of its own, from this folder; the files beside this script are what came out::

    python -m venv tfds
    tfds/bin/pip install "tensorflow-cpu==2.19.1" "tensorflow-datasets==4.9.9" "tensorflow-metadata==1.17.2"
    tfds/bin/python write.py

JPEG frames are decoded by TensorFlow's INTEGER_ACCURATE, which is libjpeg's own default and Pillow's. TensorFlow's own
is INTEGER_FAST, which differs from it by up to 16 of 255 levels in these pictures.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

HERE = Path(__file__).parent
SIZE = 32
F = tfds.features


def picture(number: int, step: int, *, camera: int) -> np.ndarray:
    """Gradients with a moving square, so that files stay small and no two pictures are equal."""
    row, column = np.mgrid[:SIZE, :SIZE]
    image = np.stack([row * 8, column * 8, (row + column) * 4], axis=-1).astype(np.uint8)
    image = np.roll(image, 11 * camera + number, axis=1)
    image[4 + number : 12 + number, 3 * step : 3 * step + 7] = (250 - 40 * step, 30 * step, 200 - 100 * camera)
    return image


class Flat(tfds.core.GeneratorBasedBuilder):
    """In the way of Open X-Embodiment: a vector of actions, two cameras, an embedding of the sentence."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        observation = {
            "image": F.Image(shape=(SIZE, SIZE, 3), dtype=np.uint8, encoding_format="png"),
            "wrist_image": F.Image(shape=(SIZE, SIZE, 3), dtype=np.uint8, encoding_format="jpeg"),
            "depth": F.Image(shape=(SIZE, SIZE, 1), dtype=np.uint16, encoding_format="png"),
            "state": F.Tensor(shape=(5,), dtype=np.float32),
        }
        steps = {
            "observation": F.FeaturesDict(observation),
            "action": F.Tensor(shape=(4,), dtype=np.float32),
            "discount": F.Scalar(dtype=np.float32),
            "reward": F.Scalar(dtype=np.float32),
            "is_first": F.Scalar(dtype=np.bool_),
            "is_last": F.Scalar(dtype=np.bool_),
            "is_terminal": F.Scalar(dtype=np.bool_),
            "language_instruction": F.Text(),
            "language_embedding": F.Tensor(shape=(8,), dtype=np.float32),
        }
        features = F.FeaturesDict({"steps": F.Dataset(steps), "episode_metadata": {"file_path": F.Text()}})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(3)), "val": self._generate_examples(range(3, 4))}

    def _generate_examples(self, numbers):
        for number in numbers:
            rng = np.random.default_rng(number)
            count = 4 + number
            steps = []
            for step in range(count):
                last = step == count - 1
                observation = {
                    "image": picture(number, step, camera=0),
                    "wrist_image": picture(number, step, camera=1),
                    "depth": np.full((SIZE, SIZE, 1), 1000 * step, np.uint16),
                    "state": rng.normal(size=5).astype(np.float32),
                }
                # The middle episode ends as RLDS wants it, with a step that is only an observation.
                action = np.zeros(4) if last and number == 1 else rng.uniform(-1, 1, 4)
                steps.append(
                    {
                        "observation": observation,
                        "action": action.astype(np.float32),
                        "discount": np.float32(1 - (last and number == 0)),
                        "reward": np.float32(last and number != 1),
                        "is_first": step == 0,
                        "is_last": last,
                        "is_terminal": last and number == 0,
                        "language_instruction": f"move the square no. {number} — carefully",
                        "language_embedding": rng.normal(size=8).astype(np.float32),
                    }
                )
            yield f"episode_{number}", {"steps": steps, "episode_metadata": {"file_path": f"/raw/{number}.npy"}}


class Parts(tfds.core.GeneratorBasedBuilder):
    """In the way of RT-1: actions of named parts, the sentence among the observations, and numbers of every type."""

    VERSION = tfds.core.Version("0.2.0")

    def _info(self):
        steps = {
            "observation": {
                "image": F.Image(shape=(None, None, 3), dtype=np.uint8, encoding_format="png"),
                "natural_language_instruction": F.Text(),
                "byte": F.Tensor(shape=(2,), dtype=np.uint8),
                "long": F.Tensor(shape=(2, 2), dtype=np.int64),
                "double": F.Tensor(shape=(2,), dtype=np.float64),
                "packed": F.Tensor(shape=(3,), dtype=np.float32, encoding=F.Encoding.ZLIB),
                "ragged": F.Sequence(np.float32),
            },
            "action": {
                "world_vector": F.Tensor(shape=(3,), dtype=np.float32),
                "terminate_episode": F.Tensor(shape=(3,), dtype=np.int32),
                "gripper": F.Scalar(dtype=np.float32),
            },
            "reward": F.Scalar(dtype=np.float32),
            "is_first": F.Scalar(dtype=np.bool_),
            "is_last": F.Scalar(dtype=np.bool_),
            "is_terminal": F.Scalar(dtype=np.bool_),
        }
        features = F.FeaturesDict({"steps": F.Dataset(steps), "episode_metadata": {"success": F.Scalar(np.bool_)}})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(4):
            rng = np.random.default_rng(10 + number)
            steps = []
            for step in range(3):
                observation = {
                    "image": picture(number, step, camera=0),
                    "natural_language_instruction": f"pick {number}",
                    "byte": rng.integers(0, 256, 2, dtype=np.uint8),
                    "long": rng.integers(-(1 << 62), 1 << 62, (2, 2)),
                    "double": rng.normal(size=2),
                    "packed": rng.normal(size=3).astype(np.float32),
                    "ragged": rng.normal(size=step).astype(np.float32),
                }
                action = {
                    "world_vector": rng.uniform(-1, 1, 3).astype(np.float32),
                    "terminate_episode": np.array([0, 1, step == 2], np.int32),
                    "gripper": np.float32(rng.uniform(-1, 1)),
                }
                ends = {"is_first": step == 0, "is_last": step == 2, "is_terminal": step == 2}
                steps.append({"observation": observation, "action": action, "reward": np.float32(0.5), **ends})
            yield number, {"steps": steps, "episode_metadata": {"success": number % 2 == 0}}


def told(example) -> dict[str, np.ndarray]:
    """An episode as TensorFlow Datasets reads it: arrays by path, one row per step."""
    found: dict[str, list] = {}

    def add(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}/{key}", inner)
        else:
            found.setdefault(prefix, []).append(value)

    for step in example["steps"]:
        add("steps", step)
    if jpeg := found.get("steps/observation/wrist_image"):
        found["steps/observation/wrist_image"] = [
            tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE").numpy() for data in jpeg
        ]
    return {key: np.stack(rows) for key, rows in found.items() if len({np.shape(row) for row in rows}) == 1}


def main() -> None:
    """Writes both data sets and what their reader gives."""
    truth = {}
    with tempfile.TemporaryDirectory() as folder:
        for builder, shards in ((Flat(data_dir=folder), 1), (Parts(data_dir=folder), 2)):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
            target = HERE / builder.name
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(builder.data_dir, target / str(builder.version))
            order, skip = tfds.ReadConfig(interleave_cycle_length=1), tfds.decode.SkipDecoding()
            jpeg = {"steps": {"observation": {"wrist_image": skip}}} if builder.name == "flat" else None
            for split in builder.info.splits:
                examples = builder.as_dataset(split=split, read_config=order, decoders=jpeg)
                for number, example in enumerate(tfds.as_numpy(examples)):
                    for key, array in told(example).items():
                        kept = array.astype("S") if array.dtype.kind == "O" else array
                        truth[f"{builder.name}/{split}/{number}/{key}"] = kept
    np.savez_compressed(HERE / "read_by_tfds.npz", **truth)
    versions = {"tensorflow": tf.__version__, "tensorflow_datasets": tfds.version.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
