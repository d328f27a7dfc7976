import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hub import stand_in
from huggingface_hub import ModelCard
from tiny import INSTRUCTIONS, tiny_policy, toy_store

from vla_rl.config import IterativeConfig, with_method
from vla_rl.encoders import FrozenVLMEncoder, LoRASettings
from vla_rl.evaluation import EpisodeOutcome, EvaluationResult, TaskResult
from vla_rl.policy import VLAPolicy
from vla_rl.sharing import model_card, read_run, save_model_card


def outcome(successes, n, *, task="reach-red"):
    episodes = tuple(EpisodeOutcome(seed, seed < successes, 5, 1.0) for seed in range(n))
    return EvaluationResult({task: TaskResult(episodes)}).to_dict()


RESULTS = {
    "after-stage0": {"expert": outcome(9, 10), "rl": outcome(2, 10, task="reach-blue:new")},
    "task0-round0-stage1": {"task": "reach-blue:new", "num_env_steps": 100},
    "task0-round0-after-stage2": {"expert": outcome(10, 10), "rl": outcome(8, 10, task="reach-blue:new")},
    "seconds": {"total": 12.5},
}
CONFIG = {
    "seed": 3,
    "stage0": {"steps": 0, "batch_size": 64},
    "stage1": {"total_timesteps": 40_000, "gamma": 0.9},
    "stage2": {"steps": 500, "scope": "lora"},
    "stage1_mode": "ppo",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return stand_in(tmp_path / "hub", monkeypatch)


def observations():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    return {"image": image, "state": rng.standard_normal((3, 2)).astype(np.float32)}


def test_a_pushed_policy_comes_back_from_its_hub_id(hub):
    policy = tiny_policy()
    policy.encoder.add_lora(LoRASettings(r=2, alpha=4))
    url = policy.push_to_hub("me/dot", private=True, token="hf_x", results=RESULTS, branch="v1", license="mit")
    assert url == "https://hub/me/dot/commit/1"
    assert hub.calls == [
        ("token", "hf_x"),
        ("create_repo", "me/dot", {"private": True, "exist_ok": True}),
        ("create_branch", "me/dot", {"branch": "v1", "exist_ok": True}),
    ]
    again = VLAPolicy.from_pretrained("me/dot", revision="v1")
    np.testing.assert_array_equal(again.act(observations(), INSTRUCTIONS), policy.act(observations(), INSTRUCTIONS))
    card = ModelCard.load(hub.root / "me/dot/v1/README.md")
    assert card.data.license == "mit" and 'from_pretrained("me/dot")' in card.content
    with pytest.raises(FileNotFoundError, match="hub has not given it"):
        VLAPolicy.from_pretrained("me/dot")


def test_the_card_says_what_the_run_has_written(tmp_path):
    policy = tiny_policy()
    run = tmp_path / "run"
    toy_store(run.mkdir() or run / "expert_data", ("reach-red", "reach-blue"), episodes=2)
    (run / "results.json").write_text(json.dumps(RESULTS))
    (run / "config.json").write_text(json.dumps(CONFIG))
    content = read_run(run)
    assert [(row["task"], row["episodes"]) for row in content["data"]] == [("reach-blue", 2), ("reach-red", 2)]
    path = save_model_card(policy, tmp_path, repo_id="me/dot", description="Finds squares.", **content)
    card = ModelCard.load(path)

    # The hub's own reader finds the figures: 8 of 10 and 10 of 10.
    found = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert found == {"reach-red": 1.0, "reach-blue:new": 0.8}
    assert card.data.library_name == "vla-rl" and card.data.model_name == "dot" and "robotics" in card.data.tags
    assert card.data.base_model is None

    text = card.text.strip()
    assert text.startswith("# dot\n\nFinds squares.")
    assert "# of several cameras, image_<camera> each" in text
    # Wilson's interval of 8 of 10 is [.490, .943], of 2 of 10 [.057, .510].
    assert "| task0-round0-after-stage2 | 1.00 [0.72, 1.00] n=10 | 0.80 [0.49, 0.94] n=10 |" in text
    assert "| after-stage0 | 0.90 [0.60, 0.98] n=10 | 0.20 [0.06, 0.51] n=10 |" in text
    assert "| reach-blue:new | 0.80 | [0.49, 0.94] | 10 |" in text
    assert "| reach-blue | expert | 2 |" in text
    assert "**stage 1** (reinforcement learning, PPO, VLM frozen): `total_timesteps=40000`, `gamma=0.9`" in text
    assert "stage 0**" not in text and "seed 3" in text
    assert "seconds" not in text and "num_env_steps" not in text


@pytest.mark.parametrize(
    ("method", "stage1", "stage2"),
    [
        ("ire-vla", "1** (reinforcement learning, PPO, VLM frozen): `total_timesteps=160000`", True),
        (
            "ire-vla-sacfd",
            "1** (reinforcement learning, SAC from demonstrations, VLM frozen): `total_timesteps=20000`",
            True,
        ),
        ("ppo", "1** (reinforcement learning, PPO, VLM learns too, lora): `total_timesteps=160000`", False),
        ("ppo-replay", "1** (reinforcement learning, PPO, VLM learns too, lora): `total_timesteps=160000`", True),
        ("filtered-bc", "1** (128 episodes collected, nothing learned)\n", True),
        ("sft", None, False),
    ],
)
def test_the_card_names_the_stages_that_a_method_has(method, stage1, stage2):
    config = asdict(with_method(IterativeConfig(), method, vlm_scope="lora"))
    text = model_card(tiny_policy(), config=config)
    assert "**stage 0** (supervised): `steps=4000`" in text
    assert ("**stage 1" in text) == (stage1 is not None) and (stage1 is None or stage1 in text)
    assert ("**stage 2** (supervised)" in text) == stage2


def test_the_card_of_an_earlier_stage():
    text = model_card(tiny_policy(), results=RESULTS, evaluation="after-stage0")
    assert {result.metric_value for result in ModelCard(text).data.eval_results} == {0.9, 0.2}
    assert "the one of `after-stage0`" in text
    with pytest.raises(KeyError, match=r"'seconds' is not in the results, only \['after-stage0'"):
        model_card(tiny_policy(), results=RESULTS, evaluation="seconds")
    with pytest.raises(ValueError, match=r"results has the keys \['drawer-open'\] and no evaluation"):
        model_card(tiny_policy(), results={"drawer-open": 0.9})
    assert "## Success" not in model_card(tiny_policy(), results={"guards": []})
    back = {"guard": "rollback", "phase": "task0-round0-after-stage2", "evaluation": "after-stage0", "message": ""}
    assert model_card(tiny_policy(), results=RESULTS | {"guards": [back]}) == text


def test_a_card_without_a_run_describes_the_policy():
    policy = tiny_policy()
    policy.encoder.source = "someone/a-vlm"
    card = ModelCard(model_card(policy))
    assert card.data.base_model == "someone/a-vlm" and card.data.eval_results is None
    assert "PaliGemmaForConditionalGeneration" in card.text and "## Success" not in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    assert "np.zeros((32, 32, 3), np.uint8)" in code and '"state": np.zeros(2, np.float32)' in code
    compile(code, "card", "exec")


def test_a_card_needs_a_policy_beside_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing is no directory.*policy.save_pretrained"):
        save_model_card(tiny_policy(), tmp_path / "nothing")


def test_an_empty_directory_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the work directory of a run"):
        read_run(tmp_path)


def test_weights_that_only_this_machine_has_are_not_left_behind(hub, tmp_path):
    policy = tiny_policy()
    policy.encoder.model.save_pretrained(tmp_path / "vlm")
    policy.encoder.processor.save_pretrained(tmp_path / "vlm")
    local = VLAPolicy(FrozenVLMEncoder.from_pretrained(tmp_path / "vlm"), policy.head)
    with pytest.raises(ValueError, match=r"policy\.encoder\.source = None to upload them in full"):
        local.push_to_hub("me/dot")
    assert [call[0] for call in hub.calls] == ["token"]
    local.encoder.source = None
    local.push_to_hub("me/dot")
    shutil.rmtree(tmp_path / "vlm")
    again = VLAPolicy.from_pretrained("me/dot")
    np.testing.assert_array_equal(again.act(observations(), INSTRUCTIONS), policy.act(observations(), INSTRUCTIONS))


def test_fields_of_the_future_survive_loading_and_saving(tmp_path):
    tiny_policy().save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "policy.json"
    written = json.loads(path.read_text())
    future = {**written, "normalisation": {"kind": "quantile"}, "head": {**written["head"], "ema": 0.999}}
    path.write_text(json.dumps(future))
    policy = VLAPolicy.from_pretrained(tmp_path / "a")
    policy.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "policy.json").read_text()) == future
    VLAPolicy.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "policy.json").read_text()) == future


def test_an_encoders_fields_of_the_future_survive_with_a_warning(tmp_path):
    tiny_policy().save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "encoder" / "encoder.json"
    future = {**json.loads(path.read_text()), "crop": [0.1, 0.9], "resampling": "area"}
    path.write_text(json.dumps(future))
    for source, target in ("ab", "bc"):
        with pytest.warns(UserWarning, match="holds 'crop', 'resampling', which this version does not know"):
            policy = VLAPolicy.from_pretrained(tmp_path / source)
        policy.save_pretrained(tmp_path / target)
        assert json.loads((tmp_path / target / "encoder" / "encoder.json").read_text()) == future


def test_another_format_is_refused(tmp_path):
    tiny_policy().save_pretrained(tmp_path / "a")
    path: Path = tmp_path / "a" / "policy.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="another format than 1"):
        VLAPolicy.from_pretrained(tmp_path / "a")
