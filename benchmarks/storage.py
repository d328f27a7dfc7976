"""Ways to store camera pictures, and their price: ``MUJOCO_GL=egl python benchmarks/storage.py``.

The same episodes of Meta-World pictures are written and read back by every way: whole episodes in order, and single
frames at random in batches, with the files in the page cache. All are measured in turn, several rounds of each, so that
a machine busy with other work slows them alike; medians are reported, and frames per second of CPU time beside those
per second. Ways whose package is not installed are left out (``pip install hdf5plugin av minari robomimic``);
LeRobot wants an environment of its own: ``--lerobot-python its/bin/python``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import torch
from storage_lerobot import LOSSLESS, measure_lerobot
from storage_measures import peak_bytes, timed
from storage_streaming import feeding, memory_while_streaming
from storage_ways import WAYS, Way, processes_reading

from vla_rl.data import Episode

OUTPUT = Path(__file__).parent / "results" / "storage.json"
OURS = "EpisodeStore"
KINDS = ("write", "sequential", "random")
LEROBOT_BATCHES = 4
"""Random batches per round; its video loader gives some hundred frames per second."""


def make_episodes(count: int, steps: int, size: int) -> list[Episode]:
    """Episodes of random actions in Meta-World, with pictures of ``size`` x ``size``."""
    env = gym.make("vla_rl_envs:VLA/MetaWorld-v0", task="drawer-open", image_size=size, horizon=steps)
    rng = np.random.default_rng(0)
    episodes = []
    for number in range(count):
        images = [env.reset(seed=number)[0]["image"]]
        actions = rng.uniform(-1, 1, (steps, 4)).astype(np.float32)
        images += [env.step(action)[0]["image"] for action in actions]
        episodes.append(
            Episode(
                observations={
                    "image": np.stack(images),
                    "task_id": np.zeros(steps + 1, np.int64),
                    "state": rng.standard_normal((steps + 1, 4)).astype(np.float32),
                },
                actions=actions,
                rewards=np.zeros(steps),
                terminations=np.zeros(steps, dtype=bool),
                truncations=np.arange(steps) == steps - 1,
                success=False,
                source="random",
                task="drawer-open",
                instruction="open the drawer",
            )
        )
    env.close()
    return episodes


def folder_bytes(folder: Path) -> int:
    """Size of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(
    ways: list[Way],
    episodes: list[Episode],
    root: Path,
    *,
    rounds: int,
    batch: int,
    seconds: float,
    lerobot: str | None,
) -> dict:
    """Writes, sequential and random reads of every way, in turn; LeRobot's if there is an interpreter for it."""
    frames = sum(episode.total_steps for episode in episodes)
    rng = np.random.default_rng(1)
    draws: dict[str, list[tuple[float, float | None]]] = {}
    results: dict[str, dict[str, Any]] = {way.name: {"lossless": way.lossless} for way in ways}

    def note(name: str, work: Callable[[], Any], count: int) -> None:
        wall, cpu = timed(work)
        draws.setdefault(name, []).append((count / wall, count / cpu))

    for round_ in range(rounds):
        for way in ways:
            folder, row = root / f"{way.name}-{round_}", results[way.name]
            folder.mkdir()
            note(f"{way.name}/write", partial(way.write, folder, episodes), frames)
            if round_:
                shutil.rmtree(root / f"{way.name}-{round_ - 1}")
            reader = way.open(folder)
            note(f"{way.name}/sequential", partial(each, reader.episode, [(i,) for i in range(len(episodes))]), frames)
            check(way, reader, episodes)
            rows = batches(rng, episodes, batch)
            wall, _ = timed(partial(reader.frames, *rows))
            plan = [batches(rng, episodes, batch) for _ in range(max(1, min(round(seconds / wall), 1000)))]
            note(f"{way.name}/random", partial(each, reader.frames, plan), len(plan) * batch)
            row["bytes_per_frame"] = folder_bytes(folder) / frames
            row["write_peak_bytes"] = peak_bytes(partial(way.write, root / "again", episodes[:2]))
            row["read_peak_bytes"] = peak_bytes(partial(reader.frames, *rows))
            shutil.rmtree(root / "again")
            if way.name == OURS:
                count, wall = processes_reading(reader, plan, processes=2)
                draws.setdefault(f"{OURS}/random, 2 processes", []).append((count * batch / wall, None))
        if lerobot:
            pictures = np.stack([episode.observations["image"][:-1] for episode in episodes])
            plan = [batches(rng, episodes, batch) for _ in range(LEROBOT_BATCHES)]
            for name, row in measure_lerobot(lerobot, pictures, plan, root / f"lerobot-{round_}").items():
                results.setdefault(name, {"lossless": LOSSLESS[name]})
                results[name] |= {key: value for key, value in row.items() if key not in KINDS}
                for kind in KINDS:
                    count, wall, cpu = row[kind]
                    draws.setdefault(f"{name}/{kind}", []).append((count / wall, count / cpu))
            shutil.rmtree(root / f"lerobot-{round_}")
    for name, values in draws.items():
        way, kind = name.split("/")
        wall, cpu = ([value[k] for value in values] for k in (0, 1))
        results[way][kind] = {
            "frames_per_second": statistics.median(wall),
            "frames_per_cpu_second": None if None in cpu else statistics.median(cpu),
            "rounds": wall,
        }
    return results


