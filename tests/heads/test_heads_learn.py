"""One head of the benchmark by both routes, so that the table of docs/guides/heads.md cannot rot unseen."""

import importlib.util
import sys
from pathlib import Path

import pytest

from vla_rl.data import EpisodeStore


@pytest.mark.slow
def test_chunks_learn_by_demonstration_and_by_ppo(tmp_path):
    path = Path(__file__).parents[2] / "benchmarks" / "heads.py"
    spec = importlib.util.spec_from_file_location("heads_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    with EpisodeStore(tmp_path / "demos", mode="w-") as store:
        benchmark.add_demonstrations(store, seed=0)
        result = benchmark.run(benchmark.ENTRIES["ChunkedHead"], 0, store)
    assert result["sft_original"] >= 90 and result["sft_original_ensembled"] >= 90
    assert result["sft_new"] <= 60
    assert result["ppo_new"] >= 90
