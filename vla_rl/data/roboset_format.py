"""Episode stores out of the HDF5 traces of RoboHive (https://github.com/vikashplus/robohive) and of RoboSet."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from vla_rl.data.copying import Progress
from vla_rl.data.foreign import Arrays, Labels, Render, flatten, read_attributes
from vla_rl.data.importing import Found, write_store
from vla_rl.data.layout import get_group
from vla_rl.data.safety import check_group, check_inside
from vla_rl.data.store import EpisodeStore

_JOINTS = ("qp_arm", "qp_ee")
_CAMERA = re.compile(r"(?:.*[./])?rgb[:_](?P<name>[^:]+)(?::(?P<height>\d{1,5})x(?P<width>\d{1,5}):.*)?")


def import_roboset(
    path: str | Path,
    out: str | Path,
    *,
    labels: Labels | None = None,
    render: Render | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EpisodeStore:
    """Writes a store of the trials in traces of RoboHive or RoboSet.

    A trace records ``T + 1`` moments, the last with an action of NaN; each reward lies beside the observation that came
    with it, one after its action. RoboHive's state is ``observations``, its success ``env_infos/solved``; RoboSet's are
    ``qp_arm`` with ``qp_ee`` and ``config/solved``, its action ``ctrl_arm`` with ``ctrl_ee``, its rewards 0.
    All of ``env_infos/obs_dict`` or ``data`` become observations, which ``labels.state_keys`` may choose from.

    Args:
        path: a trace ``.h5``, or a folder of them, read in order of their names.
        out: folder of the new store.
        labels: what the trials do not say of themselves; see ``Labels``. Traces have no instruction.
        render: draws the pictures where a trace has states only.
        overwrite: replace what is at ``out``.
        progress: called after every episode.

    Raises:
        FileNotFoundError: if there is no trace.
        UnsafeFileError: if a file has links or views to other files, or claims sizes that it does not hold.
        ValueError: if something is missing or does not fit.
        FileExistsError: if ``out`` exists and ``overwrite`` is False.
    """
    path, given = Path(path), labels or Labels()
    names = [(file, name) for file in _traces(path) for name in _trial_names(file)]

    def episodes() -> Generator[Found]:
        for file, name in names:
            where = f"'{file}': '{name}'"
            with h5py.File(file, "r") as trace:
                trial = get_group(trace, name)
                check_group(trial)
                arrays, success = _as_minari(flatten(trial), where)
                attributes = read_attributes(trial.attrs, str(trial.name))
            if success is not None:
                attributes.setdefault("success", success)
            keys = given.state_keys
            if not keys and "observations/observation" not in arrays:
                keys = [key for key in _JOINTS if f"observations/{key}" in arrays]
            yield Found(arrays, attributes, replace(given, state_keys=keys), path.resolve().stem, where)

    return write_store(
        Path(out).absolute(), episodes(), total=len(names), render=render, overwrite=overwrite, progress=progress
    )


def _traces(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".h5", ".hdf5"))
        for file in files:
            check_inside(file, path)
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"no trace '.h5' at '{path}'; give one, or a folder that holds some")
    if files[0].suffix in (".pickle", ".pkl"):
        raise ValueError(f"'{path}' is a pickle, which could run code; save the trace as .h5 with RoboHive")
    return files


def _trial_names(file: Path) -> Iterator[str]:
    """Groups ``Trial0``, ``Trial1`` ... of a trace, in order of their numbers."""
    try:
        with h5py.File(file, "r") as trace:
            found = [name for name in map(str, trace) if re.fullmatch(r"\D{0,40}\d{1,9}", name)]
            links = [name for name in found if not isinstance(trace.get(name, getlink=True), h5py.HardLink)]
            groups = [name for name in found if name not in links and isinstance(trace[name], h5py.Group)]
    except OSError as error:
        raise ValueError(f"'{file}' is no HDF5 file that can be read ({error})") from error
    if links or not groups:
        what = f"'{links[0]}' is a link to something else; refused" if links else "it has no group such as 'Trial0'"
        raise ValueError(f"'{file}' is not of RoboHive or RoboSet: {what}")
    return iter(sorted(groups, key=lambda name: int(re.sub(r"\D", "", name))))


def _as_minari(arrays: Arrays, where: str) -> tuple[Arrays, bool | None]:
    """Arrays by Minari's names, and whether the trial was solved if it says so as a whole."""
    roboset = "data/ctrl_arm" in arrays
    parts = ["data/ctrl_arm", "data/ctrl_ee"] if roboset else ["actions"]
    missing = [key for key in parts if key not in arrays or arrays[key].ndim not in (1, 2)]
    if missing:
        raise ValueError(f"{where} has no '{missing[0]}', so it is no trial of RoboHive or RoboSet")
    rows = min(len(arrays[key]) for key in parts)
    actions = np.concatenate([arrays[key][:rows].reshape(rows, -1) for key in parts], axis=1)
    acted = np.flatnonzero(~np.isnan(actions.astype(np.float64)).all(axis=1))
    if not len(acted):
        raise ValueError(f"{where} has no action that is not NaN")
    steps = int(acted[-1]) + 1
    result: Arrays = {"actions": actions[:steps]}
    for key, array in arrays.items():
        if array.ndim and len(array) == rows and array.dtype.kind in "biuf":
            name, values = _observation(key, array)
            if name is not None and not (values.dtype.kind == "f" and np.isnan(values).all()):  # None became NaN
                result[name] = _moments(values, steps)
    rewards = arrays.get("rewards", np.zeros(rows))
    aligned = rewards[1 : steps + 1] if rows > steps else rewards[:steps]
    result["rewards"] = aligned.reshape(steps, -1)[:, 0]
    done = arrays.get("done", arrays.get("env_infos/done"))
    last = np.arange(steps) == steps - 1
    ended = done is not None and len(done) >= rows and bool(np.any(done[min(steps, rows - 1)] == 1))
    result["terminations"], result["truncations"] = last & ended, last & (not ended)
    solved = arrays.get("config/solved")
    return result, None if solved is None or not solved.size else bool(np.nan_to_num(solved.reshape(-1)[-1]) > 0)


