"""Malformed stores, run directories, policies, settings and env outputs, each made from a good one by one change.

A case's `make` gets the path of a good folder and spoils it. Nothing here is stored: every file is made by code.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Change = Callable[[Path], None]

# Bytes of one file


def _cut(share: float) -> Change:
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


def _write(content: bytes) -> Change:
    return lambda path: path.write_bytes(content) and None


def _flip(position: float) -> Change:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(int(position * len(content)), len(content) - 1)] ^= 0xFF
        path.write_bytes(content)

    return change


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_link(target: str) -> Change:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return change


BYTES: dict[str, Change] = {
    "empty": _cut(0),
    "cut-to-a-tenth": _cut(0.1),
    "cut-in-half": _cut(0.5),
    "cut-at-the-end": _cut(0.97),
    "text": _write(b"hello, this is no such file\n"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "not-utf-8": _write(b"\xff\xfe{}\x80" * 20),
    "first-byte-flipped": _flip(0),
    "a-folder": _replace_by_folder,
    "link-to-nowhere": _replace_by_link("nowhere/at/all"),
    "link-to-itself": lambda path: _replace_by_link(path.name)(path),
    "missing": lambda path: path.unlink(),
}

JSON_BYTES: dict[str, Change] = {
    "deep": _write(b"[" * 200_000),
    "a-list": _write(b"[1, 2, 3]"),
    "a-number": _write(b"1e400"),
    "a-long-number": _write(b'{"x": ' + b"9" * 10_000 + b"}"),
    "null": _write(b"null"),
    "two-values": _write(b"{} {}"),
    "no-keys": _write(b"{}"),
}


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _set(*keys: Any, to: Any) -> Callable[[Any], None]:
    """Set what lies at a path of keys; with `to` a function, to what it makes of the value there."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


def _json(file: str, *keys: Any, to: Any) -> Change:
    return lambda root: edit_json(root / file, _set(*keys, to=to))


def _on(file: str, change: Change) -> Change:
    return lambda root: change(root / file)


# Episode stores

METADATA, INDEX, LINKS = "data/metadata.json", "data/episodes.jsonl", "data/main_data.hdf5"
EPISODE = "data/episodes/000000.hdf5"


def _hdf5(change: Callable[[h5py.Group], None]) -> Change:
    """Change the first episode, and let the index say the size that its file has now."""

    def spoil(root: Path) -> None:
        with h5py.File(root / EPISODE, "r+") as file:
            change(file["episode_0"])
        lines = (root / INDEX).read_text().splitlines()
        first = json.loads(lines[0]) | {"num_bytes": (root / EPISODE).stat().st_size}
        (root / INDEX).write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")

    return spoil


def _array(name: str, value: Any, **options: Any) -> Change:
    def change(group: h5py.Group) -> None:
        del group[name]
        group.create_dataset(name, data=value, **options)

    return _hdf5(change)


def _claims(name: str, shape: tuple[int, ...], dtype: str, **options: Any) -> Change:
    """A dataset that claims a size which is not in the file."""

    def change(group: h5py.Group) -> None:
        del group[name]
        group.create_dataset(name, shape=shape, dtype=dtype, **options)

    return _hdf5(change)


def _link(name: str, link: Any) -> Change:
    def change(group: h5py.Group) -> None:
        del group[name]
        group[name] = link

    return _hdf5(change)


def _bomb(group: h5py.Group) -> None:
    """It claims 2 GB, of which 7 MB of zeros are there, in a few kB."""
    del group["observations/image"]
    group.create_dataset(
        "observations/image", shape=(20_000, 187, 187, 3), dtype="u1", chunks=(100, 187, 187, 3), compression="gzip"
    )
    frames = np.zeros((100, 187, 187, 3), np.uint8)
    for start in range(0, 200, 100):
        group["observations/image"][start : start + 100] = frames


def _external(group: h5py.Group) -> None:
    del group["rewards"]
    group.create_dataset("rewards", shape=(5,), dtype="f8", external=[("/etc/passwd", 0, 40)])


def _virtual(group: h5py.Group) -> None:
    del group["actions"]
    layout = h5py.VirtualLayout(shape=(5, 4), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "actions", shape=(5, 4))
    group.create_virtual_dataset("actions", layout)


def _attribute(name: str, value: Any) -> Change:
    return _hdf5(lambda group: group.attrs.__setitem__(name, value))


