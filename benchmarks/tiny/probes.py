"""Linear probes on frozen features: what can be read off ``tiny``'s image tokens, and off those of other encoders.

``python benchmarks/tiny/probes.py --encoder tiny`` writes ``benchmarks/results/tiny_probes.json``. With
``--demonstrations DIR`` (of ``vla-rl collect`` or of a run's ``expert_data``, 64 x 64 pixels) a conv net that is
trained on their actions alone is probed as well.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from convnet import conv_features, train_on_actions
from numpy.typing import NDArray
from parts import HELD_OUT
from shards import SESSION, Shard, load, save, shard_of
from texts import INSTRUCTIONS, vocabulary_texts

from vla_rl import FrozenVLMEncoder
from vla_rl.encoders import small_vlm

Array = NDArray[np.float64]
ROOT = Path(__file__).parents[2]

SETS: dict[str, dict[str, Any]] = {
    "new draws": {"scenes": {"exclude": (*HELD_OUT, "kitchen")}},
    "new draws of the kitchen": {"scenes": {"only": ("kitchen",)}},
    "new scenes": {"scenes": {"only": HELD_OUT}},
    "own camera, own look": {"scenes": {"exclude": (*HELD_OUT, "kitchen")}, "style": "own", "camera": "own"},
    "own camera, new look": {"scenes": {"exclude": (*HELD_OUT, "kitchen")}, "style": "varied", "camera": "own"},
}
"""What is drawn: scenes of pretraining under seeds that it did not use (Meta-World and the kitchen apart, since a probe
would only tell their frames of reference apart), scenes that it never saw, and Meta-World from the environment's camera
with the simulator's look (the home of an encoder trained on actions) and with other looks."""

REGRESSIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "gripper in picture": (("gripper_column", "gripper_row"), "gripper_visible"),
    "gripper in space": (("gripper_x", "gripper_y", "gripper_z"), "gripper_visible"),
    "target in picture": (("target_column", "target_row"), "target_visible"),
    "target in space": (("target_x", "target_y", "target_z"), "target_visible"),
}
"""Name -> columns of the truth, and the column that says where they can be seen."""

CLASSES: dict[str, tuple[str, str]] = {
    "gripper open": ("gripper_opening", "gripper_visible"),
    "target open": ("target_fraction", "target_visible"),
    "target colour": ("target_colour", "target_visible"),
}
"""The same for classes; openings count below .25 and above .6."""


@dataclass
class Args:
    """Options."""

    encoder: str = "tiny"
    """name or directory of the encoder"""
    others: tuple[str, ...] = (str(ROOT / "vla_rl" / "assets" / "metaworld-base" / "encoder"),)
    """encoders to compare with; random weights are added"""
    demonstrations: Path | None = None
    """store of demonstrations for the conv net; None leaves it out"""
    train: int = 3000
    """pictures of each set that probes are fitted to"""
    test: int = 1500
    """pictures of each set that they are tested on, from other sessions"""
    seed: int = 10_000
    """of the pictures; pretraining must have used another"""
    data: Path = Path("runs/tiny/probes")
    """where the pictures are kept"""
    output: Path = ROOT / "benchmarks" / "results" / "tiny_probes.json"
    threads: int = 1


def ridge(x: Array, y: Array, penalties: Sequence[float]) -> tuple[list[Array], Array, Array]:
    """Closed-form ridge regression of y [N, K] on x [N, D], both centred.

    Returns:
        Weights [D, K] for each penalty, and the means of x and y.
    """
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    a, b = x - x_mean, y - y_mean
    if len(a) < a.shape[1]:
        gram, unit = a @ a.T, np.eye(len(a))
        return [a.T @ np.linalg.solve(gram + penalty * unit, b) for penalty in penalties], x_mean, y_mean
    gram, unit, target = a.T @ a, np.eye(a.shape[1]), a.T @ b
    return [np.linalg.solve(gram + penalty * unit, target) for penalty in penalties], x_mean, y_mean


def fit_predict(x: Array, y: Array, x_test: Array) -> Array:
    """Ridge predictions [M, K] with the penalty that serves the last fifth of the training rows best."""
    scale = x.std(axis=0) + 1e-6
    x, x_test = x / scale, x_test / scale
    cut = len(x) * 4 // 5
    penalties = [10.0**power for power in range(6)]
    weights, x_mean, y_mean = ridge(x[:cut], y[:cut], penalties)
    errors = [np.square((x[cut:] - x_mean) @ each + y_mean - y[cut:]).mean() for each in weights]
    (best,), x_mean, y_mean = ridge(x, y, [penalties[int(np.argmin(errors))]])
    return (x_test - x_mean) @ best + y_mean


def r2(truth: Array, guess: Array) -> float:
    """Explained share of variance, the mean over columns."""
    residual = np.square(truth - guess).sum(axis=0)
    return float(np.mean(1 - residual / np.square(truth - truth.mean(axis=0)).sum(axis=0)))


def balanced_accuracy(truth: NDArray[np.int64], guess: NDArray[np.int64]) -> float:
    """Mean over classes of the share that is recognised; chance is one over their number."""
    return float(np.mean([(guess[truth == value] == value).mean() for value in np.unique(truth)]))