def each(read: Callable[..., np.ndarray], plan: Sequence[tuple[Any, ...]]) -> None:
    """Read all and keep nothing."""
    for arguments in plan:
        read(*arguments)


def batches(rng: np.random.Generator, episodes: list[Episode], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Episodes and steps of one batch."""
    chosen = rng.integers(0, len(episodes), batch)
    return chosen, rng.integers(0, episodes[0].total_steps, batch)


def check(way: Way, reader: Any, episodes: list[Episode]) -> None:
    """What was read is what was written, bit by bit where the way is lossless."""
    chosen, steps = np.arange(len(episodes)), np.arange(len(episodes)) + 2
    found = reader.frames(chosen, steps).astype(int)
    expected = np.stack([episodes[i].observations["image"][t] for i, t in zip(chosen, steps, strict=True)])
    difference = np.abs(found - expected).mean()
    if difference > (0 if way.lossless else 8):
        raise AssertionError(f"{way.name} gave other pictures, mean difference {difference:.2f}")


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print one line per way."""
    columns = "".join(f" {name:>9s}" for name in ("write", "in order", "random", "per CPU s", "kB/frame", "RAM MB"))
    print(f"{'frames/s':34s}{columns}")
    for name, row in sorted(results.items(), key=lambda item: -item[1]["random"]["frames_per_second"]):
        speeds = [row[kind]["frames_per_second"] for kind in KINDS]
        peaks = [peak for peak in (row["write_peak_bytes"], row["read_peak_bytes"]) if peak is not None]
        ram = f"{max(peaks) / 1e6:9.0f}" if peaks else f"{'-':>9s}"
        print(
            f"{name:34s} {speeds[0]:9,.0f} {speeds[1]:9,.0f} {speeds[2]:9,.0f} "
            f"{row['random']['frames_per_cpu_second']:9,.0f} {row['bytes_per_frame'] / 1e3:9.1f} {ram}"
        )


def main() -> None:
    """Measure, print a table and write ``benchmarks/results/storage.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="of random reads per way and round")
    parser.add_argument("--streamed-gb", type=float, default=100, help="size of the sparse store that is streamed")
    parser.add_argument("--only", nargs="*", help="names of ways")
    parser.add_argument("--lerobot-python", help="interpreter of an environment with LeRobot")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = [os.getloadavg()]
    episodes = make_episodes(args.episodes, args.steps, args.size)
    ways = [way for make in WAYS for way in make() if not args.only or way.name in args.only]
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        root = Path(folder)
        options = {"rounds": args.rounds, "batch": args.batch, "seconds": args.seconds}
        results = measure(ways, episodes, root, **options, lerobot=args.lerobot_python)
        report(results)
        fed = feeding(episodes, root / "fed", rounds=args.rounds)
        streamed = memory_while_streaming(root / "sparse", gigabytes=args.streamed_gb, size=args.size)
    load.append(os.getloadavg())
    speed = {name: row["random"] for name, row in results.items()}
    goals: dict[str, Any] = {
        "random_frames_per_second": speed[OURS]["frames_per_second"],
        "random_frames_per_second_2_processes": results[OURS]["random, 2 processes"]["frames_per_second"],
        "steps_per_second_from_disk_to_ram": fed["ratio"],
        "streaming_growth_mb": streamed["growth_mb"],
    }
    for peer in (name for name in speed if name != OURS):
        key = "frames_per_cpu_second"
        goals[f"times {peer}"] = speed[OURS]["frames_per_second"] / speed[peer]["frames_per_second"]
        goals[f"times {peer}, CPU time"] = speed[OURS][key] / speed[peer][key]
    print(json.dumps(goals, indent=1))
    record = {
        "command": "python benchmarks/storage.py",
        "settings": {key: value for key, value in vars(args).items() if key not in ("output", "lerobot_python")},
        "cores": os.cpu_count(),
        "load_average_before_and_after": load,
        "versions": {"python": platform.python_version(), "h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version},
        "goals": goals,
        "feeding": fed,
        "streaming": streamed,
        "results": results,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
