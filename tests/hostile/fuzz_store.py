"""Flip random bytes of a store's files, and demand of the reader what it promises: an error in words, or the data.

    python tests/hostile/fuzz_store.py --rounds 20000 --output benchmarks/results/fuzz_store.json

Each batch runs in a process of its own, so that a crash of the HDF5 library is a finding with its seed, and no end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import get_args

sys.path.append(str(Path(__file__).parents[1] / "data"))

from episode_maker import make_episode

from vla_rl.data import EpisodeStore
from vla_rl.data.image_formats import ImageFormat
from vla_rl.data.verification import verify
from vla_rl.report import versions
from vla_rl.rundir import write_json

BATCH = 50
FORMS = get_args(ImageFormat)
CPU_SECONDS, MEMORY = 60, 4 << 30  # of a batch: beyond, the reader hangs, or reads what is not there


def make_store(path: Path, images: ImageFormat) -> Path:
    """Two short episodes, one of them raw, and the other with its pictures in another form."""
    for number, form in enumerate(("raw", images)):
        with EpisodeStore(path, images=form) as store:
            store.append(make_episode(number))
    return path


def damage(root: Path, rng: random.Random) -> str:
    """Change a few bytes of one file, or cut it, or put a piece of it elsewhere; returns what was done."""
    path = rng.choice(sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size))
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "flip", "random", "cut", "copy", "number"])
    at = rng.randrange(len(content))
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 3, 20])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "random":
        content[at : at + 8] = rng.randbytes(len(content[at : at + 8]))
    elif kind == "cut":
        del content[at:]
    elif kind == "copy":
        other = rng.randrange(len(content))
        piece = content[other : other + 64]
        content[at : at + len(piece)] = piece
    else:
        content[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7])[: len(content) - at]
    path.write_bytes(content)
    if path.suffix == ".hdf5" and path.name[0] == "0" and rng.random() < 0.5:  # as one who forges it would
        index = root / "data" / "episodes.jsonl"
        lines = [json.loads(line) for line in index.read_text().splitlines()]
        lines[int(path.stem)]["num_bytes"] = len(content)
        index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{kind} of {path.name}"


def attempt(root: Path) -> str:
    """How reading ended: "read", or the kind of error; raises what no reader should."""
    verify(root)
    try:
        for episode in EpisodeStore(root, mode="r"):
            assert len(episode.actions) > 0
    except (ValueError, FileNotFoundError) as error:
        return type(error).__name__
    return "read"


def batch(good: Path, seed: int) -> Counter[str]:
    """Outcomes of one batch."""
    rng, outcomes = random.Random(seed), Counter()
    for _ in range(BATCH):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "store"
            shutil.copytree(good, root)
            what = damage(root, rng)
            try:
                outcomes[attempt(root)] += 1
            except Exception as error:
                print(f"seed {seed}, {what}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                if os.environ.get("FUZZ_TRACE"):
                    traceback.print_exc()
                outcomes[f"NOT CLEAR {type(error).__name__}"] += 1
    return outcomes


def run(rounds: int, *, seed: int) -> Counter[str]:
    """Outcomes of so many rounds, in forks of this process, each with a store of another form of pictures."""
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        good = [make_store(Path(folder) / form, form) for form in FORMS]
        for number in range(-(-rounds // BATCH)):
            answer = Path(folder) / "answer"
            answer.unlink(missing_ok=True)
            pid = os.fork()
            if not pid:
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                try:
                    answer.write_text(json.dumps(batch(good[number % len(good)], seed + number)))
                finally:
                    os._exit(0)
            _, status = os.waitpid(pid, 0)
            if answer.exists():
                total += Counter(json.loads(answer.read_text()))
            else:
                print(f"seed {seed + number}: the process ended with status {status}", flush=True)
                total["CRASHED"] += 1
    return total


def main() -> None:
    """Fuzz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    start = time.monotonic()
    outcomes = dict(run(args.rounds, seed=args.seed).most_common())
    print(json.dumps(outcomes, indent=2))
    unclear = sum(count for name, count in outcomes.items() if name.isupper() or name.startswith("NOT"))
    if args.output is not None:
        figures = {
            "command": f"python tests/hostile/fuzz_store.py --rounds {args.rounds} --seed {args.seed}",
            "rounds": sum(outcomes.values()),
            "read": outcomes.get("read", 0),
            "errors_in_words": sum(outcomes.values()) - outcomes.get("read", 0) - unclear,
            "other": unclear,
            "outcomes": outcomes,
            "pictures": list(FORMS),
            "seconds": round(time.monotonic() - start),
            "versions": versions(),
        }
        write_json(args.output, figures)
    sys.exit(unclear > 0)


if __name__ == "__main__":
    main()
