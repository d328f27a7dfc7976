"""What `test_mirror_device.py` runs in processes of their own: `python on_mirror.py NAME OPTIONS...`."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import mirror_device
import numpy as np
import torch
import transformers
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from mirror_device import moved
from tiny import random_features, tiny_policy, toy_env
from trainers import CONFIG, trainers_in

sys.path += [str(Path(__file__).parent / folder) for folder in ("heads", "encoders")]

from families import FAMILIES, INSTRUCTIONS, SIZE
from test_head_kinds import HEADS, make

from vla_rl.config import Method, with_method
from vla_rl.encoders import FrozenVLMEncoder, LoRASettings
from vla_rl.heads import ValueHead
from vla_rl.rl.ppo import ppo_update
from vla_rl.rl.rollout import RolloutCollector


def refusals() -> None:
    """What a GPU refuses is refused, and what it takes is taken."""
    ours, host = torch.arange(6.0, device="mirror").view(2, 3), torch.ones(2, 3)
    for wrong in (
        lambda: ours + host,
        lambda: host @ ours.T,
        lambda: torch.cat([ours, host]),
        lambda: torch.where(host > 0, ours, 0.0),
        lambda: torch.nn.Linear(3, 1)(ours),
        lambda: torch.nn.Linear(3, 1).to("mirror")(host),
        lambda: host[torch.zeros(2, dtype=torch.int64, device="mirror")],
        lambda: ours.index_put((torch.tensor([0]),), host[:1]),
        lambda: torch.nn.functional.interpolate(ours[None, None], (4, 6), mode="lanczos", antialias=True),
        ours.numpy,
    ):
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("two devices were mixed")
    moved.clear()
    assert (ours + torch.tensor(1.0))[torch.tensor([1])].tolist() == [[4, 5, 6]] and ours.sum().item() == 15
    assert moved == {"to host": 12 + 4}, moved
    host.copy_(ours)
    ours.add_(host.to("mirror"))
    assert moved == {"to host": 12 + 4 + 24, "to device": 24} and ours.cpu().tolist()[1] == [6, 8, 10]


def heads() -> None:
    """Every head gives on the device what it gives on the host: losses, gradients, samples, log-probs."""
    for kind in HEADS:
        results = []
        for device in ("cpu", "mirror"):
            torch.manual_seed(0)
            head, features, state = make(kind).to(device), random_features(8).to(device), torch.randn(8, 2).to(device)
            loss = head.supervised_loss(features, state, torch.rand(8, 4).to(device))
            loss.backward()
            head.start_exploration(features, state)
            distribution = head.distribution(features, state)
            actions = distribution.sample()
            given = {name: weight.grad for name, weight in head.named_parameters() if weight.grad is not None}
            given |= {"loss": loss, "actions": actions, "log_prob": distribution.log_prob(actions)}
            given |= {"executed": head.executed(actions), "predicted": head.predict(features, state)}
            assert all(value.device.type == device for value in given.values())
            results.append({name: value.detach().cpu() for name, value in given.items()})
        for name, expected in results[0].items():
            torch.testing.assert_close(results[1][name], expected, rtol=1e-5, atol=1e-6, msg=f"{kind}: {name}")


def families() -> None:
    """Every family's features, caches and adapter's gradients are those of the host, from uint8 pictures alone."""
    transformers.models.smolvlm.processing_smolvlm.num2words = str  # transformers demands this package for videos
    frames = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    larger = np.random.default_rng(0).integers(0, 256, (3, 2 * SIZE, 2 * SIZE, 3), dtype=np.uint8)
    for name, family in FAMILIES.items():
        results = []
        with tempfile.TemporaryDirectory() as folder:
            family.save(Path(folder))
            for device in ("cpu", "mirror"):
                encoder = FrozenVLMEncoder.from_pretrained(folder, device=device)
                encoder.feature_dtype = torch.float32
                given = {"features": encoder.encode(frames, INSTRUCTIONS).tokens}
                given["resized"] = encoder._pixels(torch.from_numpy(larger).to(device))
                moved.clear()
                encoder.encode(frames, INSTRUCTIONS)
                if device == "mirror" and family.batched_pixels:
                    beside = moved["to device"] - frames.nbytes  # sizes and flags, to and fro, in transformers' code
                    assert 0 <= beside < 100 and moved["to host"] < 1500 < given["features"].nbytes, (name, moved)
                if family.vision_cache:
                    vision = encoder.encode_vision(frames).cpu()
                    given["from vision"] = encoder.forward(None, INSTRUCTIONS, vision=vision).tokens
                cached = family.vision_cache and family.lower_cache
                torch.manual_seed(0)
                encoder.add_lora(LoRASettings(r=2, alpha=4, top_layers=1 if cached else None))
                for weight_name, weight in encoder.named_parameters():
                    if "lora_B" in weight_name:
                        weight.data.copy_(torch.linspace(-0.1, 0.1, weight.numel()).view(weight.shape))
                inputs = {"images": frames}
                if cached:
                    inputs = {"images": None, "lower": encoder.encode_lower(frames, INSTRUCTIONS).cpu()}
                with encoder.trainable("lora") as adapter:
                    encoder.forward(instructions=INSTRUCTIONS, **inputs).tokens.sin().mean().backward()
                    given |= {f"gradient {i}": weight.grad for i, weight in enumerate(adapter)}
                results.append(given)
        assert all(value.device.type == "mirror" for value in results[1].values())
        for part, expected in results[0].items():
            level = 0.035 if part == "resized" else 1e-4  # two grey levels of 255, at deviations of .26
            torch.testing.assert_close(results[1][part].cpu(), expected, rtol=1e-4, atol=level, msg=f"{name}: {part}")


def rollout() -> None:
    """What crosses in stage 1: pictures, states and rewards there; actions and single numbers back; no features."""
    num_envs, steps = 4, 5
    env = SyncVectorEnv([toy_env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    policy = tiny_policy(init_std=1.0).to("mirror")
    collector = RolloutCollector(policy, env, task="reach-red")
    critic = ValueHead(policy.encoder.feature_dim, state_dim=2).to("mirror")
    collector.collect(2, critic, gamma=0.99, gae_lambda=0.95)  # fingerprint of the weights and tokens of the prompt
    moved.clear()
    data = collector.collect(steps, critic, gamma=0.99, gae_lambda=0.95)
    observed = num_envs * steps * (32 * 32 * 3 + 2 * 4)
    told = moved["to device"] - observed  # rewards, and how episodes ended
    checks = moved["to host"] - num_envs * steps * 2 * 4  # besides actions: is every token finite, is a mask needed
    assert 0 < told < 16 * num_envs * steps and checks == 2 * steps, (moved, observed)
    features = data.tokens.nbytes
    moved.clear()
    optimizer = torch.optim.Adam([*policy.head.parameters(), *critic.parameters()])
    ppo_update(policy, critic, optimizer, data, config=replace(CONFIG.stage1, minibatch_size=10, update_epochs=2))
    assert sum(moved.values()) < 1000 < features, moved


def train(method: Method, buffer_device: Literal["cpu", "policy"], expert: str, workdir: str) -> None:
    """The tests' usual run of the trainer."""
    makers = trainers_in(Path(workdir).parent, expert)
    config = with_method(CONFIG, method)
    config = replace(config, sacfd=replace(config.sacfd, buffer_device=buffer_device))
    trainer = next(makers)(Path(workdir).name, config=config, policy=tiny_policy(init_std=1.0).to("mirror"))
    trainer.run()
    assert trainer.policy.device.type == "mirror"
    Path(workdir, "moved.json").write_text(json.dumps(moved))


if __name__ == "__main__":
    torch.set_num_threads(1)
    mirror_device.register()
    parts = (refusals, heads, families, rollout, train)
    {part.__name__: part for part in parts}[sys.argv[1]](*sys.argv[2:])