def _index_line(**changes: Any) -> Change:
    def spoil(root: Path) -> None:
        lines = (root / INDEX).read_text().splitlines()
        (root / INDEX).write_text("\n".join([json.dumps(json.loads(lines[0]) | changes), *lines[1:]]) + "\n")

    return spoil


def stores() -> Iterator[tuple[str, Change]]:
    """Of a store with two episodes of five steps, actions [5, 4], images [6, 8, 8, 3], state [6, 3]."""
    for file, name in ((METADATA, "metadata"), (INDEX, "index"), (LINKS, "links"), (EPISODE, "episode")):
        for what, change in BYTES.items():
            yield f"{name}-{what}", _on(file, change)
    for what, change in JSON_BYTES.items():
        yield f"metadata-{what}", _on(METADATA, change)
        yield f"index-{what}", _on(INDEX, change)
    for name in ("actions", "rewards", "terminations", "truncations", "observations", "observations/image"):
        yield f"no-{name.replace('/', '-')}", _hdf5(lambda group, name=name: group.__delitem__(name))
    nan = np.full((5, 4), np.nan, np.float32)
    arrays = {
        "actions-nan": ("actions", nan),
        "actions-float64": ("actions", np.zeros((5, 4))),
        "actions-strings": ("actions", np.array([[b"a"] * 4] * 5)),
        "actions-flat": ("actions", np.zeros(20, np.float32)),
        "actions-scalar": ("actions", np.float32(1)),
        "actions-none": ("actions", np.zeros((0, 4), np.float32)),
        "actions-wide": ("actions", np.zeros((5, 7), np.float32)),
        "actions-long": ("actions", np.zeros((9, 4), np.float32)),
        "rewards-infinite": ("rewards", np.full(5, np.inf)),
        "rewards-short": ("rewards", np.zeros(2)),
        "rewards-float32": ("rewards", np.zeros(5, np.float32)),
        "terminations-ints": ("terminations", np.zeros(5, np.int64)),
        "image-floats": ("observations/image", np.zeros((6, 8, 8, 3))),
        "image-four-channels": ("observations/image", np.zeros((6, 8, 8, 4), np.uint8)),
        "image-channels-first": ("observations/image", np.zeros((6, 3, 8, 8), np.uint8)),
        "image-one-short": ("observations/image", np.zeros((5, 8, 8, 3), np.uint8)),
        "image-compound": ("observations/image", np.zeros(6, [("a", "u1"), ("b", "f4")])),
        "state-nan": ("observations/state", np.full((6, 3), np.nan, np.float32)),
        "state-complex": ("observations/state", np.zeros((6, 3), np.complex64)),
        "task-id-negative": ("observations/task_id", np.full(6, -1)),
        "task-id-huge": ("observations/task_id", np.full(6, 2**62)),
        "task-id-floats": ("observations/task_id", np.zeros(6)),
    }
    for what, (name, value) in arrays.items():
        yield what, _array(name, value)
    yield "actions-vlen", _array("actions", ["x"] * 5, dtype=h5py.string_dtype())
    yield "actions-claim-a-terabyte", _claims("actions", (10**11, 4), "f4", chunks=(1000, 4))
    yield "image-claims-a-petabyte", _claims("observations/image", (10**9, 512, 512, 3), "u1", chunks=(1, 512, 512, 3))
    yield "rewards-claim-a-gigabyte", _claims("rewards", (10**8,), "f8", chunks=(1000,))
    yield "image-gzip-bomb", _hdf5(_bomb)
    yield "rewards-from-another-file", _hdf5(_external)
    yield "actions-virtual", _hdf5(_virtual)
    yield "actions-soft-link-to-nowhere", _link("actions", h5py.SoftLink("/nowhere"))
    yield "actions-external-link", _link("actions", h5py.ExternalLink("/etc/passwd", "/actions"))
    yield "observations-link-to-parent", _link("observations", h5py.SoftLink("/episode_0"))
    attributes = {"task": 5, "instruction": b"\xff\xfe", "success": "yes", "iteration": -1.5, "source": "", "id": 7}
    for name, value in attributes.items():
        yield f"attribute-{name}", _attribute(name, value)
        yield f"no-attribute-{name}", _hdf5(lambda group, name=name: group.attrs.__delitem__(name))
    yield "attribute-seed-array", _attribute("seed", np.zeros(3))
    yield "group-renamed", _hdf5(lambda group: group.file.move("episode_0", "episode_9"))
    for field, value in {
        "total_steps": "many", "task": None, "max_task_id": "x", "moments": 5, "return_": [], "unknown": 1, "seed": {}
    }.items():  # fmt: skip
        yield f"index-line-{field}", _index_line(**{field: value})
    for field, value in {"step_shapes": {"actions": 3}, "vla_rl_format": "1", "observation_space": 5}.items():
        yield f"metadata-{field}", _json(METADATA, field, to=value)


