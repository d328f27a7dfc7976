"""docs/defaults.md against the configuration classes: every field, with the value it has in the code."""

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest

from vla_rl.importing import load_object
from vla_rl.presets import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "defaults.md"
TABLES = re.findall(r"<!-- defaults: (\S+) -->\n(.*?)<!-- end defaults -->", PAGE.read_text(), flags=re.DOTALL)
ELSEWHERE = "see above", "see below"
IDENTITY = {  # names, paths, seeds and what is asked for: nothing to justify
    "seed", "name", "expert_tasks", "rl_tasks", "unseen_tasks", "policy", "expert_data", "workdir", "launch",
    "task_argument", "expert",
}  # fmt: skip
SOURCES = re.compile(r"ours|paper|cited|measured: `\S+\.py`|CleanRL's value")


def cells(table):
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def default(field):
    return field.default if field.default is not MISSING else field.default_factory()


def changes(config, base, prefix=""):
    """Fields of a configuration that differ from another one, by dotted name."""
    for field in fields(config):
        value, usual = getattr(config, field.name), getattr(base, field.name)
        if is_dataclass(value):
            yield from changes(value, usual, f"{prefix}{field.name}.")
        elif value != usual:
            yield f"{prefix}{field.name}", value


def preset_table():
    """The Markdown of the table of presets."""
    lines = ["| preset | changes |", "|---|---|"]
    for name, (_, config) in PRESETS.items():
        told = [
            f"`{key}={value!r}`"
            for key, value in changes(config, type(config)())
            if key != "name" and not key.endswith("_tasks")
        ]
        told = [text if "metaworld-base'" not in text else "`policy=` the shipped stage 0" for text in told]
        lines.append(f"| `{name}` | {', '.join(told)} |")
    return "\n".join(lines)


def test_every_configuration_of_a_run_has_its_table():
    names = {path.rpartition(":")[2] for path, _ in TABLES}
    assert names >= {
        "IterativeConfig",
        "PPOConfig",
        "SACfDConfig",
        "ExplorationConfig",
        "SLConfig",
        "EnvConfig",
        "ModelConfig",
        "LoRASettings",
        "ExperimentConfig",
    }


@pytest.mark.parametrize(("path", "table"), TABLES, ids=[path for path, _ in TABLES])
def test_the_table_names_every_field_with_its_value(path, table):
    code = {field.name: default(field) for field in fields(load_object(path))}
    page = {name.strip("`"): value for name, value, *_ in cells(table)}
    assert list(page) == list(code)
    for name, value in code.items():
        assert page[name] == f"`{value!r}`".replace("'", '"') or (is_dataclass(value) and page[name] in ELSEWHERE), name


@pytest.mark.parametrize(("path", "table"), TABLES, ids=[path for path, _ in TABLES])
def test_every_hyperparameter_has_a_reason_and_a_source(path, table):
    for name, value, why, source in cells(table):
        if name.strip("`") not in IDENTITY and value not in ELSEWHERE:
            assert why, f"{path}: {name} has no reason"
            assert SOURCES.match(source), f"{path}: the source of {name} is {source!r}"


def test_what_needs_no_reason_exists():
    names = {name.strip("`") for _, table in TABLES for name, *_ in cells(table)}
    assert names >= IDENTITY


def test_the_presets_change_what_the_page_says():
    (table,) = re.findall(r"<!-- presets -->\n+(.*?)\n+<!-- end presets -->", PAGE.read_text(), flags=re.DOTALL)
    assert table == preset_table(), f"the table should be:\n{preset_table()}"


if __name__ == "__main__":  # writes the table of presets
    whole = re.sub(
        r"(<!-- presets -->\n\n).*?(\n*<!-- end presets -->)",
        lambda match: f"{match[1]}{preset_table()}\n\n<!-- end presets -->",
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(whole)
