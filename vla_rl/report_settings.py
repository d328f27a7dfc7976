"""The parts of a run's page about what it was: every setting beside its default, commands, and versions."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from vla_rl._html import paragraph, section, text
from vla_rl.config import IterativeConfig
from vla_rl.report import versions
from vla_rl.runs import Run


def configuration_section(run: Run) -> str:
    """Every setting, grouped as in the configuration; what is not the default stands out."""
    from vla_rl.experiment import ExperimentConfig

    defaults = asdict(IterativeConfig())
    whole, standard = run.experiment.get("config", {}), asdict(ExperimentConfig())
    groups: dict[str, list[tuple[str, Any, Any]]] = {"schedule": []}
    if whole:  # what an experiment is about has no default worth comparing with
        groups["experiment"] = [(k, v, v) for k, v in whole.items() if not isinstance(v, dict)]
    for name in ("env", "model", "guards"):
        groups[name] = [(k, v, standard[name].get(k)) for k, v in whole.get(name, {}).items()]
    for key, value in run.config.items():
        if isinstance(value, dict):
            standard = defaults.get(key, {})
            groups[key] = [(k, v, standard.get(k)) for k, v in value.items()]
        else:
            groups["schedule"].append((key, value, defaults.get(key)))
    lead = "Bold: not the library's default, which stands beside it."
    parts = [_settings(name, entries) for name, entries in groups.items() if entries]
    return section("configuration", "Configuration", paragraph(lead, css="lead"), *parts)


def _settings(name: str, entries: list[tuple[str, Any, Any]]) -> str:
    lines, changed = [], 0
    for key, value, default in entries:
        differs = value != default and not (isinstance(value, list) and list(default or ()) == value)
        changed += differs
        was = f" <span>({text(_value(default))})</span>" if differs else ""
        css = ' class="changed"' if differs else ""
        lines.append(f"<div{css}><dt>{text(key)}</dt><dd>{text(_value(value))}{was}</dd></div>")
    count = f"{changed} of {len(entries)} changed" if changed else f"{len(entries)} settings"
    return (
        f'<details><summary>{text(name)} <span class="soft">{count}</span></summary><dl>{"".join(lines)}</dl></details>'
    )


def again_section(run: Run) -> str:
    """The commands that started the run, continue it, evaluate its policy and show its curves; and versions."""
    parts = []
    if command := run.experiment.get("command"):
        parts.append(f"<h3>Started by</h3><pre>{text(command)}</pre>")
    if not run.finished:
        parts.append(f"<h3>Continue it</h3><pre>{text(run.resume_command)}</pre>")
    if checkpoint := run.state.get("checkpoint"):
        tasks = [
            name for groups in list(run.evaluations.values())[-1:] if "rl" in groups for name in groups["rl"].tasks
        ]
        words = ["vla-rl", "eval", str(run.path / checkpoint), "--tasks", *(tasks or ["TASK"]), *_env_options(run)]
        parts.append(f"<h3>Evaluate its last policy</h3><pre>{text(shlex.join(words))}</pre>")
    parts.append(f"<h3>Look at its curves</h3><pre>tensorboard --logdir {text(run.path)}</pre>")
    recorded = run.experiment.get("versions")
    note = "" if recorded else " <span class='soft'>(as installed where this page was made)</span>"
    rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in (recorded or versions()).items())
    parts.append(f"<h3>Versions{note}</h3><dl>{rows}</dl>")
    return section("again", "Run it again", *parts)


def _env_options(run: Run) -> list[str]:
    """Options of `vla-rl eval` for environments that are not the default ones."""
    from vla_rl.experiment import EnvConfig

    default, mine = asdict(EnvConfig()), run.experiment.get("config", {}).get("env", {})
    changed = {key: value for key, value in mine.items() if value != default.get(key)}
    return [word for key, value in changed.items() for word in (f"--env.{key.replace('_', '-')}", str(value))]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))