# Run directories


def runs() -> Iterator[tuple[str, Change]]:
    """Of a run whose stage 0 has finished with a checkpoint."""
    for file in ("state.json", "results.json", "config.json", "start.json"):
        for what, change in {**BYTES, **JSON_BYTES}.items():
            if what not in ("missing", "link-to-nowhere", "link-to-itself", "a-folder", "no-keys"):
                yield f"{file}-{what}", _on(file, change)
    for what in ("text", "not-utf-8", "cut-in-half"):
        yield f"metrics.jsonl-{what}", _on("metrics.jsonl", BYTES[what])
    for what, line in {
        "no-object": b"[1}",
        "no-phase": b'{"step": 1}',
        "list-phase": b'{"phase": [], "step": {}}',
    }.items():
        yield f"metrics.jsonl-{what}", _on("metrics.jsonl", _write(line + b"\n"))
    values: dict[str, tuple[tuple[Any, ...], Any]] = {
        "done-a-number": (("done",), 5),
        "done-numbers": (("done",), [1, 2]),
        "done-too-long": (("done",), ["stage0", "eval-stage0", "x"]),
        "after-short": (("after",), []),
        "after-a-number": (("after",), 1),
        "after-other": (("after",), ["checkpoints/x", None]),
        "checkpoint-outside": (("checkpoint",), "../../etc"),
        "checkpoint-absolute": (("checkpoint",), "/etc"),
        "checkpoint-a-number": (("checkpoint",), 5),
        "checkpoint-dots": (("checkpoint",), "checkpoints/.."),
        "checkpoint-zero-byte": (("checkpoint",), "checkpoints/a\0b"),
        "files-a-list": (("files",), [1]),
        "files-of-numbers": (("files",), {"checkpoints/stage0": 5}),
        "files-outside": (("files",), {"checkpoints/stage0": {"../../../etc/passwd": [1, "x"]}}),
        "files-absolute": (("files",), {"checkpoints/stage0": {"/etc/passwd": [1, "x"]}}),
        "files-no-checksum": (("files",), {"checkpoints/stage0": {"policy.json": 7}}),
    }
    for what, (keys, value) in values.items():
        yield f"state-{what}", _json("state.json", *keys, to=value)


def damaged_checkpoints() -> Iterator[tuple[str, Change]]:
    """Of the same run: each is passed over with a warning."""
    for file in ("policy.json", "head.safetensors", "encoder/encoder.json"):
        for what in ("empty", "cut-in-half", "first-byte-flipped", "missing", "a-folder"):
            yield f"{file}-{what}", _on(f"checkpoints/stage0/{file}", BYTES[what])
    yield "all-missing", lambda root: shutil.rmtree(root / "checkpoints" / "stage0")


# Saved policies


def _header(change: Callable[[dict[str, Any]], None]) -> Change:
    """Change the JSON header of a safetensors file, keeping its tensors' bytes."""

    def spoil(path: Path) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def _tensor(name: str, value: float) -> Change:
    """Overwrite the first entry of a float32 tensor."""

    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        start = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
        content[start : start + 4] = struct.pack("<f", value)
        path.write_bytes(content)

    return spoil


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


