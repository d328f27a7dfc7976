"""Frames to pixel inputs: a batched torch path that is checked against the Hugging Face processor before it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]
_MODES = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class _Plan:
    size: Size
    shape: tuple[int, ...]
    patches: bool


class PixelPipeline:
    """Turns uint8 frames into the model's `pixel_values`.

    For each new frame size the torch path (resize on uint8, rescale, normalise, layout) is compared with the
    processor on a random frame. Where the two differ by more than one grey level anywhere, or by more than a fifth
    of one on average, the processor is used for that size.

    Args:
        image_processor: The Hugging Face image processor, read for its sizes, means and deviations.
        reference: Runs the processor on one frame `[H, W, 3]` and returns its tensors.
    """

    def __init__(self, image_processor: Any, reference: Callable[[np.ndarray], dict[str, Tensor]]) -> None:
        self.image_processor = image_processor
        self.reference = reference
        self._plans: dict[Size, _Plan | None] = {}
        self._joint_shapes: dict[tuple[Size, int], tuple[int, ...]] = {}
        self._moments: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, frames: Tensor) -> Tensor:
        """Pixel inputs for `frames` uint8 `[B, H, W, 3]`, laid out and stacked as the processor does."""
        plan = self._plan((frames.shape[1], frames.shape[2]))
        if plan is None:
            rows = [self.reference(frame.cpu().numpy())["pixel_values"] for frame in frames]
            return torch.cat(rows).to(frames.device)
        return self._torch(frames, plan)

    def joint(self, frames: Tensor) -> Tensor:
        """Pixel inputs for `frames` uint8 `[B, N, H, W, 3]`, N images per prompt, laid out as the processor does.

        Raises:
            ValueError: If the processor treats several images in another way than each alone.
        """
        size, views = (frames.shape[2], frames.shape[3]), frames.shape[1]
        pixels = self(frames.flatten(0, 1))
        if (size, views) not in self._joint_shapes:
            self._joint_shapes[size, views] = self._joint_shape(size, views)
        shape = self._joint_shapes[size, views]
        return pixels.reshape(-1, *shape[1:]) if shape[0] == 1 else pixels

    def _joint_shape(self, size: Size, views: int) -> tuple[int, ...]:
        """Shape of the processor's pixels for one prompt with `views` images, after a comparison with each alone."""
        frames = np.random.default_rng(1).integers(0, 256, (views, *size, 3), dtype=np.uint8)
        expected = self.reference(frames)["pixel_values"]
        singles = torch.cat([self.reference(frame)["pixel_values"] for frame in frames])
        if expected.numel() != singles.numel() or not torch.equal(expected.reshape(singles.shape), singles):
            raise ValueError(
                f"{type(self.image_processor).__name__} makes {tuple(expected.shape)} of {views} frames, but "
                f"{tuple(singles.shape)} of the same frames one by one; use views='separate'"
            )
        return tuple(expected.shape)

    def uses_torch(self, size: Size) -> bool:
        """Whether frames of `size` (H, W) take the torch path rather than the processor."""
        return self._plan(size) is not None

    def _plan(self, size: Size) -> _Plan | None:
        if size not in self._plans:
            self._plans[size] = self._verified(size)
        return self._plans[size]

    def _verified(self, size: Size) -> _Plan | None:
        frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        inputs = self.reference(frame)
        expected = inputs["pixel_values"]
        grid = inputs.get("image_grid_thw")
        if expected.ndim == 2 and grid is not None:
            patch = self.image_processor.patch_size
            plan = _Plan((int(grid[0, 1]) * patch, int(grid[0, 2]) * patch), (), True)
        elif expected.ndim >= 4 and expected.shape[-3] == 3 and all(n == 1 for n in expected.shape[:-3]):
            plan = _Plan((expected.shape[-2], expected.shape[-1]), tuple(expected.shape[1:]), False)
        else:
            return None
        try:
            actual = self._torch(torch.from_numpy(frame)[None], plan)
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return None
        if actual.shape != expected.shape:
            return None
        deviations = getattr(self.image_processor, "image_std", None) or [1.0]
        level = 1.0 / 255 / min(deviations)
        error = (actual - expected).abs()
        return plan if error.max() <= 1.01 * level and error.mean() <= 0.2 * level else None

    def _torch(self, frames: Tensor, plan: _Plan) -> Tensor:
        processor = self.image_processor
        pixels = frames.permute(0, 3, 1, 2)
        if tuple(pixels.shape[-2:]) != plan.size:
            mode = _MODES[int(processor.resample)]
            if frames.device.type == "cpu":
                pixels = F.interpolate(pixels, size=plan.size, mode=mode, antialias=True)
            elif mode == "lanczos":
                pixels = _lanczos(pixels, plan.size)
            else:
                pixels = F.interpolate(pixels.float(), size=plan.size, mode=mode, antialias=True)
                pixels = pixels.round_().clamp_(0, 255)
        pixels = pixels.float()
        if getattr(processor, "do_rescale", True):
            pixels = pixels * processor.rescale_factor
        if getattr(processor, "do_normalize", True):
            if frames.device not in self._moments:
                mean, std = torch.tensor([processor.image_mean, processor.image_std]).to(frames.device)
                self._moments[frames.device] = mean.view(3, 1, 1), std.view(3, 1, 1)
            mean, std = self._moments[frames.device]
            pixels = (pixels - mean) / std
        if plan.patches:
            return self._patchify(pixels)
        return pixels.reshape(-1, *plan.shape)

    def _patchify(self, pixels: Tensor) -> Tensor:
        """Flatten `[B, 3, h, w]` into `[B * grid, 3 * time * patch * patch]`, merge blocks contiguous."""
        processor = self.image_processor
        patch, merge, time = processor.patch_size, processor.merge_size, processor.temporal_patch_size
        batch, channels, height, width = pixels.shape
        rows, columns = height // patch // merge, width // patch // merge
        blocks = pixels.reshape(batch, channels, rows, merge, patch, columns, merge, patch)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        blocks = blocks.expand(-1, -1, -1, -1, -1, -1, time, -1, -1)
        return blocks.reshape(batch * rows * columns * merge * merge, channels * time * patch * patch)


def _lanczos(pixels: Tensor, size: Size) -> Tensor:
    """Resize `[B, 3, h, w]` as Pillow does, rows and then columns in whole levels; torch has this for the CPU alone."""
    pixels = pixels.double()  # which autocast leaves as it is
    for old, new in zip(pixels.shape[:1:-1], size[::-1], strict=True):
        pixels = (pixels @ _lanczos_weights(old, new, pixels.device)).add_(0.5).floor_().clamp_(0, 255).mT
    return pixels


@lru_cache(maxsize=64)
def _lanczos_weights(old: int, new: int, device: torch.device) -> Tensor:
    """The matrix `[old, new]` that a resize multiplies a row of pixels by: what it makes of the unit matrix."""
    units = torch.eye(old)[None, None]
    return F.interpolate(units, size=(new, old), mode="lanczos", antialias=True)[0, 0].T.double().to(device)
