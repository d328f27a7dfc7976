"""Which episodes of a store are meant: expressions over their attributes, seeded samples and splits."""

from __future__ import annotations

import ast
import difflib
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vla_rl.data.layout import EpisodeInfo

NAMES = ("index", *(name for name in EpisodeInfo._fields if name != "moments"))
"""What an expression may speak of: fields of ``EpisodeInfo``, and ``index``, the number of the episode."""

MAX_EXPRESSION = 2000

Evaluate = Callable[[Mapping[str, Any]], Any]

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ORDERINGS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def select(infos: Sequence[EpisodeInfo], where: str | None = None) -> list[int]:
    """Numbers of the episodes for which an expression holds, in order.

    The expression is Python's, of ``and or not``, comparisons, ``in``, numbers, strings, lists and ``+ - * / // %``
    between numbers, such as ``success and task == 'drawer-open' and total_steps < 120`` or ``index % 10 == 0``. It is
    interpreted, not executed. An ordering with an unknown value (``seed < 5`` where there is no seed) is False.

    Args:
        infos: the index of a store, ``store.index``.
        where: the expression; None selects all episodes.

    Raises:
        ValueError: if it is not such an expression, or names or types do not fit.
    """
    if where is None:
        return list(range(len(infos)))
    evaluate = _compile(where)
    chosen = []
    for index, info in enumerate(infos):
        try:
            holds = evaluate({"index": index, **info._asdict()})
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"cannot evaluate {where!r} for episode {index}: {error}") from error
        if holds:
            chosen.append(index)
    return chosen


def _compile(where: str) -> Evaluate:
    if len(where) > MAX_EXPRESSION:
        raise ValueError(f"the expression has {len(where)} characters; at most {MAX_EXPRESSION} are allowed")
    try:
        return _build(ast.parse(where.strip(), mode="eval").body, where)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ValueError) and not isinstance(error, SyntaxError) and error.args[1:] == ("ours",):
            raise ValueError(error.args[0]) from None
        example = "success and task == 'drawer-open' and total_steps < 120"
        reason = getattr(error, "msg", None) or type(error).__name__
        raise ValueError(f"{where!r} is not an expression ({reason}); write it like {example!r}") from error


def _refusal(message: str) -> ValueError:
    return ValueError(message, "ours")


def _build(node: ast.expr, where: str) -> Evaluate:
    """Turns one node into a function of the episode's attributes, or refuses it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
        value = node.value
        return lambda names: value
    if isinstance(node, ast.Name):
        return _name(node.id)
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        items = [_build(item, where) for item in node.elts]
        return lambda names: [item(names) for item in items]
    if isinstance(node, ast.BoolOp):
        parts = [_build(part, where) for part in node.values]
        combine = all if isinstance(node.op, ast.And) else any
        return lambda names: combine(part(names) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        operand, negate = _build(node.operand, where), isinstance(node.op, ast.Not)
        return lambda names: not operand(names) if negate else -operand(names)
    if isinstance(node, ast.Compare):
        return _comparison(node, where)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _arithmetic(_ARITHMETIC[type(node.op)], _build(node.left, where), _build(node.right, where))
    piece = ast.get_source_segment(where.strip(), node) or type(node).__name__
    raise _refusal(
        f"{piece!r} is not allowed in an expression; it may use and, or, not, comparisons, in, numbers, strings, "
        f"arithmetic and the names {', '.join(NAMES)}"
    )


def _name(name: str) -> Evaluate:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise _refusal(f"episodes have no attribute {name!r}; {hint}The names are {', '.join(NAMES)}")
    return lambda names: names[name]


def _comparison(node: ast.Compare, where: str) -> Evaluate:
    operands = [_build(operand, where) for operand in (node.left, *node.comparators)]
    kinds = [type(op) for op in node.ops]

    def compare(names: Mapping[str, Any]) -> bool:
        values = [operand(names) for operand in operands]
        return all(
            not (kind in _ORDERINGS and (left is None or right is None)) and _COMPARISONS[kind](left, right)
            for kind, left, right in zip(kinds, values, values[1:], strict=False)
        )

    return compare


def _arithmetic(apply: Callable[[Any, Any], Any], left: Evaluate, right: Evaluate) -> Evaluate:
    def calculate(names: Mapping[str, Any]) -> Any:
        values = left(names), right(names)
        if any(value is None for value in values):
            return None
        if not all(isinstance(value, int | float) for value in values):
            raise TypeError(f"arithmetic is for numbers, not {values[0]!r} and {values[1]!r}")
        return apply(*values)

    return calculate


def balanced_sample(infos: Sequence[EpisodeInfo], number: int, *, seed: int) -> list[int]:
    """``number`` episodes, as evenly over the tasks as they allow, drawn without replacement; sorted.

    A task with fewer episodes than its share gives all it has, and the others share the rest.

    Raises:
        ValueError: if there are fewer episodes than asked for.
    """
    if not 0 < number <= len(infos):
        raise ValueError(f"cannot sample {number} of {len(infos)} episodes; ask for 1 to {len(infos)}")
    rng = np.random.default_rng(seed)
    pools = [rng.permutation(indices) for _, indices in sorted(by_task(infos).items())]
    chosen: list[int] = []
    for turn in range(max(map(len, pools))):
        still = [pool for pool in pools if len(pool) > turn]
        for pool in (still[k] for k in rng.permutation(len(still))):
            if len(chosen) < number:
                chosen.append(int(pool[turn]))
    return sorted(chosen)


def split_by_fraction(infos: Sequence[EpisodeInfo], fraction: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Two sorted lists of episodes; the first has ``fraction`` of every task's episodes, to the nearest whole number.

    Raises:
        ValueError: unless ``0 < fraction < 1``.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}; 0.9 keeps nine of ten for the first part")
    rng = np.random.default_rng(seed)
    first: list[int] = []
    second: list[int] = []
    for _, indices in sorted(by_task(infos).items()):
        shuffled = rng.permutation(indices)
        count = int(fraction * len(shuffled) + 0.5)
        first += shuffled[:count].tolist()
        second += shuffled[count:].tolist()
    return sorted(first), sorted(second)


def by_task(infos: Sequence[EpisodeInfo]) -> dict[str, list[int]]:
    """Numbers of the episodes of each task, in order."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, info in enumerate(infos):
        groups[info.task].append(index)
    return dict(groups)
