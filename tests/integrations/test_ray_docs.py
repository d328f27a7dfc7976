"""The code blocks of docs/guides/cluster.md, on a cluster of two nodes on this machine and in a smaller size."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import differing, parameters, tiny_policy, toy_store

pytest.importorskip("ray")

import ray
from ray_cluster import two_nodes

from vla_rl.encoders import LoRASettings

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from pages import DOCS, blocks

PAGE = DOCS / "guides/cluster.md"
SMALLER = {
    '"vla_rl_envs:VLA/MetaWorld-v0", task="drawer-open", variant="new"': '"vla_rl_envs:VLA/Toy-v0", horizon=5',
    "[make] * count, num_workers=2": "[make] * count, num_workers=0",
    "num_envs=128": "num_envs=4",
    "num_workers=8": "num_workers=2",
    "Placement(num_cpus=3, num_gpus=0.25)": "Placement(num_cpus=1)",
    "PPOConfig()": "PPOConfig(total_timesteps=80, rollout_steps=10, minibatch_size=20, critic_warmup_updates=0)",
    "num_cpus=8, num_gpus=1": "num_cpus=1",
    "SLConfig(steps=2000)": "SLConfig(steps=3, batch_size=8)",
}


@pytest.mark.slow
def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage0 = tiny_policy(init_std=1.0)
    stage0.encoder.add_lora(LoRASettings(r=2, alpha=4))
    stage0.save_pretrained("stage0")
    toy_store(Path("demos"))
    toy_store(Path("runs/drawer/rl_data/task0-round0"))
    code = [block.code for block in blocks(PAGE) if block.language == "python"]
    for old, new in SMALLER.items():
        assert any(old in text for text in code), f"{old!r} is no longer on the page"
        code = [text.replace(old, new) for text in code]
    for there in ("/shared/stage0", "/data/stage0", "/data/demos"):
        code = [text.replace(there, str(tmp_path / Path(there).name)) for text in code]
    with two_nodes() as cluster:
        ray.shutdown()  # the page's own ray.init connects
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        namespace = {"__name__": "__main__"}
        before = parameters(stage0.head), parameters(stage0.encoder)
        exec(compile(code[0], str(PAGE), "exec"), namespace)
        policy, result = namespace["policy"], namespace["result"]
        assert 80 <= result.num_env_steps < 120 and result.num_episodes > 8
        assert differing(before[0], parameters(policy.head)) and not differing(before[1], parameters(policy.encoder))
        learned = parameters(policy.head)
        exec(compile(code[1], str(PAGE), "exec"), namespace)
        assert differing(learned, parameters(policy.head)) and Path("trained/policy.json").is_file()
        assert not Path("runs/stage1-snapshots").exists()
        exec(compile(code[2], str(PAGE), "exec"), namespace)
        changed = differing(before[1], parameters(policy.encoder))
        assert changed and all("lora" in name for name in changed)
        assert all(torch.isfinite(value).all() for value in parameters(policy.head).values())
        (trainer,) = [node["NodeID"] for node in ray.nodes() if "trainer" in node["Resources"]]
        assert namespace["report"].node == trainer and namespace["report"].bytes_sent > 10_000
