from dataclasses import replace

import gymnasium as gym
from table_curves import COLOURS
from tables import EXPLORATION, METHODS, ROWS
from tiny import INSTRUCTIONS
from vla_rl_envs import kitchen_tasks

from vla_rl.cli import _parse
from vla_rl.data import EpisodeStore
from vla_rl.experiment import EnvConfig, ModelConfig, make_env, new_policy
from vla_rl.presets import METAWORLD_BASE, PRESETS
from vla_rl.rl.exploration import ExplorationConfig


def test_the_kitchen_presets_have_the_plug_ins_split():
    labels = lambda pairs: tuple(f"{task}:{variant}" for task, variant in pairs)  # noqa: E731
    for name in ("kitchen", "kitchen-reduced"):
        config = PRESETS[name][1]
        assert config.expert_tasks == kitchen_tasks.EXPERT_TASKS
        red, yellow = labels(kitchen_tasks.RL_TASKS), labels(kitchen_tasks.UNSEEN_TASKS)
        assert (red, yellow) == (("slide-door-open:red",), ("slide-door-open:yellow",))
        # The small VLM opens doors of any colour without having seen them, so nothing is left to learn there.
        split = (("knob-on",), red + yellow) if name == "kitchen-reduced" else (red, yellow)
        assert (config.rl_tasks, config.unseen_tasks) == split
        assert (config.env.env_id, config.env.horizon) == ("vla_rl_envs:VLA/FrankaKitchen-v0", 280)


def test_presets_for_tables_give_every_algorithm_the_same_env_steps_and_enough_episodes():
    for name in ("metaworld-reduced", "metaworld-tiny", "kitchen", "kitchen-reduced"):
        train = PRESETS[name][1].train
        assert train.sacfd.total_timesteps == train.stage1.total_timesteps
        assert 3 * min(train.eval_episodes, train.rl_eval_episodes) >= 100


def test_the_reduced_preset_starts_from_the_shipped_stage_0_on_its_tasks():
    reduced, base = PRESETS["metaworld-reduced"][1], PRESETS["metaworld-base"][1]
    assert reduced.policy == METAWORLD_BASE and reduced.train.stage0.steps == 0
    assert reduced.expert_tasks == base.expert_tasks and reduced.env == base.env
    assert all(label.endswith((":new", ":unseen")) for label in (*reduced.rl_tasks, *reduced.unseen_tasks))


def test_the_papers_split_of_metaworld_is_the_same_from_tiny():
    tiny, paper = PRESETS["metaworld-tiny"][1], PRESETS["metaworld"][1]
    for config in (tiny, paper):
        assert (len(config.expert_tasks), len(config.rl_tasks), len(config.unseen_tasks)) == (25, 5, 10)
        assert not set(config.expert_tasks) & {*config.rl_tasks, *config.unseen_tasks}
        assert not set(config.rl_tasks) & set(config.unseen_tasks)
    assert (tiny.expert_tasks, tiny.rl_tasks, tiny.unseen_tasks, tiny.expert_episodes) == (
        paper.expert_tasks,
        paper.rl_tasks,
        paper.unseen_tasks,
        paper.expert_episodes,
    )


def test_every_row_has_a_colour_that_no_other_row_of_its_table_has():
    assert set(COLOURS) == set(ROWS)
    for rows in (METHODS, ("sft", "ire-vla", *EXPLORATION)):
        assert len({COLOURS[row] for row in rows}) == len(rows)


def test_the_rows_of_exploration_differ_from_ire_vla_in_nothing_else():
    def experiment(row):
        return _parse(["train", "metaworld-skill", *ROWS[row]]).preset

    ours = experiment("ire-vla").train.exploration
    assert ours == ExplorationConfig(start_curriculum=True)
    without = replace(ours, start_curriculum=False)
    expected = {
        "no-curriculum": without,
        "rnd": replace(without, rnd_coef=0.01),
        "curriculum-rnd": replace(ours, rnd_coef=0.01),
        "curriculum-shaping": replace(ours, shaping_coef=0.5),
    }
    assert set(expected) == set(EXPLORATION)
    for row, exploration in expected.items():
        config = experiment(row)
        assert config.train.exploration == exploration
        assert replace(config, train=replace(config.train, exploration=ours)) == experiment("ire-vla")


def test_a_task_can_be_another_argument_of_the_env(monkeypatch):
    asked = []
    monkeypatch.setattr(gym, "make", lambda *args, **kwargs: asked.append((args, kwargs)))
    robohive = EnvConfig(env_id="vla_rl_envs:VLA/RoboHive-v0", image_size=64, horizon=50, task_argument="env_id")
    make_env("FK1_SdoorOpenRandom_v2d-v4", robohive)
    make_env("drawer-open:new", EnvConfig(image_size=32, horizon=9))
    assert asked == [
        (
            ("vla_rl_envs:VLA/RoboHive-v0",),
            {"env_id": "FK1_SdoorOpenRandom_v2d-v4", "image_size": 64, "horizon": 50},
        ),
        (
            ("vla_rl_envs:VLA/MetaWorld-v0",),
            {"task": "drawer-open", "variant": "new", "image_size": 32, "horizon": 9},
        ),
    ]


def test_larger_patches_make_fewer_image_tokens(expert_path):
    """A 32-pixel image is 4 x 4 patches of 8 pixels or 2 x 2 of 16."""
    with EpisodeStore(expert_path, mode="r") as store:
        obs = {key: value[:1] for key, value in store[0].observations.items()}
        policies = [new_policy(ModelConfig(patch_size=size), [store], instructions=INSTRUCTIONS) for size in (8, 16)]
    many, few = (policy.encode(obs, INSTRUCTIONS[:1]).tokens.shape[1] for policy in policies)
    assert many - few == 16 - 4
