"""Markdown tables and curves of the runs under benchmarks/results/tables, written between markers into the documents.

    python benchmarks/render_tables.py            # rewrites DOCUMENTS and docs/benchmarks/*.png
    python benchmarks/render_tables.py --check    # writes nothing; fails if one of them is out of date

`<!-- benchmarks: all -->` ... `<!-- end benchmarks -->` holds everything about every preset that has runs,
`<!-- benchmarks: PRESET -->` the first table of one, `<!-- benchmarks: PRESET/stages -->` iRe-VLA's success stage by
stage, `<!-- benchmarks: PRESET/rates -->` what `stage2_rates.py` found. A row without a run is left out.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from table_curves import draw_curves, drawn_from, fingerprint
from table_runs import TableRun, common_seeds, expand, pool, read_runs
from tables import RESULTS, ROWS

from vla_rl.evaluation import EvaluationResult, paired_difference
from vla_rl.report import GROUPS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/index.md", "docs/concepts/stages.md")
MARKED = re.compile(r"(<!-- benchmarks: (\S+) -->\n)(?:(?!<!-- benchmarks: ).)*?(<!-- end benchmarks -->)", re.DOTALL)
NO_RUNS = "No run has been published yet.\n"
Runs = Mapping[str, Sequence[TableRun]]

SUCCESS_NOTE = (
    "Deterministic policy at the end of the run. In square brackets 95 % Wilson intervals over the episodes of all "
    "seeds, each of which has its own; they know nothing of the spread between training runs, so each seed's success "
    "follows in round brackets."
)
GAIN_NOTE = (
    "Differences on paired episodes: the same checkpoint after stage 0, the same reset seeds. 95 % bootstrap intervals "
    "over the episodes of all seeds; each seed's own difference in round brackets."
)
COST_NOTE = (
    "Means over seeds. Minutes are wall-clock with all evaluations; those of `sft` are for demonstrations and stage 0, "
    "which the other rows take over."
)


@dataclass
class Args:
    """What to write."""

    check: bool = False
    """write nothing; exit with 1 if a document or a picture is out of date"""
    results: Path = RESULTS
    """one directory of runs per table"""
    documents: tuple[Path, ...] = tuple(ROOT / name for name in DOCUMENTS)
    """files with markers"""
    pictures: Path = ROOT / "docs" / "benchmarks"
    """curves go to <pictures>/<preset>.png"""


def main(args: Args) -> int:
    """Write or check; returns the exit status.

    Raises:
        ValueError: a document names a preset without runs, or runs that cannot be compared.
    """
    presets = {
        path.name: in_order(read_runs(path)) for path in sorted(args.results.glob("*")) if any(path.glob("*.json"))
    }
    stale = []
    file = args.results.parent / "stage2_rates.json"
    again = json.loads(file.read_text()) if file.exists() else []
    for document in args.documents:
        before = document.read_text()
        after = fill(before, presets, again, picture=partial(link, document, args.pictures))
        if after != before:
            stale.append(document)
            if not args.check:
                document.write_text(after)
    for name, runs in presets.items():
        path, digest = args.pictures / f"{name}.png", fingerprint(args.results / name)
        if drawn_from(path) != digest:
            stale.append(path)
            if not args.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                draw_curves(runs, path, title=name, digest=digest)
    for path in stale:
        print(f"{path} {'is out of date: run python benchmarks/render_tables.py' if args.check else 'written'}")
    return int(args.check and bool(stale))


def in_order(runs: Mapping[str, Sequence[TableRun]]) -> Runs:
    """Rows in the order of `tables.ROWS`, others after them."""
    return {method: runs[method] for method in [*(m for m in ROWS if m in runs), *(m for m in runs if m not in ROWS)]}


def link(document: Path, pictures: Path, preset: str) -> str:
    """A preset's curves as the document names them."""
    return Path(os.path.relpath(pictures / f"{preset}.png", document.parent)).as_posix()


