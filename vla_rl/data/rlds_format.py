"""Episode stores out of RLDS data sets as TensorFlow Datasets keeps them (Open X-Embodiment), without TensorFlow."""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.copying import Progress
from vla_rl.data.encoded_frames import decode_frames
from vla_rl.data.foreign import MAX_TEXT, Arrays, Labels, Render, read_json
from vla_rl.data.importing import Found, write_store
from vla_rl.data.safety import UnsafeFileError, check_inside
from vla_rl.data.store import EpisodeStore
from vla_rl.data.tfrecord import parse_example, read_records

_MAX_DEPTH = 8


def import_rlds(
    path: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    labels: Labels | None = None,
    render: Render | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EpisodeStore:
    """Writes a store of the episodes of an RLDS data set: a folder with ``features.json`` and ``*.tfrecord-*`` files.

    An action of several parts becomes their floats one after the other, in alphabetical order of the parts' names;
    parts of whole numbers, such as RT-1's ``terminate_episode``, are kept among the infos as ``action.<part>``. RLDS's
    last step is only an observation, but most of Open X-Embodiment gives it an action and the reward: it counts as a
    step unless both are 0, and then the last observation is there twice. An ``is_terminal`` last step becomes a
    termination. Where neither ``episode_metadata/success`` nor ``labels.success`` says it, an episode with a positive
    reward counts as a success. JPEG is decoded as libjpeg does by default, which TensorFlow does with
    ``dct_method="INTEGER_ACCURATE"``.

    Args:
        path: folder of one version of the data set.
        out: folder of the new store.
        split: which part of it.
        labels: what the episodes do not say of themselves; see ``Labels``.
        render: draws the pictures where a data set has states only.
        overwrite: replace what is at ``out``.
        progress: called after every episode.

    Raises:
        ImportError: if google-crc32c or pillow is not installed.
        FileNotFoundError: if there is no data set, or files of the split are missing.
        UnsafeFileError: if a file leaves the data set or claims sizes that it does not hold.
        ValueError: if a file is damaged, or something is missing or does not fit.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    root, labels = Path(path), labels or Labels()
    files, count = _shards(root, split)
    leaves = _leaves(root)

    def episodes() -> Generator[Found]:
        number = 0
        for file in files:
            for data in read_records(file):
                where = f"'{file}': episode {number}"
                arrays, attributes = _episode(parse_example(data, where), leaves, where)
                if labels.success is None and "success" not in attributes:
                    attributes["success"] = bool((arrays["rewards"] > 0).any())
                task = attributes.get("instruction") or root.resolve().parent.name or "rlds"
                yield Found(arrays, attributes, labels, task, where)
                number += 1
        if number != count:
            raise ValueError(f"'{root}' should have {count} episodes in '{split}', but has {number}; fetch it again")

    return write_store(
        Path(out).absolute(), episodes(), total=count, render=render, overwrite=overwrite, progress=progress
    )


def _shards(root: Path, split: str) -> tuple[list[Path], int]:
    """The files of a split in order, and how many episodes they should have."""
    info = _read_json(root, "dataset_info.json")
    splits = {part["name"]: part for part in info.get("splits", []) if isinstance(part, dict) and "name" in part}
    if split not in splits:
        raise ValueError(f"'{root}' has no split '{split}'; it has {sorted(map(str, splits))[:10]}")
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise ValueError(f"'{root}' is kept as {str(info['fileFormat'])[:40]!r}, only 'tfrecord' can be imported")
    try:
        lengths = [int(length) for length in splits[split]["shardLengths"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{root / 'dataset_info.json'}' does not say how many episodes '{split}' has") from error
    name = re.compile(rf".+-{re.escape(split)}\.tfrecord-\d{{5,}}-of-0*{len(lengths)}")
    files = sorted(file for file in root.iterdir() if name.fullmatch(file.name))
    if len(files) != len(lengths):
        raise FileNotFoundError(f"'{root}' should have {len(lengths)} files of '{split}', but has {len(files)}")
    for file in files:
        check_inside(file, root)
    return files, sum(lengths)


def _read_json(root: Path, name: str) -> dict[str, Any]:
    if not (root / name).is_file():
        raise FileNotFoundError(f"no RLDS data set at '{root}': '{name}' is missing; give the folder of a version")
    return read_json(root / name, root)


def _leaves(root: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Kind (``"image"``, ``"text"`` or a NumPy type) and shape of every feature that can be read, by its path."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    todo: list[tuple[str, Any, int]] = [("", _read_json(root, "features.json"), 0)]
    try:
        while todo:
            path, node, depth = todo.pop()
            if "sequence" in node:
                node = node["sequence"]["feature"]
            if "featuresDict" in node and depth < _MAX_DEPTH:
                children = node["featuresDict"]["features"].items()
                todo += [(f"{path}/{key}" if path else key, child, depth + 1) for key, child in children]
            elif "text" in node:
                found[path] = ("text", ())
            elif "image" in node or "tensor" in node:
                kind = node.get("image") or node["tensor"]
                shape = tuple(int(size) for size in kind.get("shape", {}).get("dimensions", []))
                if "image" in node:
                    if shape[-1:] == (3,) and kind.get("dtype", "uint8") == "uint8":
                        found[path] = ("image", shape)
                elif kind["dtype"] == "string":
                    found[path] = ("text", ())
                elif kind.get("encoding", "none") == "none" and all(0 < size < 1 << 31 for size in shape):
                    found[path] = (np.dtype(str(kind["dtype"])).name, shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"'{root / 'features.json'}' is not that of an RLDS data set: {error!r}") from error
    if not any(path.split("/")[:2] == ["steps", "action"] for path in found):
        raise ValueError(f"'{root / 'features.json'}' has no 'steps/action' that can be read, so it is not of RLDS")
    return found


def _episode(
    example: dict[str, Any], leaves: dict[str, tuple[str, tuple[int, ...]]], where: str
) -> tuple[Arrays, dict[str, Any]]:
    """Arrays of an episode by the names that ``assemble`` knows, and what it says of itself."""
    values: Arrays = {}
    texts: dict[str, str] = {}
    for path, (kind, shape) in sorted(leaves.items()):
        data = example.get(path)
        if data is None or not len(data):
            continue
        if kind == "text":
            texts[path] = _text(data, where)
        elif kind == "image" and isinstance(data, list):
            values[path] = decode_frames(data, f"{where}: '{path}'")
        elif isinstance(data, np.ndarray):
            rows, rest = divmod(len(data), math.prod(shape))
            if rest:
                raise ValueError(f"{where}: '{path}' has {len(data)} numbers, which are no rows of {shape}")
            values[path] = data.astype(kind).reshape(rows, *shape)
    parts = [path for path in values if path == "steps/action" or path.startswith("steps/action/")]
    codes = [path for path in parts if values[path].dtype.kind != "f"]
    parts = [path for path in parts if path not in codes]
    if not parts:
        raise ValueError(f"{where} has no 'steps/action' of floats")
    count = len(values[parts[0]])
    uneven = [path for path, array in values.items() if path.startswith("steps/") and len(array) != count]
    if uneven:
        raise ValueError(f"{where}: '{uneven[0]}' has {len(values[uneven[0]])} steps, but '{parts[0]}' has {count}")
    actions = np.concatenate([values[path].reshape(count, -1) for path in parts], axis=1)
    rewards = values.get("steps/reward", np.zeros(count)).reshape(count, -1)[:, 0].astype(np.float64)
    steps = count - 1 if count > 1 and not actions[-1].any() and rewards[-1] == 0 else count
    ended = bool(values.get("steps/is_terminal", np.zeros(count)).reshape(count, -1)[-1, 0])
    last = np.arange(steps) == steps - 1
    arrays: Arrays = {"actions": actions[:steps], "rewards": rewards[:steps]}
    arrays |= {"terminations": last & ended, "truncations": last & (not ended)}
    for path, array in values.items():
        key = path.removeprefix("steps/").removeprefix("observation/").replace("/", ".")
        name = f"observations/{key}" if path.startswith("steps/observation/") else f"infos/{key}"
        if path.startswith("steps/observation/") or path in codes:
            arrays[name] = array if steps < count else np.concatenate([array, array[-1:]])
    told = values.get("episode_metadata/success")
    attributes: dict[str, Any] = {} if told is None else {"success": bool(told.any())}
    sentence = next((text for path, text in texts.items() if "instruction" in path and text), None)
    return arrays, attributes | ({"instruction": sentence} if sentence else {})


def _text(data: Any, where: str) -> str:
    """The first of the texts of a feature."""
    if not isinstance(data, list) or len(data[0]) > MAX_TEXT:
        raise UnsafeFileError(f"{where} has a text of more than {MAX_TEXT:,} characters, or none where one should be")
    return data[0].decode("utf-8", errors="replace")
