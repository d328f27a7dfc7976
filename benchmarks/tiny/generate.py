"""Write samples to shards: ``python benchmarks/tiny/generate.py --out runs/tiny/data --samples 200000 --workers 2``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from parts import HELD_OUT

SHARD = 2048
"""Pictures in a shard."""

VALIDATION = 1024
"""Pictures in each of the two held-out shards."""


def write_shards(
    directory: Path, *, seed: int, first: int, stride: int, stop: int | None, count: int, size: int, keep: int | None
) -> None:
    """Write shards ``first, first + stride, ...`` below ``stop`` (None: without end), skipping those that exist.

    Args:
        directory: where to.
        seed: of the data set.
        first: number of the first shard.
        stride: step between numbers.
        stop: number to stop before.
        count: pictures in a shard.
        size: height and width of a picture in pixels.
        keep: while ``stop`` is None, remove own shards but the newest ``keep``.
    """
    from scenes import SceneSampler
    from shards import make_shard, save, shard_path

    parent = os.getppid()
    sampler = SceneSampler(size=size, exclude=HELD_OUT)
    number = first
    while (stop is None or number < stop) and os.getppid() == parent:
        path = shard_path(directory, number)
        if not path.exists():
            start = time.perf_counter()
            save(make_shard(sampler, seed=seed, number=number, count=count), path)
            print(f"{path.name}: {count / (time.perf_counter() - start):.0f} samples/s", flush=True)
        if stop is None and keep is not None:
            shard_path(directory, number - keep * stride).unlink(missing_ok=True)
        number += stride


def start_workers(
    directory: Path,
    *,
    workers: int,
    seed: int,
    stop: int | None,
    count: int,
    size: int,
    first: int = 0,
    keep: int | None = None,
) -> list[BaseProcess]:
    """Generate in ``workers`` processes; they end with their work, or with this process."""
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    processes = []
    for index in range(workers):
        kwargs = {
            "seed": seed,
            "first": first + index,
            "stride": workers,
            "stop": stop,
            "count": count,
            "size": size,
            "keep": keep,
        }
        process = context.Process(target=write_shards, args=(directory,), kwargs=kwargs, daemon=True)
        process.start()
        processes.append(process)
    return processes


def validation(directory: Path, *, size: int, seed: int) -> dict[str, Path]:
    """Two shards never trained on, made where they are missing.

    Returns:
        Paths of ``"draws"`` (other draws of the scenes trained on) and ``"scenes"`` (scenes never trained on).
    """
    paths = {name: directory / f"held-out-{name}.npz" for name in ("draws", "scenes")}
    if not all(path.exists() for path in paths.values()):
        directory.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("spawn").Process(target=_write_validation, args=(paths, size, seed))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError("the held-out samples could not be written; the error is above")
    return paths


def _write_validation(paths: dict[str, Path], size: int, seed: int) -> None:
    from scenes import SceneSampler
    from shards import make_shard, save

    samplers = {"draws": {"exclude": HELD_OUT}, "scenes": {"only": HELD_OUT}}
    for name, path in paths.items():
        sampler = SceneSampler(size=size, **samplers[name])
        # Training shards have numbers; these have the largest that a seed can hold.
        save(make_shard(sampler, seed=seed, number=2**32 - 1, count=VALIDATION), path)


def main() -> None:
    """Write the shards that are still missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/data"))
    parser.add_argument("--samples", type=int, default=200_000, help="pictures, rounded up to whole shards")
    parser.add_argument("--workers", type=int, default=1, help="processes; one per core")
    parser.add_argument("--size", type=int, default=64, help="height and width of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=int, default=SHARD, help="pictures in a shard, a multiple of 16")
    args = parser.parse_args()
    stop, start = -(-args.samples // args.shard), time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    workers = start_workers(args.out, workers=args.workers, seed=args.seed, stop=stop, count=args.shard, size=args.size)
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker failed; its error is above, and the shards already written are kept")
    validation(args.out, size=args.size, seed=args.seed)
    seconds = time.perf_counter() - start
    print(f"{stop * args.shard} samples in {args.out}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
