"""Episodes of random numbers for the tests of ``vla_rl.data``; the same seed makes the same episode."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla_rl.data import Episode


def make_episode(
    number: int = 0, /, *, steps: int = 5, size: int = 8, state: int | None = 3, **changes: Any
) -> Episode:
    rng = np.random.default_rng(number)
    task_id = changes.pop("task_id", 0)
    observations = {
        "image": rng.integers(0, 256, (steps + 1, size, size, 3), dtype=np.uint8),
        "task_id": np.full(steps + 1, task_id, dtype=np.int64),
    }
    if state is not None:
        observations["state"] = rng.standard_normal((steps + 1, state)).astype(np.float32)
    fields: dict[str, Any] = {
        "observations": observations,
        "actions": rng.uniform(-1, 1, (steps, 4)).astype(np.float32),
        "rewards": rng.standard_normal(steps),
        "terminations": np.arange(steps) == steps - 1,
        "truncations": np.zeros(steps, dtype=bool),
        "success": bool(number % 2),
        "source": "expert",
        "task": "drawer-open",
        "instruction": "open the drawer",
        "seed": number,
        "iteration": 1,
        "policy_version": "abc",
        "infos": {"success": np.arange(steps + 1) == steps},
    }
    return Episode(**{**fields, **changes})


def assert_equal(first: Episode, second: Episode) -> None:
    for name, value in vars(first).items():
        other = getattr(second, name)
        pairs = {"": (value, other)}
        if isinstance(value, dict):
            assert value.keys() == other.keys(), name
            pairs = {key: (value[key], other[key]) for key in value}
        for key, (a, b) in pairs.items():
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), (name, key)
            else:
                assert a == b and type(a) is type(b), name