def _observation(key: str, array: np.ndarray) -> tuple[str | None, np.ndarray]:
    """What an array of a trial is called in Minari's layout, pictures as ``[T+1, H, W, 3]``; None to leave it out."""
    camera = _CAMERA.fullmatch(key)
    if array.dtype == np.uint8 and array.ndim >= 2 and (camera or array.shape[-1] == 3):
        name = camera["name"] if camera else key.rsplit("/", 1)[-1].rsplit(".", 1)[-1]
        if array.ndim == 5 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim == 2 and camera and camera["height"]:
            height, width = int(camera["height"]), int(camera["width"])
            if array.shape[1] != height * width * 3:
                return None, array
            array = array.reshape(len(array), height, width, 3)
        return f"observations/{name}", array
    if key == "observations":
        return "observations/observation", array
    for prefix in ("env_infos/obs_dict.", "data/"):
        if key.startswith(prefix) and not key.startswith("data/ctrl_"):
            name = key.removeprefix(prefix)
            return ("infos/time" if name == "time" else f"observations/{name}"), array
    if key in ("env_infos/solved", "env_infos/rwd_dict.solved"):
        return "infos/success", array.reshape(len(array), -1)[:, 0]
    if key.startswith(("env_infos/", "time", "derived/")):
        return f"infos/{key.split('/', 1)[-1]}", array
    return None, array


def _moments(array: np.ndarray, steps: int) -> np.ndarray:
    """The ``T + 1`` moments of an episode; the last of them twice where a trace has only ``T``."""
    return array[: steps + 1] if len(array) > steps else np.concatenate([array, array[-1:]])
