"""The part of a run's page about time: which phase took how much of it, and what stage 1 did with its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from vla_rl._html import duration, paragraph, section, table, text
from vla_rl.runs import Run


def time_section(run: Run) -> str:
    """A bar of all phases, a table of them, and a table of what the rollouts and updates of stage 1 took."""
    seconds = dict(run.results.get("seconds", {}))
    total = seconds.pop("total", None) or sum(seconds.values())
    seconds = {name: value for name, value in seconds.items() if value >= 0.5}  # the others are part of the rest
    if not seconds:
        return ""
    seconds["rest"] = max(0.0, total - sum(seconds.values()))
    kinds = {name: _time_kind(name) for name in seconds}
    bar = "".join(
        f'<i class="s{kinds[name]}" style="flex:{value:.3f}" title="{text(name)}: {duration(value)}"></i>'
        for name, value in seconds.items()
        if value > 0.005 * total
    )
    legend = {"expert episodes": 4, "supervised learning": 2, "online RL": 1, "evaluation": 0, "rest": 5}
    used = {kinds[name] for name, value in seconds.items() if value > 0.005 * total}
    names = "".join(f'<li><i class="s{k}"></i>{name}</li>' for name, k in legend.items() if k in used)
    rows: list[Sequence[object]] = [
        (phase_title(name, seconds), duration(value), f"{value / total:.0%}") for name, value in seconds.items()
    ]
    return section(
        "time",
        "Where the time went",
        paragraph(f"{duration(total)} in all.", css="lead"),
        f'<div class="stack">{bar}</div><ul class="legend">{names}</ul>',
        table(("phase", "time", "share"), rows, numbers=(1, 2)),
        *_inside_stage1(run),
    )


def _inside_stage1(run: Run) -> list[str]:
    last = {entry["phase"]: entry for entry in run.metrics if "time/rollout_s" in entry}
    rows = []
    for phase, entry in last.items():
        rollout, simulate, encode, update = (
            entry.get(f"time/{name}_s", 0.0) for name in ("rollout", "simulate", "encode", "update")
        )
        rest = max(0.0, rollout - simulate - encode)
        rows.append((phase_title(phase, last), *(duration(v) for v in (encode, simulate, rest, update))))
    if not rows:
        return []
    header = ("inside stage 1", "VLM", "waiting for simulation", "rest of the rollout", "update")
    return [str(table(header, rows, numbers=(1, 2, 3, 4)))]


def phase_title(phase: str, phases: Iterable[str]) -> str:
    """`"task1-round0-eval2"` as "evaluation after stage 2 (task 1, round 0)", the latter where there are several."""
    parts = re.fullmatch(r"(?:task(\d+)-round(\d+)-|)(stage|eval|eval-stage)(\d)", phase)
    if parts is None:
        return {"collect": "expert episodes"}.get(phase, phase)
    task, round_, kind, number = parts.groups()
    name = f"stage {number}" if kind == "stage" else f"evaluation after stage {number}"
    several = len({found.group() for other in phases if (found := re.match(r"task\d+-round\d+-", other))}) > 1
    return f"{name} (task {task}, round {round_})" if task and several else name


def _time_kind(phase: str) -> int:
    if phase == "collect":
        return 4
    if "eval" in phase:
        return 0
    if phase.endswith("stage1"):
        return 1
    return 2 if "stage" in phase else 5
