import json
from dataclasses import replace
from pathlib import Path

import pytest

from vla_rl.config import IterativeConfig
from vla_rl.cost import RATES, config_lines, cost, cost_lines
from vla_rl.experiment import EnvConfig, ExperimentConfig, ModelConfig
from vla_rl.presets import PRESETS
from vla_rl.rl.ppo import PPOConfig
from vla_rl.sl.supervised import SLConfig

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CONFIG = ExperimentConfig(
    expert_tasks=("a", "b"),
    rl_tasks=("c",),
    unseen_tasks=("d",),
    expert_episodes=10,
    env=EnvConfig(horizon=50),
    train=IterativeConfig(
        stage0=SLConfig(steps=100, batch_size=32, scope="all"),
        stage1=PPOConfig(total_timesteps=5_000, update_epochs=4),
        stage2=SLConfig(steps=30, batch_size=16, scope="lora"),
        rounds=2,
        eval_episodes=5,
        rl_eval_episodes=8,
        collect_episodes=40,
    ),
)


def test_counts_by_hand():
    found = cost(CONFIG)
    assert found.expert_episodes == 20
    assert (found.gradient_steps, found.samples) == (100 + 2 * 30, 3_200 + 2 * 480)
    assert found.env_steps == 10_000
    # Once after stage 0, and after both stages of both rounds: 8 episodes of c, 5 of each of a, b and d.
    assert found.evaluation_episodes == 5 * (8 + 15) and found.evaluation_steps == 115 * 50
    assert found.vlm_frames == 10_000 + 5_750 + 4_160
    minutes = (
        20 / RATES["expert_episodes"]
        + 3_200 / RATES["all_samples"]
        + 960 / RATES["lora_samples"]
        + 5_750 / RATES["eval_steps"]
        + 10_000 / RATES["stage1_steps"]
    ) / 60
    assert found.minutes == pytest.approx(minutes)


def test_methods_cost_what_they_do():
    sft = cost(replace(CONFIG, method="sft"))
    assert (sft.env_steps, sft.gradient_steps, sft.evaluation_episodes) == (0, 100, 23)
    filtered = cost(replace(CONFIG, method="filtered-bc"))
    assert filtered.env_steps == 2 * 40 * 50 and filtered.evaluation_episodes == 3 * 23
    whole = cost(replace(CONFIG, method="ppo"))
    assert whole.gradient_steps == 100
    assert whole.vlm_frames == 5 * 10_000 + whole.evaluation_steps + whole.samples, "once, and in each of 4 epochs"
    assert cost(replace(CONFIG, expert_data="store")).expert_episodes == 0


def test_minutes_only_where_the_rates_were_measured():
    assert cost(replace(CONFIG, model=ModelConfig(vlm="some/VLM"))).minutes is None
    assert cost(replace(CONFIG, env=replace(CONFIG.env, image_size=128))).minutes is None
    lines = cost_lines(replace(CONFIG, model=ModelConfig(vlm="some/VLM")))
    assert "vla-rl estimate --model some/VLM" in lines[-1]


def test_the_rates_are_the_measured_ones():
    measured = json.loads((RESULTS / "phase_rates.json").read_text())["rates_per_second"]
    assert measured.keys() == RATES.keys()
    for name, rate in measured.items():
        assert RATES[name] == pytest.approx(rate, rel=0.01)


def test_the_demo_is_reckoned_near_what_it_took():
    """Never less than it took; evaluations that end early make it less than reckoned."""
    took = json.loads((RESULTS / "phase_rates.json").read_text())["minutes"]["demo"]
    assert took < cost(PRESETS["metaworld-demo"][1]).minutes < 1.5 * took


def test_config_lines_name_every_setting_as_an_option():
    lines = dict(line.split(": ", 1) for line in config_lines(CONFIG))
    assert "total-timesteps=5000" in lines["train.stage1"].split("  ")
    assert "expert-tasks=a b" in lines["experiment"].split("  ") and "horizon=50" in lines["env"]
    assert {"experiment", "env", "model", "train", "train.stage0", "train.sacfd"} <= lines.keys()


def test_a_stage_2_of_no_steps_is_not_counted():
    """As the trainer leaves it out."""
    train = replace(CONFIG.train, stage2=replace(CONFIG.train.stage2, steps=0))
    found = cost(replace(CONFIG, train=train))
    assert (found.gradient_steps, found.evaluation_episodes) == (100, 3 * 23)
