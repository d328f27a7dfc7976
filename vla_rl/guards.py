"""What watches over a run: pure checks of pictures, weights and successes that say in a sentence what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.evaluation import EvaluationResult, paired_difference
from vla_rl.settings import check_positive


@dataclass
class GuardConfig:
    """When the trainer steps in. Each default is our choice."""

    worker_timeout: float | None = 600.0
    """seconds without an answer after which an env worker counts as hanging; None waits for ever"""
    max_worker_restarts: int = 3
    """how often each worker that hangs or dies in stage 1 is started again, and a hanging evaluation repeated"""
    rollback_after: int = 2
    """evaluations in a row below SFT (paired 95 % interval on the RL tasks) before rolling back; 0: never"""
    keep_checkpoints: int | None = None
    """newest checkpoints to keep, beside the best evaluated one; None keeps all"""

    def __post_init__(self) -> None:
        if self.worker_timeout is not None:
            check_positive(worker_timeout=self.worker_timeout)
        if self.keep_checkpoints is not None and self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints={self.keep_checkpoints}; expected at least 1, or None to keep all")
        if self.max_worker_restarts < 0 or self.rollback_after < 0:
            raise ValueError(
                f"max_worker_restarts={self.max_worker_restarts}, rollback_after={self.rollback_after}: "
                "both must be 0 or more"
            )


class PictureError(ValueError):
    """Images without a picture: no VLM can act on them."""


def blank_problem(images: np.ndarray, *, whose: str) -> str | None:
    """What to say if every image is of one colour.

    Args:
        images: uint8 [N, H, W, 3].
        whose: where they come from.
    """
    flat = images.reshape(len(images), -1, images.shape[-1])
    if not len(flat) or (flat.max(axis=1) != flat.min(axis=1)).any():
        return None
    colour = flat[0, 0].tolist()
    name = "black" if not flat.any() else f"of one colour {colour}"
    return (
        f"all {len(images)} images of {whose} are {name}; check the renderer (MUJOCO_GL, render_mode, camera) before "
        "training on them"
    )


_TURNS = {
    "upside down": lambda image: image[::-1],
    "mirrored": lambda image: image[:, ::-1],
    "turned by 180 degrees": lambda image: image[::-1, ::-1],
    "with red and blue exchanged": lambda image: image[..., ::-1],
}


def orientation_problem(reference: np.ndarray, images: np.ndarray, *, margin: float = 0.2) -> str | None:
    """What to say if images look far more like the reference when flipped, turned or with channels exchanged.

    Compared are the mean images, by correlation over pixels and channels: a scene whose standing parts look the same
    both ways cannot be told apart, and nothing is said then.

    Args:
        reference: uint8 [N, H, W, 3], such as first frames of expert episodes.
        images: uint8 [M, H', W', 3], such as first frames of an env.
        margin: how much higher the correlation must be.
    """
    if reference.shape[1:] != images.shape[1:]:
        return (
            f"the env's images are {images.shape[1]} x {images.shape[2]}, the expert data's {reference.shape[1]} x "
            f"{reference.shape[2]}; use the same image_size and camera"
        )
    expected, mean = reference.mean(axis=0), images.mean(axis=0)
    as_it_is = _correlation(expected, mean)
    turned = {name: _correlation(expected, turn(mean)) for name, turn in _TURNS.items()}
    best = max(turned, key=lambda name: turned[name])
    if turned[best] < 0.5 or turned[best] - as_it_is < margin:
        return None
    return (
        f"the env's images seem to be {best}, compared with the expert data (correlation of the mean images "
        f"{as_it_is:.2f} as they are, {turned[best]:.2f} so changed); compare two pictures by eye"
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0


def first_not_finite(tensors: Mapping[str, Tensor | None]) -> str | None:
    """The first tensor with NaN or infinite entries, and how many they are; None if there is none."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{name} ({int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} entries)"
    return None


def weights_problem(module: nn.Module) -> str | None:
    """What to say if a weight or buffer is NaN or infinite."""
    found = first_not_finite(dict(module.state_dict()))
    return None if found is None else f"NaN or infinite weights in {found}"


def never_succeeded(groups: Mapping[str, EvaluationResult]) -> str | None:
    """What to say if no episode of any task succeeded."""
    episodes = [e for result in groups.values() for task in result.tasks.values() for e in task.episodes]
    if not episodes or any(episode.success for episode in episodes):
        return None
    mean = float(np.mean([episode.episode_return for episode in episodes]))
    return (
        f"none of {len(episodes)} evaluation episodes on any task succeeded (mean return {mean:.2f}); either the "
        "policy has not learned enough (train stage 0 longer), or the env never sets info['success']"
    )


def below_start(history: Sequence[EvaluationResult], *, patience: int) -> bool:
    """Whether the latest `patience` evaluations all lie below the first, by the paired 95 % interval.

    Args:
        history: the evaluation after SFT, then those since it or since the latest rollback, on the same seeds.
        patience: how many in a row; 0 for never.
    """
    if not patience or len(history) <= patience:
        return False
    return all(paired_difference(history[0], result)[2] < 0 for result in history[-patience:])
