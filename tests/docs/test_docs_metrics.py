"""docs/metrics.md against what runs log: no tag without an explanation, and none explained that is never logged."""

import re

import pytest
import tiny
import torch
from gymnasium.vector import SyncVectorEnv
from pages import DOCS

from vla_rl.data import BalancedSampler, EpisodeStore, compute_statistics
from vla_rl.rl.exploration import ExplorationConfig
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.stage1 import run_ppo
from vla_rl.rl.stage1_sac import run_sac

TEXT = (DOCS / "metrics.md").read_text()
LIBRARY = TEXT[: TEXT.index("## The scripts")]
TAG = r"(?:charts|losses|time|eval)/\w+"


def written_in(*names):
    """Tags in the source of modules."""
    return {tag for name in names for tag in re.findall(TAG, (DOCS.parent / "vla_rl" / name).read_text())}


def explained(text):
    """Tags of the first column of the tables."""
    columns = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {tag for column in columns for tag in re.findall(TAG, column)}


@pytest.mark.slow
def test_every_tag_of_a_run_is_explained_and_every_explained_tag_is_logged(expert_path):
    store = EpisodeStore(expert_path, mode="r")
    exploration = ExplorationConfig(rnd_coef=0.01, shaping_coef=0.01)
    logged = {"losses/bc_loss"} | {f"eval/{group}" for group in ("expert", "rl", "unseen")}

    def log(metrics, step):
        logged.update(metrics)

    torch.manual_seed(0)
    shared = {"task": "reach-red", "exploration": exploration, "log": log}
    ppo = PPOConfig(total_timesteps=512, num_envs=8, rollout_steps=32, minibatch_size=128, critic_warmup_updates=0,
                    update_epochs=1, bc_coef=0.1)  # fmt: skip
    envs = SyncVectorEnv([lambda: tiny.toy_env(horizon=10)] * 8)
    policy = tiny.tiny_policy(statistics=compute_statistics([store]), init_std=1.0)
    result = run_ppo(policy, envs, config=ppo, expert=BalancedSampler([store], batch_size=16, seed=0), **shared)
    assert result.successes, "without one, the classifier logs nothing"
    sac = SACfDConfig(total_timesteps=256, num_envs=8, rollout_steps=8, num_demos=1, learning_starts=64,
                      critic_warmup_updates=0, batch_size=16)  # fmt: skip
    run_sac(policy, envs, config=sac, demos=[store[0]], **shared)
    logged |= written_in("integrations/ray_rollouts.py")  # tests/integrations/test_ray.py sees them logged

    assert logged - explained(LIBRARY) == set()
    assert explained(LIBRARY) - logged == set()


def test_the_trainer_logs_nothing_else():
    written = written_in("trainer.py", "rl/stage1.py", "rl/stage1_sac.py")
    assert len(written) > 8
    assert {tag for tag in written if tag not in explained(LIBRARY)} == set()


def test_the_scripts_tags_are_on_the_page():
    scripts = sorted((DOCS.parent / "examples").glob("*.py"))
    written = {tag for path in scripts for tag in re.findall(TAG, path.read_text())}
    assert {tag for tag in written if tag not in TEXT} == set()