def fill(
    text: str, presets: Mapping[str, Runs], again: Sequence[Mapping[str, Any]] = (), *, picture: Callable[[str], str]
) -> str:
    """`text` with everything between markers made anew.

    Args:
        text: of a document.
        presets: name -> runs.
        again: stages 2 of these runs at other learning rates, from `stage2_rates.py`.
        picture: name -> link to its curves.

    Raises:
        ValueError: a marker names a preset without runs, or has no end.
    """
    if text.count("<!-- benchmarks: ") != len(MARKED.findall(text)):
        raise ValueError("a marker `<!-- benchmarks: NAME -->` is not followed by `<!-- end benchmarks -->` of its own")

    def block(match: re.Match[str]) -> str:
        begin, marker, end = match.groups()
        name, _, part = marker.partition("/")
        if name == "all":
            body = (
                "\n".join(section(preset, runs, picture=picture(preset)) for preset, runs in presets.items()) or NO_RUNS
            )
        elif name not in presets:
            raise ValueError(f"a marker asks for {name!r}, which has no runs; there are {', '.join(presets) or 'none'}")
        elif part == "stages":
            body = stage_table(presets[name]["ire-vla"])
        elif part == "rates":
            body = rates_table(presets[name], [entry for entry in again if entry["table"] == name])
        else:
            body = success_table(presets[name])
        return f"{begin}\n{body}\n{end}"

    return MARKED.sub(block, text)


def section(name: str, runs: Runs, *, picture: str) -> str:
    """Everything about one table."""
    parts = [f"## {name}", provenance(name, runs), "### Success at the end", success_table(runs)]
    if set(runs) > {"sft"}:
        parts += ["### Gain over stage 0, and what iRe-VLA is ahead", gain_table(runs)]
        parts += ["### Forgetting", forgetting_table(runs)]
    parts += ["### By task", task_table(runs), "### Cost", cost_table(runs), f"![Curves of {name}]({picture})"]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def provenance(name: str, runs: Runs) -> str:
    """How the runs of a table were made."""
    everything = [run for row in runs.values() for run in row]
    data = [run.data for run in everything]
    seeds = " ".join(str(seed) for seed in sorted({run.seed for run in everything}))
    options = " ".join(data[0]["options"])
    commits = sorted(
        {f"`{entry['commit'][:10]}`" + " with changes" * bool(entry["modified"]) for entry in data if entry["commit"]}
    )
    starts = {entry["stage0_sha256"] for entry in data}
    numbers = {run.seed for run in everything}
    packages = ", ".join(f"{name} {version}" for name, version in data[0]["versions"].items() if name != "platform")
    named = f"{data[0]['preset']} --name {name}" if data[0]["preset"] != name else name
    lines = [f"    python benchmarks/tables.py --preset {named} --seeds {seeds} {options}".rstrip(), ""]
    lines.append(f"Commit {', '.join(commits) or 'unknown'}; {packages}; {data[0]['cores']} cores.")
    if len({str(entry["versions"]) for entry in data}) > 1:
        lines.append("Not all runs had the same versions: see their files.")
    lines.append(
        "One seed."
        if len(numbers) == 1
        else "All seeds share one stage 0: their spread is that of what comes after it."
        if len(starts) == 1
        else "Every seed has a stage 0 of its own, shared by all rows."
        if len(starts) == len(numbers)
        else f"The {len(numbers)} seeds have {len(starts)} stages 0 among them, each shared by all rows of its seeds."
    )
    few = {method: sorted(run.seed for run in row) for method, row in runs.items() if len(row) < len(numbers)}
    if few:
        fewer = [f"`{method}` {', '.join(map(str, seeds))}" for method, seeds in few.items()]
        lines.append(f"Rows of fewer seeds, which are: {'; '.join(fewer)}.")
    return "\n".join(lines)


