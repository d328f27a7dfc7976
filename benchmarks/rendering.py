"""Frames per second of MuJoCo's default renderer and ours, side by side: ``python benchmarks/rendering.py``."""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

OUTPUT = Path(__file__).parent / "results" / "rendering.json"
SCENES: tuple[tuple[str, str, int], ...] = (
    ("Meta-World drawer-open", "vla_rl_envs:VLA/MetaWorld-v0", 64),
    ("Meta-World drawer-open", "vla_rl_envs:VLA/MetaWorld-v0", 128),
    ("Franka Kitchen", "vla_rl_envs:VLA/FrankaKitchen-v0", 128),
    ("Ant-v5", "Ant-v5", 128),
    ("Humanoid-v5", "Humanoid-v5", 128),
    ("FetchPickAndPlace-v4", "FetchPickAndPlace-v4", 128),
    ("AdroitHandDoor-v1", "AdroitHandDoor-v1", 128),
)
Draw = Callable[[], Any]


def seconds_per_frame(draw: Draw, *, seconds: float) -> float:
    """Mean time of a frame over about ``seconds``, after one frame of warm-up."""
    draw()
    frames, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or frames < 2:
        draw()
        frames += 1
    return (time.perf_counter() - start) / frames


def mujoco_renderer(model: Any, data: Any, camera: Any, size: int, *, shadows: bool) -> Draw:
    """``mujoco.Renderer`` as it comes, or without shadows, reflections and multisampling."""
    import mujoco

    drawn = copy.copy(model)
    if not shadows:
        drawn.vis.quality.shadowsize, drawn.vis.quality.offsamples = 1, 0
    renderer = mujoco.Renderer(drawn, height=size, width=size)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = shadows

    def draw() -> Any:
        renderer.update_scene(data, camera)
        return renderer.render()

    return draw


def variants_of(env_id: str, size: int) -> dict[str, Draw]:
    """The ways to draw one scene, by name."""
    import gymnasium_robotics
    from vla_rl_envs import FastRender
    from vla_rl_envs.rendering import SceneRenderer, pixel_sizes

    gym.register_envs(gymnasium_robotics)
    if "VLA/" not in env_id:
        env = gym.make(env_id, render_mode="rgb_array", width=size, height=size)
        env.reset(seed=0)
        return {"default": env.render, "fast": FastRender(env).render}
    env = gym.make(env_id, image_size=size)
    env.reset(seed=0)
    inner: Any = env.unwrapped
    model, data, camera = inner.model, inner.data, inner._camera
    bare = copy.copy(model)
    bare.mesh_facenum[:] = 0
    floor = SceneRenderer(bare, height=size, width=size, pixels=pixel_sizes(model, camera, height=size))
    return {
        "default": mujoco_renderer(model, data, camera, size, shadows=True),
        "no shadow": mujoco_renderer(model, data, camera, size, shadows=False),
        "fast": lambda: inner._renderer.render(model, data, camera),
        "no mesh": lambda: floor.render(model, data, camera),
    }


def measure(env_id: str, size: int, *, seconds: float, rounds: int, only: tuple[str, ...] = ()) -> dict[str, float]:
    """Median frames per second of every way to draw, taken in turns."""
    draws = {name: draw for name, draw in variants_of(env_id, size).items() if not only or name in only}
    times: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(rounds):
        for name, draw in draws.items():
            times[name].append(seconds_per_frame(draw, seconds=seconds))
    return {name: 1 / statistics.median(values) for name, values in times.items()}


def in_processes(count: int, job: tuple[Any, ...], *, environ: dict[str, str | None] | None = None) -> dict[str, float]:
    """Frames per second of ``count`` processes that run at the same time, added up."""
    before = dict(os.environ)
    for key, value in (environ or {}).items():
        os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
    try:
        with multiprocessing.get_context("spawn").Pool(count) as pool:
            results = pool.starmap(_child, [job] * count, chunksize=1)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {name: sum(result[name] for result in results) for name in results[0]}


def _child(env_id: str, size: int, seconds: float, rounds: int, only: tuple[str, ...]) -> dict[str, float]:
    return measure(env_id, size, seconds=seconds, rounds=rounds, only=only)


def env_steps_per_second(env_id: str, size: int, quality: str, *, seconds: float) -> float:
    """Speed of a whole environment (physics, reward, picture, resets) under random actions."""
    env = gym.make(env_id, image_size=size, render_quality=quality)
    rng = np.random.default_rng(0)
    env.reset(seed=0)

    def step() -> None:
        action = rng.uniform(-1, 1, env.action_space.shape or ()).astype(np.float32)
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()

    return 1 / seconds_per_frame(step, seconds=seconds)


def main() -> None:
    """Measure, print a table and write ``benchmarks/results/rendering.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per cell and round")
    parser.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    args = parser.parse_args()
    from vla_rl_envs.rendering import import_mujoco

    mujoco = import_mujoco()
    rows = []
    print(f"{'scene':24s} {'pixels':>6s} {'renderer':22s} {'frames/s':>9s} {'speed-up':>9s}", flush=True)
    for name, env_id, size in SCENES:
        # A process of its own for every scene: OpenGL contexts of several libraries get in each other's way.
        speeds = in_processes(1, (env_id, size, args.seconds, args.rounds, ()))
        row: dict[str, Any] = {"scene": name, "size": size, "one_process": speeds}
        if "VLA/" in env_id:
            job = (env_id, size, args.seconds, args.rounds, ("default", "fast"))
            row["two_processes"] = in_processes(2, job)
            # As it comes, Mesa draws with one thread per core.
            job = (env_id, size, args.seconds, args.rounds, ("default",))
            row["all_threads"] = in_processes(1, job, environ={"LP_NUM_THREADS": str(os.cpu_count())})
            row["env_steps_per_second"] = {
                quality: env_steps_per_second(env_id, size, quality, seconds=args.seconds * args.rounds)
                for quality in ("fast", "none")
            }
        rows.append(row)
        for label, speed, base in _lines(row):
            print(f"{name:24s} {size:6d} {label:22s} {speed:9.1f} {speed / base:8.1f}x", flush=True)
        for quality, speed in row.get("env_steps_per_second", {}).items():
            print(f"{name:24s} {size:6d} env steps/s, render_quality={quality!r}: {speed:.0f}", flush=True)
    versions = {"python": platform.python_version(), "mujoco": mujoco.__version__, "gymnasium": gym.__version__}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": "python benchmarks/rendering.py", "cores": os.cpu_count(), "versions": versions, "rows": rows}
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n")


def _lines(row: dict[str, Any]) -> list[tuple[str, float, float]]:
    one, two = row["one_process"], row.get("two_processes")
    lines = [(name, speed, one["default"]) for name, speed in one.items()]
    if two:
        lines.append(("default, all threads", row["all_threads"]["default"], one["default"]))
        lines += [(f"{name}, two processes", speed, two["default"]) for name, speed in two.items()]
    return lines


if __name__ == "__main__":
    main()
