"""Numbers of results in the documentation against the files that they were read from."""

import json
import re

import pytest
from pages import DOCS, ROOT

RUNS = ROOT / "benchmarks" / "results" / "tables" / "metaworld-demo"


def test_forwards_per_step_are_those_of_the_file():
    page = (DOCS / "concepts" / "caching.md").read_text()
    for seed in range(3):
        run = json.loads((RUNS / f"ire-vla-s{seed}.json").read_text())
        assert f"{run['vlm_frames']:,} / {run['env_steps']:,}" in page
        assert run["vlm_frames"] / run["env_steps"] == pytest.approx(1.009, abs=1e-3)


def test_the_readme_says_what_stage_1_did_as_the_table_has_it():
    (table,) = re.findall(r"^\| stage 1 \|(.*)\|$", (DOCS / "concepts" / "stages.md").read_text(), re.MULTILINE)
    expert, practised = (re.match(r" (\S+ \[.*?\])", cell)[1] for cell in table.split("|")[:2])
    readme = (ROOT / "README.md").read_text()
    assert f"`ire-vla` is at {practised} on the RL task and {expert} on the expert tasks" in readme


def test_minutes_of_the_demo_are_those_measured():
    minutes = json.loads((ROOT / "benchmarks" / "results" / "phase_rates.json").read_text())["minutes"]
    for page in (ROOT / "README.md", DOCS / "index.md", DOCS / "quickstart.md"):
        assert f"7.5 to {minutes['demo']:.1f} minutes" in page.read_text()
    for page in (ROOT / "README.md", DOCS / "reference" / "cli.md"):
        assert f"about {minutes['metaworld-base']:.0f} minutes" in page.read_text()
