"""Malformed `experiment.json`, `job.json` and snapshots of a supervised stage, made as `corpus.py` makes the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corpus import BYTES, JSON_BYTES, Change, edit_json

FILE_BYTES = {**BYTES, **JSON_BYTES}


def _set(*keys: str, to: Any) -> Change:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return lambda path: edit_json(path, change)


def _without(key: str) -> Change:
    return lambda path: edit_json(path, lambda content: content.pop(key))


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def experiments() -> Iterator[tuple[str, Change]]:
    """Of the file that `vla-rl train` has written."""
    yield from FILE_BYTES.items()
    for key in ("config", "command", "notes"):
        yield f"no-{key}", _without(key)
    for what, keys, value in (
        ("config-a-list", ("config",), [1]),
        ("config-a-word", ("config",), "metaworld"),
        ("command-a-number", ("command",), 5),
        ("notes-numbers", ("notes",), [1]),
        ("notes-a-word", ("notes",), "note"),
        ("train-a-list", ("config", "train"), [1]),
        ("train-null", ("config", "train"), None),
        ("stage0-a-number", ("config", "train", "stage0"), 5),
        ("stage0-unknown", ("config", "train", "stage0", "nonsense"), 1),
        ("many-unknown", ("config", "x" * 5000), 1),
        ("steps-a-word", ("config", "train", "stage0", "steps"), "many"),
        ("steps-a-list", ("config", "train", "stage0", "steps"), _deep(300)),
        ("steps-true", ("config", "train", "stage0", "steps"), True),
        ("seed-a-float", ("config", "train", "seed"), 0.5),
        ("scope-unknown", ("config", "train", "stage0", "scope"), "everything"),
        ("method-unknown", ("config", "method"), "magic"),
        ("tasks-numbers", ("config", "rl_tasks"), [1]),
        ("tasks-a-word", ("config", "rl_tasks"), "reach"),
        ("keep-no-checkpoint", ("config", "guards", "keep_checkpoints"), 0),
        ("env-a-word", ("config", "env"), "toy"),
    ):
        yield what, _set(*keys, to=value)


def jobs() -> Iterator[tuple[str, Change]]:
    """Of the file that a trainer hands to the processes of a supervised stage."""
    yield from FILE_BYTES.items()
    for key in ("policy", "data", "out"):
        yield f"no-{key}", _without(key)
    for what, keys, value in (
        ("data-a-word", ("data",), "expert"),
        ("data-numbers", ("data",), [1]),
        ("policy-a-number", ("policy",), 5),
        ("config-null", ("config",), None),
        ("config-a-list", ("config",), [1]),
        ("config-unknown", ("config", "nonsense"), 1),
        ("steps-a-word", ("config", "steps"), "many"),
        ("seed-null", ("seed",), None),
        ("weights-words", ("task_weights",), {"reach": "often"}),
        ("weights-a-list", ("task_weights",), [1]),
        ("lora-unknown", ("lora",), {"nonsense": 1}),
        ("lora-a-number", ("lora",), 5),
        ("unknown", ("nonsense",), 1),
    ):
        yield what, _set(*keys, to=value)


def snapshots() -> Iterator[tuple[str, str, Change]]:
    """Name, file and change of the newest snapshot of a stage: each is passed over with a warning."""
    for file in ("state.json", "process00000.json"):
        for what, change in FILE_BYTES.items():
            yield f"{file}-{what}", file, change
    for what, change in BYTES.items():
        yield f"weights-{what}", "process00000.safetensors", change
