"""How well answers match the truth on pictures that were not trained on, beside always giving the commonest answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch
from batches import Collator
from learner import Learner, autocast
from shards import Shard
from texts import KINDS, parse_location


@torch.no_grad()
def evaluate(
    learner: Learner, collator: Collator, shard: Shard, *, device: str, batch_size: int = 256, limit: int | None = None
) -> dict[str, Any]:
    """Answers to every text of a shard but captions.

    An answer is right if each of its tokens, end included, is the likeliest one after the true tokens before it: when
    greedy decoding gives the answer. ``distance`` is between the places told, as a fraction of the picture's side,
    where both are places (the row's token is given while the column's is told).

    Returns:
        By kind: n, accuracy, commonest (accuracy of giving the commonest answer of that kind), and for "where" also
        distance, its median. Over all: votes, the median distance of the place heads for asked places and the gripper.
    """
    learner.eval()
    rows = [(row, pair) for row, pairs in enumerate(shard.pairs) for pair in pairs if pair.kind != "caption"][:limit]
    right: dict[str, list[bool]] = defaultdict(list)
    distances: list[float] = []
    votes: tuple[list[float], list[float]] = ([], [])
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        index = np.array([row for row, _ in part])
        pairs = [pair for _, pair in part]
        batch = collator(shard, index, pairs, ["nothing"] * len(part)).to(device)
        with autocast(device):
            hidden, _, places = learner(batch)
            logits, labels = learner.logits(hidden, batch)
        guesses, labels = logits.argmax(-1).cpu(), labels.cpu()
        lengths = batch.answer.sum(1).tolist()
        for pair, guess, label in zip(pairs, guesses.split(lengths), labels.split(lengths), strict=True):
            right[pair.kind].append(bool((guess == label).all()))
            if pair.kind == "where" and pair.place is not None:
                told = parse_location(collator.decode(guess.tolist()))
                if told is not None:
                    distances.append(float(np.hypot(told[0] - pair.place[0], told[1] - pair.place[1])))
        for column, truth in enumerate((batch.place, batch.gripper)):
            error = (places[:, column] - truth).norm(dim=-1)
            votes[column].extend(error[~error.isnan()].tolist())
    learner.train()
    result: dict[str, Any] = {}
    for kind in KINDS:
        if right[kind]:
            answers = Counter(pair.answer for _, pair in rows if pair.kind == kind)
            n = len(right[kind])
            result[kind] = {
                "n": n,
                "accuracy": float(np.mean(right[kind])),
                "commonest": answers.most_common(1)[0][1] / n,
            }
    if distances:
        result["where"]["distance"] = float(np.median(distances))
    result["votes"] = {"asked": float(np.median(votes[0])), "gripper": float(np.median(votes[1]))}
    return result
