"""The examples for other RL libraries as their user runs them: a process of its own, a policy in, a policy out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import INSTRUCTIONS, differing, parameters, tiny_policy

from vla_rl import VLAPolicy

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
TOY = "--env-id vla_rl_envs:VLA/Toy-v0 --task reach-red --variant original --ppo.num-workers 0 --ppo.num-envs 8"
OPTIONS = {
    "sb3_frozen_vlm.py": "--ppo.total-timesteps 512 --ppo.n-steps 32 --ppo.batch-size 128 --ppo.n-epochs 1",
    "torchrl_frozen_vlm.py": "--ppo.total-timesteps 512 --ppo.rollout-steps 32 --ppo.minibatch-size 128",
}
NEEDS = {"sb3_frozen_vlm.py": "stable_baselines3", "torchrl_frozen_vlm.py": "torchrl"}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_an_example_trains_the_head_and_saves_a_policy(name, tmp_path):
    pytest.importorskip(NEEDS[name])
    policy = tiny_policy(init_std=1.0)  # finds the square now and then
    policy.save_pretrained(tmp_path / "policy")
    options = f"--policy policy --out trained {TOY} {OPTIONS[name]} --ppo.critic-warmup 0".split()
    done = subprocess.run([sys.executable, EXAMPLES / name, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    trained = VLAPolicy.from_pretrained(tmp_path / "trained")
    assert "mean.weight" in differing(parameters(policy.head), parameters(trained.head))
    assert not differing(parameters(policy.encoder), parameters(trained.encoder))
    look = {"image": np.zeros((1, 32, 32, 3), np.uint8), "state": np.zeros((1, 2), np.float32)}
    assert np.isfinite(trained.act(look, INSTRUCTIONS[:1])).all()
