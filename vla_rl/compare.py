"""`vla-rl compare`: runs side by side at their ends, the difference from the first one taken on the same resets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vla_rl._html import Raw, duration, page, paragraph, rate, section, table, tag, text
from vla_rl._svg import Series, line_chart
from vla_rl.evaluation import EvaluationResult, paired_difference
from vla_rl.report import markdown_table, outcome, sign_test
from vla_rl.runs import GROUPS, Run, read_run, standing


@dataclass(frozen=True)
class Comparison:
    """One run's last evaluation of a group (or of one task of it), beside that of the first run.

    Attributes:
        group: "expert", "rl" or "unseen".
        task: task label, or None for the mean over the group.
        run: name of the run.
        result: its success.
        difference: (difference, low, high) from the first run on the pairs, or None where there are none, or for the
            first run itself.
        pairs: episodes of the same task and reset seed in both.
        p: of the exact sign test, where there are pairs.
        words: "a gain", "a loss", that nothing can be shown, or why there is no comparison.
    """

    group: str
    task: str | None
    run: str
    result: EvaluationResult
    difference: tuple[float, float, float] | None = None
    pairs: int = 0
    p: float | None = None
    words: str = ""


def last_evaluation(run: Run, group: str) -> EvaluationResult | None:
    """The latest evaluation of a group, of weights that no rollback gave up."""
    found = [groups[group] for groups in standing(run.results).values() if group in groups]
    return found[-1] if found else None


def paired(first: EvaluationResult, second: EvaluationResult) -> tuple[EvaluationResult, EvaluationResult] | None:
    """Both results cut down to the tasks and reset seeds that they share; None if they share none."""
    cut: tuple[dict, dict] = ({}, {})
    for name in first.tasks:
        if name not in second.tasks:
            continue
        seeds = {e.seed for e in first.tasks[name].episodes} & {e.seed for e in second.tasks[name].episodes}
        if seeds:
            for mine, result in zip(cut, (first, second), strict=True):
                task = result.tasks[name]
                mine[name] = replace(task, episodes=tuple(e for e in task.episodes if e.seed in seeds))
    return (EvaluationResult(cut[0]), EvaluationResult(cut[1])) if cut[0] else None


def compare(runs: Sequence[Run], *, by_task: bool = False) -> list[Comparison]:
    """Every run's last evaluation, group by group, compared with the first run's.

    Args:
        runs: two or more; the first is the one to compare with.
        by_task: one comparison per task instead of per group.

    Raises:
        ValueError: there are fewer than two runs, or none of them has been evaluated.
    """
    if len(runs) < 2:
        raise ValueError(f"compare got {len(runs)} run; give two or more, the first is the one to compare with")
    rows: list[Comparison] = []
    names = distinct_names(runs)
    for group in GROUPS:
        results = [last_evaluation(run, group) for run in runs]
        for task in _tasks(results) if by_task else [None]:
            for number, (name, result) in enumerate(zip(names, results, strict=True)):
                if result is None or (task is not None and task not in result.tasks):
                    continue
                mine = result if task is None else result.group([task])
                row = Comparison(group, task, name, mine)
                rows.append(row if number == 0 else _against(results[0], row))
    if not rows:
        raise ValueError("none of these runs has finished an evaluation; give runs with a results.json that has one")
    return rows


def _against(first: EvaluationResult | None, row: Comparison) -> Comparison:
    pair = None if first is None else paired(first, row.result)
    if pair is None:
        return replace(row, words="not paired: no task and reset seed in common")
    pairs = sum(task.n for task in pair[1].tasks.values())
    n = sum(task.n for task in row.result.tasks.values())
    words = outcome(*pair) + ("" if pairs == n else f" ({pairs} of its {n} episodes are paired)")
    return replace(row, difference=paired_difference(*pair), pairs=pairs, p=sign_test(*pair), words=words)


def _tasks(results: Sequence[EvaluationResult | None]) -> list[str]:
    return list(dict.fromkeys(name for result in results if result is not None for name in result.tasks))


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """Last part of every run's path, or the whole path where two share it."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(run.name) > 1 else run.name for run in runs]


def markdown(runs: Sequence[Run], *, by_task: bool = False) -> str:
    """The comparison as Markdown."""
    lines = markdown_table(("run", "method", "seed", "env steps in stage 1", "time"), _facts(runs))
    cells = []
    for row in compare(runs, by_task=by_task):
        low, high = row.result.interval
        n = sum(task.n for task in row.result.tasks.values())
        change = "" if row.difference is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row.difference)
        success = f"{row.result.mean:.2f} [{low:.2f}, {high:.2f}]"
        cells.append((row.task or GROUPS[row.group], row.run, success, str(n), change, _p(row.p), row.words))
    lines += ["", *markdown_table(("tasks", "run", "success", "n", "difference from the first", "p", ""), cells)]
    return "\n".join([*lines, "", _EXPLANATION, *_mismatches(runs), ""])


def write_comparison(runs: Sequence[Run], out: str | Path) -> Path:
    """Write the comparison as a self-contained page."""
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(runs))
    return path


