"""A contact sheet of samples with their texts and places: ``python benchmarks/tiny/sheet.py OUTPUT.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from scenes import Sample, SceneSampler
from texts import Pair, parse_location, write_pairs

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def show(axis: plt.Axes, sample: Sample, pairs: list[Pair]) -> None:
    """Draw a sample, its instruction's target (circle), its gripper (cross) and one other place (square)."""
    size = sample.image.shape[0]
    axis.imshow(sample.image, extent=(0, 1, 1, 0))
    instruction = next(pair for pair in pairs if pair.kind == "instruction")
    if instruction.place:
        axis.plot(*instruction.place, "o", mfc="none", mec="lime", ms=8)
    if sample.gripper.point:
        axis.plot(*sample.gripper.point, "x", color="magenta", ms=6)
    where = [pair for pair in pairs if pair.kind == "where" and pair.place]
    if where and (place := parse_location(where[0].answer)):
        axis.plot(*place, "s", mfc="none", mec="cyan", ms=7)
    axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    texts = [f"{sample.task} {sample.style}/{sample.camera} {size}px"]
    texts += [f"{pair.prompt} > {pair.answer}" for pair in pairs if pair.kind in ("colour", "state", "relation")][:4]
    texts += [f"[] {where[0].prompt}"] if where else []
    texts += [pair.answer for pair in pairs if pair.kind == "caption"]
    axis.set_title("\n".join(text[:58] for text in texts), fontsize=4.5, loc="left", pad=2)


def main() -> None:
    """Draw 64 samples of as many sessions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="pixels per picture")
    parser.add_argument("--count", type=int, default=64)
    args = parser.parse_args()
    sampler = SceneSampler(size=args.size)
    rng = np.random.default_rng(args.seed)
    rows = -(-args.count // 8)
    figure, axes = plt.subplots(rows, 8, figsize=(16, 2.6 * rows), dpi=110)
    for axis in axes.flat:
        sample = sampler.session(rng, 1)[0]
        show(axis, sample, write_pairs(sample, rng))
    figure.tight_layout()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)


if __name__ == "__main__":
    main()
