"""A repository with code of its own, as OpenVLA's: nothing of it runs unless it is asked for, pinned to a commit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import INSTRUCTIONS, tiny_encoder, toy_env, toy_store

from vla_rl.config import IterativeConfig
from vla_rl.data import EpisodeStore
from vla_rl.encoders import FrozenVLMEncoder
from vla_rl.heads import GaussianHead
from vla_rl.integrations.openvla import PROMPT, openvla_encoder
from vla_rl.policy import VLAPolicy
from vla_rl.sl.job import SupervisedJob, run_job
from vla_rl.sl.supervised import SLConfig
from vla_rl.trainer import IterativeTrainer

COMMIT = "0123456789abcdef" * 2 + "01234567"
CODE = """
from pathlib import Path
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

Path({sentinel!r}).write_text("ran")


class RemoteConfig(PaliGemmaConfig):
    model_type = "remote_vla"


class RemoteForActionPrediction(PaliGemmaForConditionalGeneration):
    config_class = RemoteConfig

    def generate(self, *args, **kwargs):
        raise AssertionError("generate is never called")
"""
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where transformers copies remote code to: not the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture
def repository(tmp_path, modules):
    """(directory, sentinel, the features that its weights give)."""
    plain, folder, sentinel = tiny_encoder(), tmp_path / "repository", tmp_path / "sentinel"
    plain.model.save_pretrained(folder)
    plain.processor.save_pretrained(folder)
    (folder / "modeling_remote.py").write_text(CODE.format(sentinel=str(sentinel)))
    name_code(folder, "AutoModelForImageTextToText")
    expected = FrozenVLMEncoder(plain.model, plain.processor, prompt=PROMPT).encode(IMAGES, INSTRUCTIONS)
    return folder, sentinel, expected


def name_code(folder, auto_class):
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "modeling_remote.RemoteConfig", auto_class: "modeling_remote.RemoteForActionPrediction"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "remote_vla", "auto_map": code}))


def demand_one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and "trust_remote_code=True" in text and len(text) < 700


def test_without_the_flag_no_code_runs(repository):
    folder, sentinel, _ = repository
    for load in (
        lambda: openvla_encoder(str(folder), revision=COMMIT),
        lambda: FrozenVLMEncoder.from_pretrained(folder),
        lambda: FrozenVLMEncoder.from_pretrained(folder, revision=COMMIT),
    ):
        with pytest.raises(ValueError, match="trust_remote_code=True") as error:
            load()
        demand_one_sentence(error)
    with pytest.raises(ValueError, match="give the commit that you have read"):
        openvla_encoder(str(folder), revision="main", trust_remote_code=True)
    assert not sentinel.exists()


def test_with_flag_and_commit_its_hidden_states_are_the_features(repository, tmp_path):
    folder, sentinel, expected = repository
    encoder = openvla_encoder(str(folder), revision=COMMIT, trust_remote_code=True)
    assert sentinel.exists() and type(encoder.model).__name__ == "RemoteForActionPrediction"
    features = encoder.encode(IMAGES, INSTRUCTIONS)
    np.testing.assert_allclose(features.tokens, expected.tokens, atol=1e-3)

    encoder.source, encoder.revision = str(folder), COMMIT
    policy = VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 2, width=16, num_queries=2, hidden_dim=16))
    policy.save_pretrained(tmp_path / "policy")
    written = json.loads((tmp_path / "policy" / "encoder" / "encoder.json").read_text())
    assert written["trust_remote_code"] is True and written["revision"] == COMMIT
    sentinel.unlink()
    with pytest.raises(ValueError, match="runs code of") as error:
        VLAPolicy.from_pretrained(tmp_path / "policy")
    demand_one_sentence(error)
    assert not sentinel.exists()
    again = VLAPolicy.from_pretrained(tmp_path / "policy", trust_remote_code=True)
    np.testing.assert_array_equal(again.encoder.encode(IMAGES, INSTRUCTIONS).tokens, features.tokens)


def test_who_trusts_it_once_trains_resumes_and_starts_processes_with_it(repository, tmp_path):
    folder, sentinel, _ = repository
    store = toy_store(tmp_path / "store", ("reach-red",), episodes=3)
    encoder = openvla_encoder(str(folder), revision=COMMIT, trust_remote_code=True)
    encoder.source, encoder.revision = str(folder), COMMIT
    head = GaussianHead(encoder.feature_dim, 2, width=16, num_queries=2, hidden_dim=16)
    policy = VLAPolicy(encoder, head)
    config = IterativeConfig(
        stage0=SLConfig(steps=2, batch_size=4, scope="head"),
        stage1_mode="none",
        stage2_data="none",
        eval_episodes=1,
        rl_eval_episodes=1,
        eval_envs=1,
        num_workers=0,
        video_episodes=0,
    )
    common = {"rl_tasks": [], "make_envs": toy_env, "eval_tasks": {"expert": ["reach-red"]}, "config": config}
    with EpisodeStore(store, mode="r") as expert:
        IterativeTrainer(policy, expert=expert, workdir=tmp_path / "run", **common).run()
        resumed = IterativeTrainer.resume(tmp_path / "run", policy=policy, expert=expert, **common)
        assert resumed.policy is not policy and resumed.policy.encoder.trust_remote_code
        resumed.close()

    start = tmp_path / "run" / "checkpoints" / "stage0"
    job = SupervisedJob(
        str(start), [str(store)], str(tmp_path / "taught"), SLConfig(steps=1, batch_size=2, scope="head")
    )
    sentinel.unlink()
    with pytest.raises(ValueError, match="runs code of") as error:
        run_job(job)
    demand_one_sentence(error)
    assert not sentinel.exists()
    run_job(replace(job, trust_remote_code=True))
    assert VLAPolicy.from_pretrained(tmp_path / "taught", trust_remote_code=True).encoder.trust_remote_code


def test_code_for_an_auto_class_that_transformers_has_dropped_is_refused_in_a_sentence(repository):
    """As OpenVLA's repository was published, for transformers 4."""
    folder, _, _ = repository
    name_code(folder, "AutoModelForVision2Seq")
    with pytest.raises(ValueError, match="describes no image-text-to-text model that can be built") as error:
        openvla_encoder(str(folder), revision=COMMIT, trust_remote_code=True)
    assert "\n" not in str(error.value)
