"""Everything that learns, on a device that is not the CPU: nothing mixes devices, and the results are the CPU's."""

import json

import pytest
import torch
from mirror_device import run
from trainers import CONFIG, saved

from vla_rl.config import with_method


@pytest.mark.parametrize("part", ["refusals", "heads", "families", "rollout"])
def test_parts(part):
    run("on_mirror.py", part)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ire-vla", "ire-vla-sacfd", "ppo-replay"])
def test_a_trainer_learns_there_what_it_learns_here(method, make_trainer, expert_path, tmp_path):
    make_trainer("here", config=with_method(CONFIG, method)).run()
    here = saved(tmp_path / "here")
    memories = ["cpu", "policy"] if method == "ire-vla-sacfd" else ["cpu"]
    for memory in memories:
        run("on_mirror.py", "train", method, memory, expert_path, tmp_path / memory)
        there = saved(tmp_path / memory)
        assert here.keys() == there.keys() and len(here) == 3
        for phase, weights in here.items():
            torch.testing.assert_close(there[phase], weights, rtol=1e-4, atol=1e-6, msg=f"{phase} {memory}")
    if len(memories) > 1:  # a replay memory on the device spares features the way out, and batches the way back
        cpu, policy = (json.loads((tmp_path / memory / "moved.json").read_text()) for memory in memories)
        frame = 6 * 32 * 2  # tokens, float16
        updates = CONFIG.sacfd.utd_ratio * (CONFIG.sacfd.total_timesteps - CONFIG.sacfd.learning_starts)
        assert cpu["to device"] - policy["to device"] > updates * CONFIG.sacfd.batch_size * 2 * frame
        assert cpu["to host"] - policy["to host"] > CONFIG.sacfd.total_timesteps * frame
