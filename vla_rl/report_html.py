"""`report.html`: one run as a self-contained page that can be sent to somebody; it asks nothing of the network."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vla_rl._html import Raw, duration, page, paragraph, rate, section, table, tag, text
from vla_rl._svg import Series, line_chart
from vla_rl.evaluation import EvaluationResult, paired_difference
from vla_rl.report import first_and_last, outcome, title
from vla_rl.report_episodes import Shot, animation, shots, strip
from vla_rl.report_settings import again_section, configuration_section
from vla_rl.report_time import phase_title, time_section
from vla_rl.runs import GROUPS, Run, read_run

KINDS = {group: i for i, group in enumerate(GROUPS)}
MAX_MEGABYTES = 16.0
STAGE1_CURVES = (
    ("charts/success_rate", "Success with exploration noise"),
    ("losses/approx_kl", "KL of an update"),
    ("losses/explained_variance", "Explained variance of the critic"),
    ("losses/entropy", "Entropy"),
    ("losses/clipfrac", "Share of clipped ratios"),
    ("losses/value_loss", "Loss of the critic"),
)


def write_html(path: str | Path, *, out: str | Path | None = None, max_megabytes: float = MAX_MEGABYTES) -> Path:
    """Write the page of the run at `path`, finished or not, and return where it lies.

    Args:
        path: directory of the run.
        out: file to write; by default `report.html` in it.
        max_megabytes: of animations; beyond it an episode is shown as a strip of frames.

    Raises:
        FileNotFoundError: there is no run.
    """
    run = read_run(path)
    file = Path(out) if out is not None else run.path / "report.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(render(run, max_megabytes=max_megabytes))
    return file


def render(run: Run, *, max_megabytes: float = MAX_MEGABYTES) -> str:
    """The page's HTML."""
    sections = [
        _success(run),
        _tasks(run),
        _learning(run),
        _episodes(run, max_megabytes),
        time_section(run),
        _guards(run),
        configuration_section(run),
        again_section(run),
    ]
    made = time.strftime("%Y-%m-%d %H:%M")
    footer = f"<footer>Written by <code>vla-rl report</code> on {made}.</footer>"
    body = "\n".join(filter(None, sections))
    return page(f"{run.name}: vla_rl run", "\n".join([_header(run, body), body, footer]))


def _header(run: Run, body: str) -> str:
    facts = [run.method, f"seed {run.config.get('seed', '?')}"]
    total = run.results.get("seconds", {}).get("total")
    if total:
        facts.append(duration(total))
    if not run.finished:
        facts.append(f"not finished: {len(run.state.get('done', []))} phases done")
    if stopped := run.state.get("stopped"):
        facts.append(f"asked to stop during {phase_title(stopped, run.state['done'])}")
    lead = " · ".join(facts)
    notes = "".join(paragraph(_with_code(note), css="note") for note in run.experiment.get("notes", ()))
    parts = re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', body)
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in parts)
    return f'<h1>{text(run.name)}</h1><p class="lead">{text(lead)}</p>{notes}<nav>{nav}</nav>{_cards(run)}'


