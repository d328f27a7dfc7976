import json
from dataclasses import replace

import pytest

from vla_rl.experiment import ExperimentConfig
from vla_rl.experiment_file import from_dict, read_experiment, write_experiment
from vla_rl.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_equal(tmp_path, name):
    config = replace(PRESETS[name][1], workdir=str(tmp_path))
    write_experiment(tmp_path, config, command="vla-rl train x", notes=["a"])
    assert read_experiment(tmp_path, ExperimentConfig) == (config, "vla-rl train x", ["a"])


def test_a_setting_of_another_version_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"\['old'\], which this version does not know"):
        from_dict(ExperimentConfig, {"name": "x", "train": {"old": 1}})
    assert from_dict(ExperimentConfig, {"name": "x"}) == ExperimentConfig(name="x"), "what is missing has its default"


def test_the_file_is_plain_json_and_replaced_whole(tmp_path):
    for command in ("one", "two"):
        write_experiment(tmp_path, ExperimentConfig(rl_tasks=("a",)), command=command, notes=[])
    content = json.loads((tmp_path / "experiment.json").read_text())
    assert content["command"] == "two" and content["config"]["rl_tasks"] == ["a"]
    assert content["versions"]["torch"] and [path.name for path in tmp_path.iterdir()] == ["experiment.json"]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"IterativeTrainer\.resume"):
        read_experiment(tmp_path, ExperimentConfig)
