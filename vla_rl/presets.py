"""Named starting points for `vla-rl train`; every field can be overridden from the command line."""

from __future__ import annotations

import gymnasium as gym


def split_label(label: str) -> tuple[str, str]:
    """`"drawer-open:new"` -> `("drawer-open", "new")`; without a colon the variant is "original"."""
    task, _, variant = label.partition(":")
    return task, variant or "original"


def make_env(label: str, *, env_id: str, image_size: int, horizon: int) -> gym.Env:
    """An env in the observation convention for a task label."""
    task, variant = split_label(label)
    return gym.make(env_id, task=task, variant=variant, image_size=image_size, horizon=horizon)