def render(runs: Sequence[Run]) -> str:
    """The page's HTML."""
    names = distinct_names(runs)
    title = " / ".join(names)
    facts = table(("run", "method", "seed", "env steps in stage 1", "time"), _facts(runs), numbers=(2, 3, 4))
    warnings = "".join(paragraph(words, css="note") for words in _mismatches(runs))
    lead = f"At their ends; compared with {names[0]} on the same resets."
    body = [
        f'<h1>{len(runs)} runs</h1><p class="lead">{text(lead)}</p>',
        facts,
        warnings,
        section("groups", "Success", f'<div class="charts">{_stage_charts(runs)}</div>', _table(compare(runs), names)),
        section("tasks", "Every task", _table(compare(runs, by_task=True), names)),
        section("practice", "Practice", f'<div class="charts">{_practice_chart(runs)}</div>'),
        paragraph(_EXPLANATION, css="note"),
        "<footer>Written by <code>vla-rl compare</code>.</footer>",
    ]
    return page(title, "\n".join(body))


def _table(rows: Sequence[Comparison], names: Sequence[str]) -> Raw:
    body: list[Sequence[object]] = []
    heading = None
    for row in rows:
        above = row.task or GROUPS[row.group]
        if above != heading:
            heading = above
            body.append((above[0].upper() + above[1:] if row.task is None else above,))
        success = rate(
            row.result.mean,
            *row.result.interval,
            sum(t.n for t in row.result.tasks.values()),
            kind=names.index(row.run) % 6,
        )
        if row.difference is None:
            body.append((row.run, success, "", "", row.words))
        else:
            difference, low, high = row.difference
            change = Raw(
                f'<b>{difference:+.2f}</b> <span class="ci">[{low:+.2f}, {high:+.2f}] {row.pairs} pairs</span>'
            )
            body.append((row.run, success, change, _p(row.p), tag(row.words.split(" (")[0])))
    return table(("run", "success", "difference from the first", "p", ""), body)


def _stage_charts(runs: Sequence[Run]) -> str:
    charts = []
    names = distinct_names(runs)
    for group, title in GROUPS.items():
        series = []
        for number, (name, run) in enumerate(zip(names, runs, strict=True)):
            found = [groups[group] for groups in standing(run.results).values() if group in groups]
            ends = [found[0], found[-1]] if len(found) > 1 else found
            x = [i + 0.04 * (number - (len(runs) - 1) / 2) for i in range(len(ends))]
            series.append(Series(name, x, [r.mean for r in ends], [r.interval for r in ends], number % 6))
        title = f"{title[0].upper()}{title[1:]}"
        charts.append(line_chart(series, title=title, x_names=("stage 0", "the end"), y_range=(0, 1)))
    return "".join(charts)


def _practice_chart(runs: Sequence[Run]) -> str:
    series = []
    for number, (name, run) in enumerate(zip(distinct_names(runs), runs, strict=True)):
        x, y, before = [], [], 0
        for phase in dict.fromkeys(e["phase"] for e in run.metrics if "charts/success_rate" in e):
            mine = [e for e in run.metrics if e["phase"] == phase and "charts/success_rate" in e]
            x += [before + e["step"] for e in mine]
            y += [e["charts/success_rate"] for e in mine]
            before = x[-1]
        series.append(Series(name, x, y, kind=number % 6))
    return line_chart(series, title="Success with exploration noise", x_label="env steps of stage 1", y_range=(0, 1))


def _facts(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    facts = []
    for name, run in zip(distinct_names(runs), runs, strict=True):
        steps = sum(v["num_env_steps"] for v in run.results.values() if isinstance(v, dict) and "num_env_steps" in v)
        total = run.results.get("seconds", {}).get("total") or sum(run.state.get("seconds", {}).values())
        time = duration(total) if run.finished else "not finished"
        facts.append((name, run.method, str(run.config.get("seed", "?")), f"{steps:,}", time))
    return facts


def _mismatches(runs: Sequence[Run]) -> list[str]:
    """What makes runs hard to compare although their episodes pair."""
    said = []
    starts = {group: [_start(run, group) for run in runs] for group in GROUPS}
    for group, results in starts.items():
        rates = {f"{r.mean:.4f}" for r in results if r is not None}
        if len(rates) > 1:
            said.append(
                f"The runs do not start from the same success on the {GROUPS[group]}: {', '.join(sorted(rates))}."
            )
    envs = [env for run in runs if (env := run.experiment.get("config", {}).get("env"))]
    different = sorted(key for key in set().union(*envs) if any(env.get(key) != envs[0].get(key) for env in envs))
    if different:
        said.append(
            f"The environments differ in {', '.join(different)}, so that episodes of the same task and seed are not "
            "the same: no difference below is one of the methods alone."
        )
    named = list(zip(distinct_names(runs), runs, strict=True))
    if none := [name for name, run in named if not run.evaluations]:
        said.append(f"No evaluation has finished: {', '.join(none)}; not in the table.")
    if open_ := [name for name, run in named if run.evaluations and not run.finished]:
        said.append(f"Not finished: {', '.join(open_)}; their latest evaluations are shown.")
    return said


def _start(run: Run, group: str) -> EvaluationResult | None:
    return next((groups[group] for groups in run.evaluations.values() if group in groups), None)


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read several runs.

    Raises:
        FileNotFoundError: there is no run at one of the paths.
    """
    return [read_run(path) for path in paths]


_EXPLANATION = (
    "Success of the deterministic policy at the end of a run, with 95 % Wilson intervals. Differences are on episodes "
    "of the same task and reset seed, with paired bootstrap intervals; p is that of the exact sign test. One run is "
    "one training seed: neither knows how much runs differ from seed to seed."
)