def policies() -> Iterator[tuple[str, Change]]:
    """Of a saved policy with a Gaussian head and the weights of a small VLM."""
    for file in ("policy.json", "encoder/encoder.json"):
        for what, change in {**BYTES, **JSON_BYTES}.items():
            yield f"{file}-{what}", _on(file, change)
    for file in ("head.safetensors", "encoder/model/model.safetensors"):
        for what, change in BYTES.items():
            yield f"{file}-{what}", _on(file, change)
        for what, spoil in {
            "header-of-an-exabyte": lambda path: (
                path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:]) and None
            ),
            "claims-a-terabyte": _header(lambda h: _first(h).update(shape=[10**12], data_offsets=[0, 4 * 10**12])),
            "offsets-backwards": _header(lambda h: _first(h).update(data_offsets=[8, 0])),
            "of-unknown-type": _header(lambda h: _first(h).update(dtype="X9")),
            "of-other-shape": _header(lambda h: _first(h).update(shape=[1, *_first(h)["shape"]])),
            "tensor-renamed": _header(lambda h: h.update(renamed=h.pop(next(k for k in h if k != "__metadata__")))),
        }.items():
            yield f"{file}-{what}", _on(file, spoil)
    for name, value in {
        "action_mean": float("nan"),
        "action_std": 0.0,
        "state_std": -1.0,
        "state_mean": float("inf"),
    }.items():
        yield f"normaliser-{name}", _on("head.safetensors", _tensor(name, value))
    for what, (keys, value) in {
        "model-type-unknown": (("model_type",), "nonsense"),
        "model-type-a-number": (("model_type",), 5),
        "model-of-text-alone": (("model_type",), "gpt2"),
        "hidden-size-a-word": (("text_config", "hidden_size"), "wide"),
        "hidden-size-negative": (("text_config", "hidden_size"), -32),
        "hidden-size-of-terabytes": (("text_config", "hidden_size"), 2**24),
        "hidden-size-past-int64": (("text_config", "hidden_size"), 2**62),
        "vocabulary-of-gigabytes": (("text_config", "vocab_size"), 2**27),
        "layers-without-end": (("text_config", "num_hidden_layers"), 10**9),
        "text-config-a-list": (("text_config",), [1]),
    }.items():
        yield f"model-config-{what}", _json("encoder/model/config.json", *keys, to=value)
    for what in ("empty", "cut-in-half", "not-utf-8", "first-byte-flipped"):
        yield f"model-config-{what}", _on("encoder/model/config.json", BYTES[what])
    for what in ("deep", "a-list", "null", "no-keys"):
        yield f"model-config-{what}", _on("encoder/model/config.json", JSON_BYTES[what])
    for what, (keys, value) in {
        "no-class": (("head",), {"kwargs": {}}),
        "class-a-function": (("head", "class"), "os:system"),
        "class-no-head": (("head", "class"), "collections:OrderedDict"),
        "class-with-a-newline": (("head", "class"), "os:system\nrm"),
        "class-a-path": (("head", "class"), "../../evil:Head"),
        "class-unknown": (("head", "class"), "nowhere.at.all:Head"),
        "class-a-number": (("head", "class"), 5),
        "kwargs-unknown": (("head", "kwargs", "nonsense"), 1),
        "kwargs-a-list": (("head", "kwargs"), [1]),
        "width-negative": (("head", "kwargs", "width"), -3),
        "width-a-word": (("head", "kwargs", "width"), "wide"),
        "width-of-a-terabyte": (("head", "kwargs", "width"), 2**40),
        "action-dim-other": (("head", "kwargs", "action_dim"), 3),
        "format-2": (("format",), 2),
    }.items():
        yield f"policy-{what}", _json("policy.json", *keys, to=value)
    for what, (key, value) in {
        "dtype": ("dtype", "float99"),
        "dtype-a-function": ("dtype", "load"),
        "layer": ("layer", 99),
        "lora": ("lora", {"nonsense": 1}),
        "image-size": ("image_size", 5),
        "image-size-negative": ("image_size", [64, -64]),
        "prompt-a-gigabyte-wide": ("prompt", "{instruction:>1000000000}"),
        "prompt-of-attributes": ("prompt", "{instruction.__class__}"),
        "prompt-torn": ("prompt", "{instruction"),
        "no-weights": ("weights", False),
        "weights-a-word": ("weights", "yes"),
        "truncate": ("truncate_layers", -1),
    }.items():
        yield f"encoder-{what}", _json("encoder/encoder.json", key, to=value)


