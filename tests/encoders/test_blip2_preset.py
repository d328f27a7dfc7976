"""The preset of the paper's VLM, on tiny random weights of that family in place of the hub id."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, SIZE
from tiny import INSTRUCTIONS, differing, parameters

from vla_rl.cli import main
from vla_rl.data import BalancedSampler, EpisodeStore
from vla_rl.encoders import LoRASettings
from vla_rl.experiment import new_policy
from vla_rl.presets import PRESETS
from vla_rl.sl.supervised import train_supervised

PRESET = PRESETS["metaworld-blip2"][1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(FAMILIES["blip2_opt"].save(tmp_path_factory.mktemp("blip2")))


def test_its_vlm_is_the_papers_and_a_dry_run_takes_it(weights, tmp_path, capsys):
    assert PRESET.model.vlm == "Salesforce/blip2-opt-2.7b"
    args = ["train", "metaworld-blip2", "--model.vlm", weights, "--workdir", str(tmp_path / "run"), "--dry-run"]
    args += ["--env.env-id", "vla_rl_envs:VLA/Toy-v0", "--expert-tasks", "reach-red", "--rl-tasks", "reach-red:new"]
    assert main([*args, "--unseen-tasks", "reach-blue"]) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert weights in printed and "offload=True" in printed and "".join(PRESET.model.prompt.split()) in printed
    assert not (tmp_path / "run").exists()


def test_stage_0_learns_adapter_and_head_from_hidden_states_below_the_adapter(weights, expert_path, tmp_path):
    model = replace(PRESET.model, vlm=weights, lora_top_layers=1)  # of the two that the tiny one has
    with EpisodeStore(expert_path, mode="r") as store:
        torch.manual_seed(0)
        policy = new_policy(model, [store], instructions=INSTRUCTIONS)
        encoder = policy.encoder
        assert (encoder.prompt, encoder.compute_dtype) == (PRESET.model.prompt, torch.bfloat16)
        settings = LoRASettings(r=model.lora_rank, alpha=2 * model.lora_rank, top_layers=model.lora_top_layers)
        encoder.add_lora(settings)
        assert encoder.frozen_layers == 1
        before, head = parameters(encoder), parameters(policy.head)
        stage0 = replace(PRESET.train.stage0, steps=2, batch_size=8, cache_dir=str(tmp_path / "cache"))
        assert (stage0.gradient_accumulation, stage0.offload, stage0.scope) == (2, True, "lora")
        losses = []
        sampler = BalancedSampler([store], batch_size=8, seed=0)
        train_supervised(policy, sampler, config=stage0, on_step=lambda step, loss: losses.append(loss))
        assert len(losses) == 2 and np.isfinite(losses).all() and (tmp_path / "cache").is_dir()
    learned = differing(before, parameters(encoder))
    assert learned and all("lora_" in name and "layers.1." in name for name in learned)
    assert {"mean.weight"} <= differing(head, parameters(policy.head))
    images = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    action = policy.act({"image": images, "state": np.zeros((1, 2), np.float32)}, INSTRUCTIONS[:1])
    policy.save_pretrained(tmp_path / "policy")
    again = type(policy).from_pretrained(tmp_path / "policy")
    np.testing.assert_array_equal(
        again.act({"image": images, "state": np.zeros((1, 2), np.float32)}, INSTRUCTIONS[:1]), action
    )
