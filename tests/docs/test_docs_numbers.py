"""Numbers of results in the documentation against the files that they were read from."""

import json

import pytest
from pages import DOCS, ROOT

RUNS = ROOT / "benchmarks" / "results" / "tables" / "metaworld-demo"


def test_forwards_per_step_are_those_of_the_file():
    page = (DOCS / "concepts" / "caching.md").read_text()
    for seed in range(3):
        run = json.loads((RUNS / f"ire-vla-s{seed}.json").read_text())
        assert f"{run['vlm_frames']:,} / {run['env_steps']:,}" in page
        assert run["vlm_frames"] / run["env_steps"] == pytest.approx(1.009, abs=1e-3)
