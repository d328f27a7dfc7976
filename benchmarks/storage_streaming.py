"""Two questions of ``storage.py``: does reading from disk keep a training step fed, and does memory stay flat."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from vla_rl.data import BalancedSampler, Episode, EpisodeStore
from vla_rl.data.layout import episode_info, episode_path, write_episode, write_links, write_records


def feeding(episodes: list[Episode], root: Path, *, rounds: int, batch: int = 32, steps: int = 40) -> dict[str, Any]:
    """Training steps per second with pictures read from the store, and with all of them in RAM.

    The step is a far smaller one than a VLM's, 16 x 16 patches through two layers, forward and backward, so that
    reading weighs more.
    """
    with EpisodeStore(root) as store:
        for episode in episodes:
            store.append(episode)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 192, 16, stride=16), torch.nn.GELU(), torch.nn.Conv2d(192, 192, 1), torch.nn.GELU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(192, 4),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    samplers = {
        name: BalancedSampler([store], batch_size=batch, seed=0, max_ram_bytes=limit)
        for name, limit in (("RAM", 10**12), ("disk", 0))
    }

    def step(sampler: BalancedSampler) -> None:
        drawn = sampler.sample()
        images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 255
        loss = torch.nn.functional.mse_loss(model(images), torch.from_numpy(drawn.actions))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in samplers}
    for round_ in range(2 * rounds + 1):
        for name, sampler in samplers.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step(sampler)
            if round_:  # the first warms up
                rates[name].append((steps / (time.perf_counter() - wall), steps / (time.process_time() - cpu)))
    pairs = list(zip(rates["disk"], rates["RAM"], strict=True))
    return {
        "batch": batch,
        "steps_per_second": {name: statistics.median(rate[0] for rate in each) for name, each in rates.items()},
        "ratio": statistics.median(disk[0] / ram[0] for disk, ram in pairs),
        "ratio_of_cpu_time": statistics.median(disk[1] / ram[1] for disk, ram in pairs),
    }


def memory_while_streaming(root: Path, *, gigabytes: float, size: int, steps: int = 500, draws: int = 400) -> dict:
    """Memory of this process while random batches come from a store of this size, whose pictures are holes on disk."""
    frame = size * size * 3
    count = max(2, round(gigabytes * 1e9 / (frame * (steps + 1))))
    store = sparse_store(root, count, steps, size)
    start = time.perf_counter()
    sampler = BalancedSampler([store], batch_size=64, seed=0, max_ram_bytes=0)
    opened = time.perf_counter() - start
    sampler.sample()
    memory = [resident_bytes()]
    start = time.perf_counter()
    for draw in range(draws):
        sampler.sample()
        if (draw + 1) % (draws // 10) == 0:
            memory.append(resident_bytes())
    seconds = time.perf_counter() - start
    return {
        "store_gb": sum(info.num_bytes for info in store.index) / 1e9,
        "on_disk_mb": sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file()) / 1e6,
        "episodes": count,
        "frames": store.total_steps,
        "read_gb": draws * 64 * frame / 1e9,
        "seconds_to_open": opened,
        "frames_per_second": draws * 64 / seconds,
        "resident_mb": [round(value / 1e6, 1) for value in memory],
        "growth_mb": (max(memory) - memory[0]) / 1e6,
    }


def resident_bytes() -> int:
    """Memory of this process in RAM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def sparse_store(root: Path, count: int, steps: int, size: int) -> EpisodeStore:
    """A store whose episodes claim pictures that were never written, so that the file system keeps no bytes of them."""
    data = root / "data"
    (data / "episodes").mkdir(parents=True)
    rng = np.random.default_rng(0)
    small = Episode(
        observations={
            "image": np.zeros((steps + 1, 1, 1, 3), np.uint8),
            "task_id": np.zeros(steps + 1, np.int64),
            "state": rng.standard_normal((steps + 1, 8)).astype(np.float32),
        },
        actions=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        rewards=np.zeros(steps),
        terminations=np.zeros(steps, dtype=bool),
        truncations=np.arange(steps) == steps - 1,
        success=False,
        source="synthetic",
        task="stream",
        instruction="stream",
    )
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    infos = []
    for index in range(count):
        path = episode_path(data, index)
        write_episode(path, index, small, extras={})
        with h5py.File(path, "r+") as file:
            group = file[f"episode_{index}/observations"]
            del group["image"]
            space = h5py.h5s.create_simple((steps + 1, size, size, 3))
            h5py.h5d.create(group.id, b"image", h5py.h5t.NATIVE_UINT8, space, creation)
        infos.append(episode_info(small, path.stat().st_size))
    write_links(data, count)
    shapes = {
        "image": ("uint8", (size, size, 3)),
        "task_id": ("int64", ()),
        "state": ("float32", (8,)),
        "actions": ("float32", (7,)),
    }
    write_records(data, root, infos, shapes)
    return EpisodeStore(root, "r")
