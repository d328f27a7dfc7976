"""A film of two policies on the same resets, side by side: ``python benchmarks/before_after.py --after POLICY``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from vla_rl import VLAPolicy
from vla_rl.experiment import EnvConfig, make_env
from vla_rl.presets import DEMO_RL, METAWORLD_BASE

FONT = ImageFont.load_default(size=15)


@dataclass
class Args:
    """What to film."""

    after: Path
    """directory of the policy on the right"""
    before: Path = Path(METAWORLD_BASE)
    """directory of the policy on the left"""
    task: str = DEMO_RL[0]
    """task label"""
    seeds: tuple[int, ...] = (10_000, 10_001, 10_002)
    """reset seeds: those of the evaluation's first episodes, whatever comes of them"""
    pixels: int = 240
    """size of the film; the policies see 64 x 64"""
    every: int = 4
    """env steps per frame"""
    out: Path = Path("docs/demo.gif")


def play(policy: VLAPolicy, task: str, *, seed: int, pixels: int) -> tuple[list[np.ndarray], bool]:
    """Frames [pixels, pixels, 3] of one deterministic episode, and whether it succeeded."""
    env, camera = make_env(task, EnvConfig()), make_env(task, EnvConfig(image_size=pixels))
    obs, info = env.reset(seed=seed)
    instruction = info["instruction"]
    frames = [camera.reset(seed=seed)[0]["image"]]
    done = False
    while not done:
        action = policy.act(obs, instruction)
        obs, _, terminated, truncated, info = env.step(action)
        frames.append(camera.step(action)[0]["image"])
        done = terminated or truncated
    return frames, info["success"]


def labelled(frame: np.ndarray, text: str, colour: tuple[int, int, int]) -> np.ndarray:
    """The frame under a bar with a text."""
    height, width = frame.shape[:2]
    picture = Image.new("RGB", (width, height + 26), colour)
    picture.paste(Image.fromarray(frame), (0, 26))
    ImageDraw.Draw(picture).text((8, 4), text, fill="white", font=FONT)
    return np.asarray(picture)


def film(sides: list[tuple[str, list[np.ndarray], bool]], *, every: int) -> list[np.ndarray]:
    """Both sides' frames until the longer one ends, then its last for a second; the bar turns green at success."""
    length = max(len(frames) for _, frames, _ in sides)
    shown = [*range(0, length, every), *[length - 1] * 12]
    grey, green, red = (70, 70, 70), (30, 120, 60), (150, 40, 40)
    rows = []
    for i in shown:
        halves = []
        for name, frames, success in sides:
            over = i >= len(frames) - 1
            text = name if not over else f"{name}: {'open' if success else 'not open'}"
            halves.append(
                labelled(frames[min(i, len(frames) - 1)], text, grey if not over else green if success else red)
            )
        rows.append(np.concatenate(halves, axis=1))
    return rows


def main(args: Args) -> None:
    """Play, draw, write."""
    policies = {"stage 0": VLAPolicy.from_pretrained(args.before), "stage 2": VLAPolicy.from_pretrained(args.after)}
    frames = []
    for seed in args.seeds:
        sides = [(name, *play(policy, args.task, seed=seed, pixels=args.pixels)) for name, policy in policies.items()]
        frames += film(sides, every=args.every)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(args.out, np.stack(frames), duration=80, loop=0)
    print(f"{args.out}: {len(frames)} frames, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
