"""Texts about a sample: captions, questions with answers, pointing; and the words that a vocabulary must hold."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import colours
import numpy as np
import parts as tables
from parts import NOUNS, SHAPES
from scenes import Sample, Thing
from vla_rl_envs.kitchen_tasks import INSTRUCTIONS as KITCHEN_INSTRUCTIONS
from vla_rl_envs.kitchen_tasks import TASKS as KITCHEN_TASKS
from vla_rl_envs.tasks import INSTRUCTION_OF

Kind = Literal["caption", "instruction", "where", "what", "colour", "state", "relation", "presence"]
KINDS: tuple[Kind, ...] = ("caption", "instruction", "where", "what", "colour", "state", "relation", "presence")

INSTRUCTIONS: dict[str, str] = {**INSTRUCTION_OF, **dict(zip(KITCHEN_TASKS, KITCHEN_INSTRUCTIONS, strict=True))}
"""Task -> sentence."""

BINS = 32
"""Cells per side of the picture that a place is told in."""


@dataclass(frozen=True)
class Pair:
    """A prompt, its answer, and the place that it is about where there is one.

    Attributes:
        kind: which family of texts.
        prompt: what the model is given beside the picture.
        answer: what it should say.
        place: column and row as fractions of the picture's side; None if the text is not about one place.
    """

    kind: Kind
    prompt: str
    answer: str
    place: tuple[float, float] | None = None


def location(point: tuple[float, float]) -> str:
    """PaliGemma's location tokens for column and row in [0, 1): row first, of 1024 steps, rounded to ``BINS`` cells."""
    step = 1024 // BINS
    column, row = (min(max(int(value * BINS), 0), BINS - 1) * step + step // 2 for value in point)
    return f"<loc{row:04d}><loc{column:04d}>"


def parse_location(text: str) -> tuple[float, float] | None:
    """Column and row of the first place told in ``text``, the inverse of ``location``; None if there is none."""
    numbers = [piece[:4] for piece in text.split("<loc")[1:3]]
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        return None
    return int(numbers[1]) / 1024, int(numbers[0]) / 1024


def write_pairs(sample: Sample, rng: np.random.Generator) -> list[Pair]:
    """All kinds of texts about a sample that its truth supports, with random choices from ``rng``."""
    pairs = [Pair("caption", "describe the picture", caption(sample, rng)), _instruction(sample)]
    named = [(reference, thing) for thing in sample.things if (reference := refer(thing, sample.things))]
    seen = [(reference, thing) for reference, thing in named if thing.visible]
    pairs += [_where(*named[index]) for index in rng.permutation(len(named))[:3]]
    pairs.append(_where("gripper", sample.gripper))
    if seen:
        reference, thing = seen[int(rng.integers(len(seen)))]
        assert thing.point is not None
        pairs.append(Pair("what", f"what is at {location(thing.point)}", thing.name, thing.point))
    coloured = [(ref, thing) for ref, thing in _unique(seen) if thing.colour]
    for index in rng.permutation(len(coloured))[:2]:
        name, thing = coloured[index]
        pairs.append(Pair("colour", f"what colour is the {name}", str(thing.colour), thing.point))
    stateful = [(name, thing) for name, thing in _unique(seen) if thing.state]
    if sample.gripper.visible and sample.gripper.state:
        stateful.append(("gripper", sample.gripper))
    pairs += [_state(*stateful[index], rng) for index in rng.permutation(len(stateful))[:2]]
    if sample.gripper.point is not None:
        seen = [*seen, ("gripper", sample.gripper)]
    relation = _relation(seen, rng)
    return [*pairs, *([relation] if relation else []), _presence(sample, rng)]


def caption(sample: Sample, rng: np.random.Generator) -> str:
    """What is to be seen: up to three visible things with colour and state, and the gripper's state."""
    seen = [thing for thing in sample.things if thing.visible]
    order = sorted(rng.permutation(len(seen))[:3].tolist(), key=lambda index: -seen[index].area)
    phrases = []
    for index in order:
        thing = seen[index]
        phrases.append(" ".join(word for word in (thing.colour, thing.name, thing.state) if word))
    if sample.gripper.visible:
        phrases.append(" ".join(word for word in ("gripper", sample.gripper.state) if word))
    return " , ".join(phrases) if phrases else "nothing"


def refer(thing: Thing, things: tuple[Thing, ...]) -> str | None:
    """A name that fits this thing alone: its noun, or its colour and noun; None if neither does."""
    namesakes = [other for other in things if other.name == thing.name and other is not thing]
    if not namesakes and thing.name not in SHAPES:
        return thing.name
    if thing.colour is None or any(other.colour in (thing.colour, None) for other in namesakes):
        return None
    return f"{thing.colour} {thing.name}"


def _unique(named: list[tuple[str, Thing]]) -> list[tuple[str, Thing]]:
    """Those whose reference does not give the colour away."""
    return [(reference, thing) for reference, thing in named if reference == thing.name]


def _place(thing: Thing) -> str:
    return location(thing.point) if thing.visible and thing.point is not None else "hidden"


def _instruction(sample: Sample) -> Pair:
    target = next((thing for thing in sample.things if thing.name == sample.target), None)
    assert target is not None, f"{sample.task!r} is about {sample.target!r}, which its scene does not have"
    words = [target.name, _place(target), target.state or "", "gripper", _place(sample.gripper)]
    words.append(sample.gripper.state or "")
    place = target.point if target.visible else None
    return Pair("instruction", INSTRUCTIONS[sample.task], " ".join(word for word in words if word), place)


def _where(reference: str, thing: Thing) -> Pair:
    answer = _place(thing)
    return Pair("where", f"where is the {reference}", answer, None if answer == "hidden" else thing.point)


def _state(reference: str, thing: Thing, rng: np.random.Generator) -> Pair:
    assert thing.states is not None
    asked = thing.states[int(rng.integers(2))]
    return Pair("state", f"is the {reference} {asked}", "yes" if asked == thing.state else "no", thing.point)


def _relation(seen: list[tuple[str, Thing]], rng: np.random.Generator) -> Pair | None:
    if len(seen) < 2:
        return None
    first, second = rng.choice(len(seen), 2, replace=False)
    (name, thing), (other_name, other) = seen[first], seen[second]
    assert thing.point is not None and other.point is not None
    differences = {
        ("left of", "right of"): thing.point[0] - other.point[0],
        ("above", "below"): thing.point[1] - other.point[1],
        ("in front of", "behind"): thing.depth - other.depth,
    }
    words, difference = list(differences.items())[int(rng.integers(3))]
    if abs(difference) < 0.08:
        return None
    asked = int(rng.integers(2))
    return Pair(
        "relation", f"is the {name} {words[asked]} the {other_name}", "yes" if asked == (difference > 0) else "no"
    )


def _presence(sample: Sample, rng: np.random.Generator) -> Pair:
    visible = {thing.name for thing in sample.things if thing.visible}
    absent = sorted(set(NOUNS) - {thing.name for thing in sample.things})
    ask_for_present = bool(visible) and rng.random() < 0.5
    noun = str(rng.choice(sorted(visible) if ask_for_present else absent))
    return Pair("presence", f"is there a {noun}", "yes" if ask_for_present else "no")


def vocabulary_texts() -> list[str]:
    """Texts in which every word of instructions, prompts and answers is frequent, to train a tokenizer on."""
    states = {word for table in (*tables.METAWORLD.values(), tables.KITCHEN) for part in table for word in part.states}
    templates = [
        "describe the picture",
        "where is the",
        "what is at",
        "what colour is the",
        "is there a",
        "is the left of right of above below in front of behind the",
        "yes no hidden nothing gripper , open closed",
        "pick up push pull press turn slide open close lock unlock grasp carry reach move lift place put",
    ]
    words = [*colours.NAMES, *sorted(states), *NOUNS, *templates]
    return list(itertools.chain.from_iterable([text] * 20 for text in (*INSTRUCTIONS.values(), *words)))
