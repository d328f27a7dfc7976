"""What a run must have in common with the one it continues: its settings, tasks, expert data and first weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vla_rl.config import IterativeConfig
from vla_rl.data.store import EpisodeStore
from vla_rl.encoders.lora import LoRASettings
from vla_rl.policy import VLAPolicy
from vla_rl.rundir import RunDirectoryError, read_json

MAY_DIFFER = (
    "num_workers",
    "video_episodes",
    "stage0.cache_dir",
    "stage2.cache_dir",
    "stage0.snapshot_every",
    "stage2.snapshot_every",
)
"""Fields of `IterativeConfig` that change no weight and no table; every other field must be as it was."""


def start_facts(
    *,
    rl_tasks: Sequence[str],
    eval_tasks: Mapping[str, Sequence[str]],
    lora: LoRASettings | None,
    expert: Sequence[EpisodeStore],
    policy: VLAPolicy,
) -> dict[str, Any]:
    """What `start.json` holds, in plain JSON types: all that decides a run besides its configuration and its envs."""
    facts = {
        "rl_tasks": list(rl_tasks),
        "eval_tasks": {group: list(tasks) for group, tasks in eval_tasks.items()},
        "lora": None if lora is None else asdict(lora),
        "expert": [{"episodes": len(store), "steps": store.total_steps} for store in expert],
        "policy": policy_digest(policy),
    }
    return json.loads(json.dumps(facts))


def policy_digest(policy: VLAPolicy) -> str:
    """Hash of all weights: of the encoder by its fingerprint, of head and normalisation by their bytes."""
    digest = hashlib.blake2b(policy.encoder.fingerprint.encode(), digest_size=8)
    for name, value in sorted(policy.state_dict().items()):
        if not name.startswith("encoder."):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_other_run(path: Path, *, config: IterativeConfig, facts: Mapping[str, Any], compare_policy: bool) -> None:
    """Compare a run directory with what it is to be continued with.

    Args:
        path: the directory; `config.json` or `start.json` may be missing in one that was killed at its very beginning
            or written by an earlier version.
        config: configuration to continue with.
        facts: from `start_facts`.
        compare_policy: whether the run begins from the policy given, as no checkpoint has been written.

    Raises:
        RunDirectoryError: naming the first field that differs.
    """
    given: dict[str, Any] = {"config.json": json.loads(json.dumps(asdict(config))), "start.json": dict(facts)}
    for file, values in given.items():
        if not (path / file).is_file():
            continue
        for field, before, now in differences(read_json(path / file), values):
            if field in MAY_DIFFER or (field == "policy" and not compare_policy):
                continue
            raise RunDirectoryError(
                f"{path} was begun with {field}={_short(before)}, now it is {_short(now)}; resume with the same, or "
                f"start a new run (only {', '.join(MAY_DIFFER)} may change)"
            )


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of every field that differs; fields that only one side knows are left out."""
    for key in before:
        if key not in now:
            continue
        old, new = before[key], now[key]
        if isinstance(old, dict) and isinstance(new, dict) and not (prefix == "" and key == "eval_tasks"):
            yield from differences(old, new, prefix=f"{prefix}{key}.")
        elif old != new and not (old != old and new != new):
            yield f"{prefix}{key}", old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