def success_table(runs: Runs) -> str:
    """Row x group: pooled success, its interval, and each seed's own."""
    groups = [group for group in GROUPS if any(run.last(group) for row in runs.values() for run in row)]
    lines = _head("method", *(GROUPS[group] for group in groups), "episodes")
    for method, row in runs.items():
        results = [[result for run in row if (result := run.last(group))] for group in groups]
        cells = [success_cell(found) if found else "" for found in results]
        counts = " / ".join(str(_episodes(pool(found))) if found else "-" for found in results)
        lines.append(_row(method, *cells, counts))
    lines += ["", SUCCESS_NOTE]
    return "\n".join(lines) + "\n"


def stage_table(row: Sequence[TableRun]) -> str:
    """Evaluation x group of one row: pooled success, its interval, and each seed's own."""
    groups = [group for group in GROUPS if row[0].last(group)]
    lines = _head("after", *(GROUPS[group] for group in groups), "episodes")
    rounds = {label.rpartition("after-")[0] for label in row[0].phases} - {""}
    for label in row[0].phases:
        results = [[run.phases[label][group] for run in row] for group in groups]
        counts = " / ".join(str(_episodes(pool(found))) for found in results)
        of = f" of {label.rpartition('-after-')[0]}" if len(rounds) > 1 and "-after-" in label else ""
        lines.append(_row(f"stage {label[-1]}{of}", *(success_cell(found) for found in results), counts))
    lines += ["", SUCCESS_NOTE.replace("at the end of the run", "after each stage of `ire-vla`")]
    return "\n".join(lines) + "\n"


def rates_table(runs: Runs, again: Sequence[Mapping[str, Any]]) -> str:
    """Row x group: success of the runs that had their stage 2 once more, as they were and at other learning rates."""
    lines = _head("method", "rates of head and LoRA", *GROUPS.values(), "RL tasks: ire-vla minus this row")
    found: dict[tuple[float, float], dict[str, dict[int, dict[str, EvaluationResult]]]] = {}
    for entry in again:
        method, _, seed = entry["run"].rpartition("-s")
        rates = found.setdefault((entry["learning_rate"], entry["encoder_learning_rate"]), {})
        rates.setdefault(method, {})[int(seed)] = {g: expand(tasks) for g, tasks in entry["evaluation"].items()}
    for rates, rows in found.items():
        for method in (method for method in runs if method in rows):
            seeds = sorted(rows[method])
            before = {run.seed: {group: run.last(group) for group in GROUPS} for run in runs[method]}
            best = {run.seed: {"rl": run.last("rl")} for run in runs.get("ire-vla", ())}
            for words, mine, other in (
                ("as in the table", before, best),
                (f"{rates[0]:g}, {rates[1]:g}", rows[method], rows.get("ire-vla", {})),
            ):
                results = [[result for seed in seeds if (result := mine[seed].get(group))] for group in GROUPS]
                cells = [success_cell(each) if each else "" for each in results]
                pairs = [(mine[seed]["rl"], other[seed]["rl"]) for seed in seeds if seed in other]
                lines.append(_row(method, words, *cells, gain_cell(pairs) if method != "ire-vla" else ""))
    return "\n".join(lines) + "\n"


def success_cell(results: Sequence[EvaluationResult]) -> str:
    """`.84 [.79, .89] (.81 .84 .88)`: mean over seeds and tasks, interval, the seeds."""
    pooled = pool(results)
    low, high = pooled.interval
    return f"{rate(pooled.mean)} [{rate(low)}, {rate(high)}] ({' '.join(rate(result.mean) for result in results)})"


