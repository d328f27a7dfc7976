"""Frames per second of MuJoCo's default renderer and ours, side by side: ``python benchmarks/rendering.py``."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from vla_rl_envs.rendering import fixed_camera, import_mujoco, scene_renderer

mujoco = import_mujoco()

OUTPUT = Path(__file__).parent / "results" / "rendering.json"


def frames_per_second(draw: Callable[[], Any], *, seconds: float) -> float:
    """Speed of ``draw`` over about ``seconds``, after two frames of warm-up."""
    for _ in range(2):
        draw()
    frames, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or frames < 3:
        draw()
        frames += 1
    return frames / (time.perf_counter() - start)


def mujoco_renderer(model: Any, data: Any, camera: Any, size: int, *, shadows: bool, meshes: bool) -> Callable[[], Any]:
    """``mujoco.Renderer`` as it comes, or without shadows, reflections and multisampling, or without meshes too."""
    drawn = copy.copy(model)
    if not shadows:
        drawn.vis.quality.shadowsize, drawn.vis.quality.offsamples = 1, 0
    if not meshes:
        drawn.mesh_facenum[:] = 0
    renderer = mujoco.Renderer(drawn, height=size, width=size)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = shadows

    def draw() -> Any:
        renderer.update_scene(data, camera)
        return renderer.render()

    return draw


def env_steps_per_second(task: str, size: int, quality: str, *, seconds: float) -> float:
    """Speed of a whole environment (physics, reward, picture, resets) under random actions."""
    env = gym.make("vla_rl_envs:VLA/MetaWorld-v0", task=task, image_size=size, render_quality=quality)
    rng = np.random.default_rng(0)
    env.reset(seed=0)

    def step() -> None:
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 4).astype(np.float32))
        if terminated or truncated:
            env.reset()

    return frames_per_second(step, seconds=seconds)


def main() -> None:
    """Measure, print a table and write ``benchmarks/results/rendering.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="drawer-open")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time per cell")
    args = parser.parse_args()
    env: Any = gym.make("vla_rl_envs:VLA/MetaWorld-v0", task=args.task).unwrapped
    env.reset(seed=0)
    model, data, camera = env.model, env.data, fixed_camera(env.model, "corner2")
    rows = []
    for size in (64, 128):
        renderer = scene_renderer(model, camera, height=size, width=size)
        draws: dict[str, Callable[[], Any]] = {
            "default": mujoco_renderer(model, data, camera, size, shadows=True, meshes=True),
            "no shadow": mujoco_renderer(model, data, camera, size, shadows=False, meshes=True),
            "fast": lambda renderer=renderer: renderer.render(model, data, camera, rotate=True),
            "no mesh": mujoco_renderer(model, data, camera, size, shadows=False, meshes=False),
        }
        speeds = {name: frames_per_second(draw, seconds=args.seconds) for name, draw in draws.items()}
        steps = {
            quality: env_steps_per_second(args.task, size, quality, seconds=args.seconds)
            for quality in ("fast", "none")
        }
        rows.append({"size": size, "frames_per_second": speeds, "env_steps_per_second": steps})

    print(f"{'pixels':>6s} {'renderer':10s} {'frames/s':>9s} {'speed-up':>9s}")
    for row in rows:
        for name, speed in row["frames_per_second"].items():
            print(f"{row['size']:6d} {name:10s} {speed:9.1f} {speed / row['frames_per_second']['default']:8.1f}x")
        for quality, speed in row["env_steps_per_second"].items():
            print(f"{row['size']:6d} env steps/s with render_quality={quality!r}: {speed:.0f}")
    versions = {"python": platform.python_version(), "mujoco": mujoco.__version__, "gymnasium": gym.__version__}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": "python benchmarks/rendering.py", "task": args.task, "versions": versions, "rows": rows}
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
