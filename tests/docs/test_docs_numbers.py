"""Tables of results in the documentation against the files that they were read from."""

import json
import re

import pytest
from pages import DOCS, ROOT

DEMO = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())


def two(value):
    """A rate as the pages write it: `.81`, `1.00`."""
    return f"{value:.2f}".removeprefix("0")


def cell(method, stage, group):
    (row,) = [
        row for row in DEMO[method]["success"] if row["stage"].endswith(f"after-{stage}") and row["group"] == group
    ]
    low, high = row["interval"]
    return f"{two(row['success'])} [{two(low)}, {two(high)}], n = {row['n']}"


def rows(page, name):
    text = (DOCS / page).read_text()
    (table,) = re.findall(rf"<!-- results: {name} -->\n+(.*?)<!-- end results -->", text, flags=re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


@pytest.mark.parametrize(("page", "name", "groups"), [
    ("index.md", "demo", ("expert", "rl", "unseen")),
    ("concepts/stages.md", "stages", ("expert", "rl")),
])  # fmt: skip
def test_the_demos_figures_are_those_of_the_file(page, name, groups):
    runs = {
        "stage 0": ("ire-vla", "stage0"),
        "stage 1": ("ire-vla", "stage1"),
        "stage 2": ("ire-vla", "stage2"),
        "control: stage 2 on the demonstrations alone": ("more-sft", "stage2"),
        "control: filtered BC, no RL": ("filtered-bc", "stage2"),
    }
    found = rows(page, name)
    assert len(found) >= 3
    for label, *cells in found:
        assert cells == [cell(*runs[label], group) for group in groups]


def test_forwards_per_step_are_those_of_the_file():
    page = (DOCS / "concepts" / "caching.md").read_text()
    runs = [entry["task0-round0-stage1"] for entry in DEMO["ire-vla"]["stage1"].values()]
    for run in runs:
        assert f"{run['num_vlm_frames']:,} / {run['num_env_steps']:,}" in page
        assert run["num_vlm_frames"] / run["num_env_steps"] == pytest.approx(1.008, abs=5e-4)
