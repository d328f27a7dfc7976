"""A user's head, encoder and env, each a file that the library knows nothing of, through the whole loop."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from safetensors.torch import load_file
from tiny import differing, parameters
from torch import nn
from trainers import CONFIG

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "heads")]

from outside_encoder import PatchEncoder
from outside_env import LightEnv
from outside_head import LinearHead

from vla_rl import EpisodeStore, IterativeTrainer, VLAPolicy
from vla_rl.collect import run_expert
from vla_rl.data import BalancedSampler, compute_statistics
from vla_rl.encoders import FrozenVLMEncoder, LoRASettings
from vla_rl.heads import GaussianHead
from vla_rl.heads.pooling import critic_shape
from vla_rl.sl.supervised import SLConfig, train_supervised


def light(label):
    return LightEnv(int(label.startswith("right")), horizon=8 if label.endswith("near") else 12)


@pytest.fixture
def store(tmp_path):
    with EpisodeStore(tmp_path / "demos") as store:
        for task in ("left", "right"):
            for seed in range(4):
                store.append(run_expert(light(task), LightEnv.expert, task=task, seed=seed, noise=0.1))
    with EpisodeStore(tmp_path / "demos", mode="r") as store:
        assert all(episode.success for episode in store)
        yield store


@pytest.fixture
def policy(store):
    torch.manual_seed(0)
    encoder = PatchEncoder(words=32)
    head = LinearHead(encoder.feature_dim, 1, state_dim=1, std=0.4)
    return VLAPolicy(encoder, head, statistics=compute_statistics([store]))


def looks(count=2):
    observation, _ = light("left").reset(seed=5)
    return {key: np.stack([value] * count) for key, value in observation.items()}


def test_the_whole_loop_and_back_from_disk(policy, store, tmp_path):
    check_env(light("left"), skip_render_check=True)
    fresh = parameters(policy.head)
    frozen = parameters(policy.encoder)
    frames = policy.encoder.num_frames
    config = replace(
        CONFIG,
        stage0=replace(CONFIG.stage0, scope="head", steps=60, learning_rate=0.03),
        stage1=replace(CONFIG.stage1, learning_rate=1e-3),
        stage2=replace(CONFIG.stage2, scope="head", steps=20),
        eval_episodes=10,
        video_episodes=0,
    )
    trainer = IterativeTrainer(
        policy,
        expert=store,
        rl_tasks=["right-near"],
        make_envs=light,
        eval_tasks={"expert": ["left", "right"], "rl": ["right-near"]},
        config=config,
        workdir=tmp_path / "run",
    )
    results = trainer.run()
    trainer.close()
    assert policy.encoder.num_frames > frames and not differing(frozen, parameters(policy.encoder))
    assert {"linear.weight", "linear.bias"} == differing(fresh, parameters(policy.head))
    last = [entry for entry in results.values() if isinstance(entry, dict) and "expert" in entry][-1]
    assert last["expert"]["mean"] >= 0.9 and last["rl"]["mean"] >= 0.9

    texts = list(LightEnv.instructions)
    action = policy.act(looks(), texts)
    assert action[0] < -0.2 and action[1] > 0.2  # the same picture, another sentence
    policy.save_pretrained(tmp_path / "saved")
    again = VLAPolicy.from_pretrained(tmp_path / "saved", device="cpu")
    assert type(again.encoder) is PatchEncoder and again.encoder.fingerprint == policy.encoder.fingerprint
    np.testing.assert_array_equal(again.act(looks(), texts), action)
    written = json.loads((tmp_path / "saved" / "encoder" / "encoder.json").read_text())
    assert written["class"] == "outside_encoder:PatchEncoder" and written["kwargs"]["words"] == 32


def test_the_critic_takes_no_sizes_from_a_head_that_may_mean_others_by_them(policy):
    assert critic_shape(policy.head) == {}
    policy.head.sizes |= {"width": 50, "hidden_dim": (64, 64)}
    assert critic_shape(policy.head) == {}
    ours = {"width": 16, "num_queries": 2, "hidden_dim": 32}
    assert critic_shape(GaussianHead(8, 2, exploration="gaussian", **ours)) == ours


def test_a_fingerprint_follows_the_weights(policy):
    encoder = policy.encoder
    first = encoder.fingerprint
    assert encoder.fingerprint == first and encoder.encode(looks()["image"], ["go", "go"]).fingerprint == first
    with torch.no_grad():
        encoder.patches.bias.add_(1)
    assert encoder.fingerprint != first
    torch.manual_seed(0)
    assert PatchEncoder(words=32).fingerprint == first
    with pytest.raises(ValueError, match="use scope='head', or override trainable"):
        encoder.add_lora(LoRASettings())
    with torch.no_grad():
        encoder.patches.bias.fill_(1e6)
    with pytest.raises(FloatingPointError, match=r"PatchEncoder are not finite in torch\.float16"):
        encoder.encode(looks()["image"], ["go", "go"])


def test_it_is_in_eval_mode_whenever_it_encodes():
    class Restless(PatchEncoder):
        """Dropout and batch statistics, which in train mode change with every frame."""

        def __init__(self):
            super().__init__()
            self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

        def tokens(self, images, instructions):
            images = self.norm(images.permute(0, 3, 1, 2).float()).permute(0, 2, 3, 1)
            tokens, mask = super().tokens(images, instructions)
            return self.dropout(tokens), mask

    encoder = Restless().train()
    assert encoder.dropout.training
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    first, fingerprint = encoder.encode(frames, ["go"] * 4), encoder.fingerprint
    assert torch.equal(encoder.encode(frames, ["go"] * 4).tokens, first.tokens) and encoder.fingerprint == fingerprint
    assert first.fingerprint == fingerprint


def test_its_types_are_saved_with_it(tmp_path):
    encoder = PatchEncoder()
    encoder.feature_dtype, encoder.compute_dtype = torch.float32, torch.bfloat16
    encoder.save_pretrained(tmp_path / "e")
    again = PatchEncoder.from_pretrained(tmp_path / "e")
    assert (again.feature_dtype, again.compute_dtype) == (torch.float32, torch.bfloat16)
    assert PatchEncoder.from_pretrained(tmp_path / "e", dtype=torch.float32).compute_dtype == torch.float32
    written = json.loads((tmp_path / "e" / "encoder.json").read_text())
    (tmp_path / "e" / "encoder.json").write_text(json.dumps(written | {"feature_dtype": "int8"}))
    with pytest.raises(ValueError, match="gives feature_dtype='int8', expected one of float32, bfloat16, float16"):
        PatchEncoder.from_pretrained(tmp_path / "e")


def test_tied_weights_are_saved(policy, tmp_path):
    policy.encoder.twin = policy.encoder.words.weight
    policy.encoder.save_pretrained(tmp_path / "e")
    saved = load_file(tmp_path / "e" / "encoder.safetensors")
    assert torch.equal(saved["twin"], saved["words.weight"])
    policy.head.twin = policy.head.linear.weight
    policy.save_pretrained(tmp_path / "p")
    saved = load_file(tmp_path / "p" / "head.safetensors")
    assert torch.equal(saved["head.twin"], saved["head.linear.weight"])


def test_one_that_opens_its_weights_learns_with_the_head(store):
    class Open(PatchEncoder):
        @contextmanager
        def trainable(self, scope="lora", *, checkpointing=False):
            weights = list(self.words.parameters())
            self.words.requires_grad_(True)
            yield weights
            self.words.requires_grad_(False)

    torch.manual_seed(0)
    encoder = Open()
    before = parameters(encoder)
    policy = VLAPolicy(
        encoder, LinearHead(encoder.feature_dim, 1, state_dim=1, std=0.4), statistics=compute_statistics([store])
    )
    sampler = BalancedSampler([store], batch_size=8, seed=0)
    train_supervised(policy, sampler, config=SLConfig(steps=3, batch_size=8, scope="all", random_shift=0))
    assert differing(before, parameters(encoder)) == {"words.weight"}


def test_an_optimizer_that_counts_no_versions_makes_another_fingerprint(store):
    encoder = PatchEncoder()
    first = encoder.fingerprint
    encoder.words.requires_grad_(True)
    encoder.forward(looks()["image"], ["go", "go"]).tokens.sum().backward()
    torch.optim.AdamW(encoder.words.parameters(), fused=True).step()
    encoder.words.requires_grad_(False)
    assert encoder.fingerprint != first


def test_nothing_in_a_saved_directory_is_run_and_nothing_unfit_is_built(policy, tmp_path, monkeypatch):
    policy.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / "encoder"
    path, sentinel = folder / "encoder.json", tmp_path / "sentinel"
    (folder / "evil_encoder.py").write_text(f"open({str(sentinel)!r}, 'w')")
    good = json.loads(path.read_text())
    for change, what in (
        ({"class": "evil_encoder:Encoder"}, "cannot load 'evil_encoder:Encoder'"),
        ({"class": f"{folder}/evil_encoder.py:Encoder"}, "expected an importable"),
        ({"class": "outside_head:LinearHead"}, "which is no Encoder"),
        ({"class": "torch.nn:Linear"}, "which is no Encoder"),
        ({"kwargs": {"words": 32, "path": "x"}}, "does not fit PatchEncoder"),
        ({"kwargs": {"words": 10**15}}, "with shape \\[32, 16\\]"),
        ({"kwargs": {"words": -1}}, "cannot be built"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=what):
            VLAPolicy.from_pretrained(tmp_path / "saved")
    assert not sentinel.exists()
    path.write_text(json.dumps(good | {"fingerprint": "0" * 16}))
    with pytest.warns(UserWarning, match="was saved as 0000000000000000"):
        VLAPolicy.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="does not fit EncoderSettings"):
        FrozenVLMEncoder.from_pretrained(folder)
