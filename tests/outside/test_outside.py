"""A user's head, encoder and env, each a file that the library knows nothing of, through the whole loop."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tiny import differing, parameters
from trainers import CONFIG

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "heads")]

from outside_encoder import PatchEncoder
from outside_env import LightEnv
from outside_head import LinearHead

from vla_rl import EpisodeStore, IterativeTrainer, VLAPolicy
from vla_rl.collect import run_expert
from vla_rl.data import compute_statistics
from vla_rl.encoders import FrozenVLMEncoder, LoRASettings


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