def gain_table(runs: Runs) -> str:
    """Row x group: last minus first evaluation on paired episodes; and iRe-VLA minus the row on the RL tasks."""
    best = runs.get("ire-vla", ())
    lines = _head("method", *(f"{name}: gain" for name in GROUPS.values()), "RL tasks: ire-vla minus this row")
    for method, row in runs.items():
        if method == "sft":
            continue
        cells = [gain_cell([(run.first(group), run.last(group)) for run in row]) for group in GROUPS]
        pairs = common_seeds(row, best) if method != "ire-vla" else []
        lines.append(_row(method, *cells, gain_cell([(this.last("rl"), other.last("rl")) for this, other in pairs])))
    lines += ["", GAIN_NOTE]
    return "\n".join(lines) + "\n"


def gain_cell(pairs: Sequence[tuple[EvaluationResult | None, EvaluationResult | None]]) -> str:
    """`+.22 [+.15, +.29] (+.20 +.23)`; empty if there is no pair."""
    both = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not both:
        return ""
    difference, low, high = paired_difference(pool(b for b, _ in both), pool(a for _, a in both))
    seeds = " ".join(signed(after.mean - before.mean) for before, after in both)
    return f"{signed(difference)} [{signed(low)}, {signed(high)}] ({seeds})"


def cost_table(runs: Runs) -> str:
    """Row -> env steps, VLM frames, successes kept, minutes; means over seeds."""
    lines = _head("method", "seeds", "env steps", "VLM frames in stage 1", "successes kept", "minutes")
    for method, row in runs.items():
        kept = [sum(entry["stored_successes"] for entry in run.data["stage1"].values()) for run in row]
        figures = ([run.data[key] for run in row] for key in ("env_steps", "vlm_frames"))
        minutes = [run.data["minutes"] for run in row]
        spread = f" ({min(minutes):.0f} to {max(minutes):.0f})" if len(row) > 1 else ""
        seeds = ", ".join(str(run.seed) for run in row)
        cells = [f"{np.mean(values):,.0f}" for values in (*figures, kept)]
        lines.append(_row(method, seeds, *cells, f"{np.mean(minutes):.0f}{spread}"))
    lines += ["", COST_NOTE]
    return "\n".join(lines) + "\n"


def forgetting_table(runs: Runs) -> str:
    """Row -> success on the expert tasks after stage 0 and after each RL task."""
    curves = {method: [run.after_tasks("expert") for run in row] for method, row in runs.items() if method != "sft"}
    tasks = list(dict.fromkeys(name for row in runs.values() for run in row for name in rl_tasks(run)))
    lines = _head("method", "expert tasks after stage 0", *(f"after {name}" for name in tasks))
    for method, seeds in curves.items():
        columns = [rate(pool(results).mean) for results in zip(*seeds, strict=False)]
        lines.append(_row(method, *columns, *[""] * (1 + len(tasks) - len(columns))))
    return "\n".join(lines) + "\n"


def task_table(runs: Runs) -> str:
    """Task x row: pooled success after the last stage, after stage 0 for `sft`."""
    lines = _head("task", *runs)
    for group in GROUPS:
        pooled = {
            m: pool(found) if (found := [r for run in row if (r := run.last(group))]) else None
            for m, row in runs.items()
        }
        for name in dict.fromkeys(name for result in pooled.values() if result for name in result.tasks):
            cells = [rate(result.tasks[name].rate) if result else "" for result in pooled.values()]
            lines.append(_row(f"{name} ({group})", *cells))
    return "\n".join(lines) + "\n"


def rl_tasks(run: TableRun) -> list[str]:
    """Labels of the RL tasks in the order of learning."""
    rl = run.first("rl")
    return list(rl.tasks) if rl else []


def rate(value: float) -> str:
    """`.84`, `1.00`."""
    return f"{value:.2f}".removeprefix("0")


def signed(value: float) -> str:
    """`+.22`, `-.03`, `+1.00`; what rounds to nothing is `.00`."""
    sign, number = f"{value:+.2f}"[0], rate(abs(value))
    return number if number == ".00" else sign + number


def _episodes(result: EvaluationResult) -> int:
    return sum(task.n for task in result.tasks.values())


def _head(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except ValueError as error:
        sys.exit(f"render_tables.py: {error}")
