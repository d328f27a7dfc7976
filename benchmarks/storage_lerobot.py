"""LeRobot's own writer and loader for ``storage.py``, in a Python environment of its own, as its versions conflict.

Run there as ``python storage_lerobot.py PICTURES FOLDER PLAN`` it prints one JSON object;
beside ``storage_measures.py`` it needs numpy and LeRobot.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from storage_measures import peak_bytes, timed

LOSSLESS = {"LeRobot v3, PNG": True, "LeRobot v3, its default (video)": False}
"""Name of the way -> whether it gives the same pictures back."""


def measure_lerobot(
    python: str, pictures: np.ndarray, plan: Sequence[tuple[np.ndarray, np.ndarray]], folder: Path
) -> dict[str, dict[str, Any]]:
    """What one round costs: per way ``write``, ``sequential`` and ``random`` as (frames, seconds, seconds of CPU time).

    Args:
        python: interpreter that can import LeRobot.
        pictures: uint8 ``[N, T, H, W, 3]``.
        plan: batches of ``B`` (episode, step) pairs, as in ``Reader.frames``.
        folder: scratch space, made here.

    Raises:
        RuntimeError: LeRobot failed; its last words are in the message.
    """
    folder.mkdir()
    np.save(folder / "pictures.npy", pictures)
    np.save(folder / "plan.npy", np.array(plan))
    command = [python, __file__, str(folder / "pictures.npy"), str(folder), str(folder / "plan.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"LeRobot under {python} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(pictures: np.ndarray, folder: Path, plan: np.ndarray) -> dict[str, dict[str, Any]]:
    """Write and read by LeRobot in this process; see `measure_lerobot`."""
    import torch

    torch.set_num_threads(1)
    return {name: one_way(pictures, folder / str(number), plan, name) for number, name in enumerate(LOSSLESS)}


def one_way(pictures: np.ndarray, root: Path, plan: np.ndarray, name: str) -> dict[str, Any]:
    """One row of `measure_lerobot`'s, with LeRobot's ``version`` and the figures of memory of the other ways.

    Raises:
        AssertionError: other pictures came back than were written.
    """
    import lerobot
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    episodes, steps, *shape = pictures.shape
    video = not LOSSLESS[name]
    features = {
        "observation.images.camera": {
            "dtype": "video" if video else "image",
            "shape": tuple(shape),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        "action": {"dtype": "float32", "shape": (4,), "names": None},
    }
    numbers = np.zeros(4, np.float32)

    def write(folder: Path, recorded: np.ndarray) -> None:
        dataset = LeRobotDataset.create("bench/pictures", fps=20, root=folder, features=features, use_videos=video)
        for episode in recorded:
            for picture in episode:
                frame = {"observation.images.camera": picture, "observation.state": numbers, "action": numbers}
                dataset.add_frame(frame | {"task": "open the drawer"})
            dataset.save_episode()
        dataset.finalize()

    result: dict[str, Any] = {
        "version": lerobot.__version__,
        "write": [episodes * steps, *timed(partial(write, root, pictures))],
    }
    dataset = LeRobotDataset("bench/pictures", root=root, video_backend="pyav")

    def read(rows: np.ndarray) -> list[Any]:
        return [dataset[int(row)]["observation.images.camera"] for row in rows]

    for row in range(2, episodes * steps, steps + 1):
        found = dataset[row]["observation.images.camera"].permute(1, 2, 0).numpy() * 255
        difference = np.abs(found.round() - pictures.reshape(-1, *shape)[row]).mean()
        if difference > (8 if video else 0):
            raise AssertionError(f"{name} gave other pictures, mean difference {difference:.2f}")
    in_order = np.arange(episodes * steps)
    result["sequential"] = [len(in_order), *timed(partial(each, read, in_order.reshape(episodes, steps)))]
    at_random = plan[:, 0] * steps + plan[:, 1]
    result["random"] = [at_random.size, *timed(partial(each, read, at_random))]
    result["read_peak_bytes"] = peak_bytes(partial(read, at_random[0]))
    result["write_peak_bytes"] = peak_bytes(partial(write, root.with_suffix(".again"), pictures[:2]))
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return result | {"bytes_per_frame": size / (episodes * steps)}


def each(read: Callable[[np.ndarray], Any], batches: np.ndarray) -> None:
    """Read all batches and keep none."""
    for rows in batches:
        read(rows)


if __name__ == "__main__":
    print(json.dumps(main(np.load(sys.argv[1]), Path(sys.argv[2]), np.load(sys.argv[3]))))