def _cards(run: Run) -> str:
    cards = []
    for group, name in GROUPS.items():
        pair = first_and_last(run.results, group)
        if pair is None:
            continue
        before, after = pair
        difference, low, high = paired_difference(before, after)
        n = sum(task.n for task in after.tasks.values())
        cards.append(
            f'<div class="card"><h3>{name[0].upper() + name[1:]}</h3>'
            f'<div class="big"><span class="from">{before.mean:.2f} →</span> {after.mean:.2f}</div>'
            f"<p>{tag(outcome(*pair))}</p>"
            f'<p class="soft">{difference:+.2f} [{low:+.2f}, {high:+.2f}] on {n} paired episodes</p></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _success(run: Run) -> str:
    found = run.evaluations
    if not found:
        return section("success", "Success by stage", paragraph("No evaluation has finished yet.", css="soft"))
    labels = list(found)
    series = []
    for group, kind in KINDS.items():
        at = [i for i, groups in enumerate(found.values()) if group in groups]
        results = [found[labels[i]][group] for i in at]
        shifted = [i + 0.07 * (kind - 1) for i in at]
        line = Series(GROUPS[group], shifted, [r.mean for r in results], [r.interval for r in results], kind)
        series.append(line)
    names = [_short_title(label, found) for label in labels]
    chart = line_chart(series, title="Success of the deterministic policy", x_names=names, y_range=(0, 1))
    shown = [group for group in GROUPS if any(group in groups for groups in found.values())]
    rows = [
        (title(label, found), *(_rate(groups[g], KINDS[g]) if g in groups else "" for g in shown))
        for label, groups in found.items()
    ]
    return section(
        "success",
        "Success by stage",
        paragraph("The same reset seeds at every stage; 95 % Wilson intervals.", css="lead"),
        f'<div class="charts">{chart}{_task_chart(found, names)}</div>',
        table(("stage", *(GROUPS[group] for group in shown)), rows),
        paragraph(
            "A gain or a loss is one whose paired bootstrap interval leaves out zero and whose exact sign test has p "
            "below 0.05. The intervals know the spread between episodes, not between training seeds.",
            css="note",
        ),
    )


def _task_chart(found: Mapping[str, Mapping[str, EvaluationResult]], names: Sequence[str]) -> str:
    """Every RL and unseen task on its own, where there are few enough to tell apart."""
    tasks = [
        (g, t) for g in ("rl", "unseen") for t in dict.fromkeys(t for r in found.values() if g in r for t in r[g].tasks)
    ]
    if not 1 < len(tasks) <= 6:
        return ""
    series = []
    for kind, (group, task) in enumerate(tasks):
        at = [(i, r[group].tasks[task]) for i, r in enumerate(found.values()) if group in r and task in r[group].tasks]
        x = [i + 0.06 * (kind - len(tasks) / 2) for i, _ in at]
        series.append(Series(task, x, [t.rate for _, t in at], [t.interval for _, t in at], (kind + 1) % 6))
    return line_chart(series, title="Each RL and unseen task", x_names=names, y_range=(0, 1))


def _tasks(run: Run) -> str:
    found = run.evaluations
    stages = [label for label in found if any(group in found[label] for group in GROUPS)]
    body: list[Sequence[object]] = []
    for group, name in GROUPS.items():
        tasks = list(dict.fromkeys(t for label in stages if group in found[label] for t in found[label][group].tasks))
        if tasks:
            body.append((name[0].upper() + name[1:],))
        for task in tasks:
            cells = [
                _rate(found[label][group].group([task]), KINDS[group])
                if group in found[label] and task in found[label][group].tasks
                else ""
                for label in stages
            ]
            last = [found[s][group].tasks[task] for s in stages if group in found[s] and task in found[s][group].tasks]
            body.append((task, *cells, f"{last[-1].mean_length:.0f}"))
    if not body:
        return ""
    header = ("task", *(title(label, found) for label in stages), "steps")
    lead = "Success of every task; steps: mean length of the last evaluation's episodes."
    return section("tasks", "Every task", paragraph(lead, css="lead"), table(header, body, numbers=[len(header) - 1]))


def _learning(run: Run) -> str:
    charts = []
    phases = list(dict.fromkeys(entry["phase"] for entry in run.metrics))
    practice = [p for p in phases if any(e["phase"] == p and "charts/success_rate" in e for e in run.metrics)]
    for key, name in STAGE1_CURVES:
        series = [_curve(run, phase, key, kind) for kind, phase in enumerate(practice)]
        limits = (0.0, 1.0) if key == "charts/success_rate" else None
        charts.append(line_chart(series, title=f"Stage 1: {_lower(name)}", x_label="env steps", y_range=limits))
    supervised = [p for p in phases if any(e["phase"] == p and "losses/bc_loss" in e for e in run.metrics)]
    series = [_curve(run, phase, "losses/bc_loss", kind) for kind, phase in enumerate(supervised)]
    charts.append(line_chart(series, title="Supervised loss", x_label="gradient steps", log=True))
    stage1 = {k: v for k, v in run.results.items() if k.endswith("-stage1") and "-after-" not in k}
    rows = [
        (
            entry["task"],
            f"{entry['num_env_steps']:,}",
            f"{entry['num_episodes']:,}",
            f"{entry['num_vlm_frames'] / max(entry['num_env_steps'], 1):.2f}",
            f"{_noisy(entry['first_success_rate'])} → {_noisy(entry['last_success_rate'])}",
            f"{entry['stored_successes']:,}",
        )
        for entry in stage1.values()
    ]
    header = ("stage 1 on", "env steps", "episodes", "VLM frames per step", "noisy success", "successes kept")
    summary = table(header, rows, numbers=(1, 2, 3, 4, 5)) if rows else ""
    grid = f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    return section("learning", "Learning", summary, grid)


def _episodes(run: Run, max_megabytes: float) -> str:
    try:
        figures = _figures(run, shots(run), max_megabytes)
    except ImportError as error:
        return section("episodes", "Episodes", paragraph(error, css="soft"))
    parts = [f'<h3>{text(head)}</h3><div class="episodes">{"".join(group)}</div>' for head, group in figures.items()]
    lead = "The first of the evaluation, the best (the success of fewest steps), and a failure, where there are such."
    return section("episodes", "Episodes", paragraph(lead, css="lead"), *parts) if parts else ""


def _figures(run: Run, found: Sequence[Shot], max_megabytes: float) -> dict[str, list[str]]:
    labels = list(run.evaluations)
    figures: dict[str, list[str]] = {}
    used = 0
    for shot in found:
        head = title(shot.when, labels) if shot.when in labels else "practice in stage 1"
        still = strip(shot.frames)
        film = animation(shot.frames)
        used += len(film)
        seen = f"{shot.task} {head}"
        css = "film small" if max(shot.frames.shape[1:3]) < 160 else "film"
        moving = f'<img class="{css}" src="{film}" alt="{text(seen)}">' if used <= max_megabytes * 1e6 else ""
        seed = "" if shot.seed is None else f" · seed {shot.seed}"
        state = (
            Raw('<span class="tag good">success</span>')
            if shot.success
            else Raw('<span class="tag bad">failure</span>')
        )
        figures.setdefault(shot.task, []).append(
            f'<figure class="episode">{moving}<img class="strip" src="{still}" alt="frames of the episode">'
            f"<figcaption><b>{text(head)}</b><br>{text(shot.why)} {state}<br>"
            f'<span class="soft">{shot.length} steps{seed}</span></figcaption></figure>'
        )
    return figures


def _guards(run: Run) -> str:
    if run.guards is None:
        kept = "None was raised." if "files" in run.state else "This run is of a version that kept no record of guards."
        return section("guards", "Guards", paragraph(kept, css="soft"))
    raised = []
    for found in run.guards:
        phase = phase_title(str(found.get("phase", "?")), run.state.get("done", []))
        raised.append(
            f'<div class="guard"><b>{text(found.get("guard", "guard"))}</b> <span class="soft">in {text(phase)}</span>'
            f"<br>{text(found.get('message', ''))}</div>"
        )
    return section("guards", "Guards", *(raised or [paragraph("None was raised.")]))


def _rate(result: EvaluationResult, kind: int) -> Raw:
    return rate(result.mean, *result.interval, sum(task.n for task in result.tasks.values()), kind=kind)


def _curve(run: Run, phase: str, key: str, kind: int) -> Series:
    mine = [entry for entry in run.metrics if entry["phase"] == phase and key in entry]
    name = phase_title(phase, (entry["phase"] for entry in run.metrics))
    return Series(name, [entry["step"] for entry in mine], [entry[key] for entry in mine], kind=kind % 6)


def _short_title(label: str, labels: Mapping[str, object]) -> str:
    full = title(label, labels).removeprefix("after ")
    return full.replace(" (", "\n").rstrip(")")


def _noisy(value: float) -> str:
    """A success rate; a dash where no episode ended in time to have one."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def _with_code(words: str) -> Raw:
    """Words in which `backticks` are code."""
    return Raw(re.sub("`([^`]+)`", r"<code>\1</code>", text(words)))


def _lower(words: str) -> str:
    return words if words[:2].isupper() else words[0].lower() + words[1:]