def adapted_policies() -> Iterator[tuple[str, Change]]:
    """Of a saved policy whose VLM has an adapter too: the files of tokenizer, processor and adapter."""
    for file in (
        "encoder/model/tokenizer.json",
        "encoder/model/tokenizer_config.json",
        "encoder/model/processor_config.json",
        "encoder/model/generation_config.json",
        "encoder/adapter/adapter_config.json",
    ):
        for what, change in {**BYTES, **JSON_BYTES}.items():
            yield f"{file}-{what}", _on(file, change)
    file = "encoder/adapter/adapter_model.safetensors"
    for what, change in {
        **BYTES,
        "claims-a-terabyte": _header(lambda h: _first(h).update(shape=[10**12], data_offsets=[0, 4 * 10**12])),
        "of-other-shape": _header(lambda h: _first(h).update(shape=[1, *_first(h)["shape"]])),
        "tensor-renamed": _header(lambda h: h.update(renamed=h.pop(next(k for k in h if k != "__metadata__")))),
    }.items():
        yield f"{file}-{what}", _on(file, change)
    tokenizer = "encoder/model/tokenizer.json"
    for what, keys, value in (
        ("model-of-unknown-type", ("model", "type"), "Nonsense"),
        ("vocabulary-a-list", ("model", "vocab"), [1, 2]),
        ("added-tokens-numbers", ("added_tokens",), [1, 2]),
        ("no-vocabulary", ("model",), {}),
    ):
        yield f"tokenizer-{what}", _json(tokenizer, *keys, to=value)
    for what, keys, value in (
        ("rank-a-word", ("r",), "high"),
        ("rank-other", ("r",), 3),
        ("of-other-modules", ("target_modules",), ["nowhere"]),
        ("of-another-method", ("peft_type",), "NONSENSE"),
    ):
        yield f"adapter-{what}", _json("encoder/adapter/adapter_config.json", *keys, to=value)
    for what, keys, value in (
        ("class-unknown", ("processor_class",), "NonsenseProcessor"),
        ("image-processor-unknown", ("image_processor", "image_processor_type"), "Nonsense"),
        ("image-processor-a-number", ("image_processor",), 5),
    ):
        yield f"processor-{what}", _json("encoder/model/processor_config.json", *keys, to=value)


# Environments


def env_outputs() -> dict[str, Callable[[list[Any]], Any]]:
    """What `step` returns in place of [observation, reward, terminated, truncated, info]."""

    def observation(key: str, value: Any) -> Callable[[list[Any]], Any]:
        return lambda returned: ({**returned[0], key: value}, *returned[1:])

    def at(index: int, value: Any) -> Callable[[list[Any]], Any]:
        return lambda returned: tuple(value if k == index else part for k, part in enumerate(returned))

    return {
        "none": lambda returned: None,
        "four-values": lambda returned: tuple(returned[:4]),
        "a-list": lambda returned: returned,
        "observation-none": at(0, None),
        "observation-array": at(0, np.zeros(3)),
        "observation-empty": at(0, {}),
        "observation-more": observation("more", 1),
        "image-floats": observation("image", np.zeros((4, 4, 3))),
        "image-int64": observation("image", np.zeros((4, 4, 3), np.int64)),
        "image-channels-first": observation("image", np.zeros((3, 4, 4), np.uint8)),
        "image-grey": observation("image", np.zeros((4, 4), np.uint8)),
        "image-huge": observation("image", np.broadcast_to(np.uint8(0), (10**5, 10**5, 3))),
        "image-none": observation("image", None),
        "image-ragged": observation("image", [[1, 2], [3]]),
        "state-nan": observation("state", np.array([0, np.nan], np.float32)),
        "state-infinite": observation("state", np.array([np.inf, 0], np.float32)),
        "state-long": observation("state", np.zeros(3, np.float32)),
        "state-complex": observation("state", np.zeros(2, np.complex64)),
        "state-words": observation("state", np.array(["a", "b"])),
        "task-id-above": observation("task_id", 2),
        "task-id-negative": observation("task_id", -1),
        "task-id-a-word": observation("task_id", "reach"),
        "task-id-a-float": observation("task_id", 0.5),
        "reward-nan": at(1, float("nan")),
        "reward-infinite": at(1, -float("inf")),
        "reward-none": at(1, None),
        "reward-a-word": at(1, "good"),
        "reward-an-array": at(1, np.zeros(3)),
        "terminated-none": at(2, None),
        "terminated-a-word": at(2, "no"),
        "truncated-an-array": at(3, np.zeros(2, bool)),
        "truncated-a-number": at(3, 7),
        "info-none": at(4, None),
        "info-a-list": at(4, [1]),
    }