def interval(
    score: Any, truth: Any, guess: Any, sessions: NDArray[np.int64], *, draws: int = 300
) -> tuple[float, float]:
    """95% bootstrap interval of a score over sessions [N]: pictures of one share look, camera and task."""
    rng = np.random.default_rng(0)
    rows = [np.flatnonzero(sessions == session) for session in np.unique(sessions)]
    drawn = (np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(draws))
    values = [score(truth[index], guess[index]) for index in drawn]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def probe(train: Shard, test: Shard, x: Array, x_test: Array) -> dict[str, Any]:
    """Scores of all probes: n (test pictures), score, low, high, chance."""
    result: dict[str, Any] = {}
    sessions = np.arange(len(test)) // SESSION
    for name, (columns, seen) in REGRESSIONS.items():
        keep, keep_test = train.truth(seen) > 0, test.truth(seen) > 0
        y = np.stack([train.truth(column)[keep] for column in columns], axis=1).astype(float)
        truth = np.stack([test.truth(column)[keep_test] for column in columns], axis=1).astype(float)
        guess = fit_predict(x[keep], y, x_test[keep_test])
        low, high = interval(r2, truth, guess, sessions[keep_test])
        result[name] = {"n": len(truth), "score": r2(truth, guess), "low": low, "high": high, "chance": 0.0}
    for name, (column, seen) in CLASSES.items():
        values, keep = _classes(train, column, seen)
        values_test, keep_test = _classes(test, column, seen)
        known = np.unique(values[keep])
        keep_test &= np.isin(values_test, known)
        truth = values_test[keep_test]
        if len(known) < 2 or len(np.unique(truth)) < 2 or len(truth) < 50:
            continue
        one_hot = (values[keep][:, None] == known).astype(float)
        guess = known[fit_predict(x[keep], one_hot, x_test[keep_test]).argmax(axis=1)]
        low, high = interval(balanced_accuracy, truth, guess, sessions[keep_test])
        score = balanced_accuracy(truth, guess)
        result[name] = {"n": len(truth), "score": score, "low": low, "high": high, "chance": 1 / len(known)}
    return result


def _classes(shard: Shard, column: str, seen: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    values = shard.truth(column)
    keep = (shard.truth(seen) > 0) & ~np.isnan(values)
    if column != "target_colour":
        keep &= (values < 0.25) | (values > 0.6)
        return (values > 0.5).astype(np.int64), keep
    return np.nan_to_num(values).astype(np.int64), keep


def features(encoder: FrozenVLMEncoder, shard: Shard, instructions: Sequence[str], *, batch_size: int = 64) -> Array:
    """The image tokens of each picture under its task's instruction, side by side: float64 [N, tokens * D]."""
    tokens = int(encoder.processor.image_processor.image_seq_length)
    rows = []
    for start in range(0, len(shard), batch_size):
        part = slice(start, start + batch_size)
        encoded = encoder.encode(shard.images[part], instructions[part])
        rows.append(encoded.tokens[:, :tokens].flatten(1).float().cpu().numpy())
    return np.concatenate(rows).astype(float)


def _write(path: Path, settings: dict[str, Any], seed: int, number: int, count: int) -> None:
    from scenes import SceneSampler

    sampler = SceneSampler(**settings["scenes"])
    rng = np.random.default_rng([seed, number])
    drawn: list[Any] = []
    while len(drawn) < count:
        drawn += sampler.session(rng, SESSION, style=settings.get("style"), camera=settings.get("camera"))
    save(shard_of(drawn, rng), path)


def pictures(args: Args) -> dict[str, tuple[Shard, Shard]]:
    """Train and test pictures of each set, drawn where they are missing."""
    args.data.mkdir(parents=True, exist_ok=True)
    result = {}
    for index, (name, settings) in enumerate(SETS.items()):
        pair = []
        for half, count in enumerate((args.train, args.test)):
            path = args.data / f"{name.replace(' ', '-').replace(',', '')}-{half}-{count}-{args.seed}.npz"
            if not path.exists():
                context = multiprocessing.get_context("spawn")
                process = context.Process(target=_write, args=(path, settings, args.seed, 2 * index + half, count))
                process.start()
                process.join()
                if process.exitcode:
                    raise RuntimeError(f"the pictures of {name!r} could not be drawn; the error is above")
            pair.append(load(path))
        result[name] = (pair[0], pair[1])
    return result


def main(args: Args) -> None:
    """Probe every encoder on every set and write the scores."""
    from worlds import ALL_TASKS

    torch.set_num_threads(args.threads)
    sets = pictures(args)
    sources: dict[str, Callable[[Shard, list[str]], Array]] = {
        Path(name).name if "/" not in name else "/".join(Path(name).parts[-2:]): partial(
            features, FrozenVLMEncoder.from_pretrained(name)
        )
        for name in (args.encoder, *args.others)
    }
    sources["random weights"] = partial(features, small_vlm(vocabulary_texts()))
    if args.demonstrations is not None:
        sources["conv net, actions only"] = partial(conv_features, train_on_actions(args.demonstrations))
    results: dict[str, Any] = {}
    for label, source in sources.items():
        start = time.perf_counter()
        for set_name, (train, test) in sets.items():
            x, x_test = (
                source(shard, [INSTRUCTIONS[ALL_TASKS[int(i)]] for i in shard.truth("task")]) for shard in (train, test)
            )
            scores = probe(train, test, x, x_test)
            results.setdefault(set_name, {})[label] = scores
            line = "  ".join(
                f"{probe_name} {s['score']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for probe_name, s in scores.items()
            )
            print(f"{set_name} | {label} | {line}", flush=True)
        print(f"{label}: {time.perf_counter() - start:.0f} s", flush=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps({"args": settings, "held_out_scenes": HELD_OUT, "sets": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
