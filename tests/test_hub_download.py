"""Hub ids by the hub's own client, over HTTP: the library and a script download, the library uploads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import hub
from tiny import differing, parameters, tiny_encoder, tiny_policy, toy_store

ROOT = Path(__file__).parents[1]
IMAGE = "torch.arange(32 * 32 * 3).view(1, 32, 32, 3).to(torch.uint8)"


@pytest.fixture
def served(tmp_path):
    """A hub with a VLM in it; `run(code)` runs Python that asks it, or only what it kept if `offline`."""
    encoder = tiny_encoder()
    folder = tmp_path / "hub" / "models" / "OWNER" / "VLM"
    encoder.model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    with hub(tmp_path / "hub") as env:
        env["HF_HOME"] = str(tmp_path / "cache")

        def run(*words, offline=False, fails=False):
            """A Python process; what it printed, its errors if it has to fail."""
            there = env | ({"HF_HUB_OFFLINE": "1"} if offline else {})
            done = subprocess.run([sys.executable, *words], env=there, capture_output=True, text=True, timeout=300)
            assert bool(done.returncode) == fails, done.stderr
            return done.stderr if fails else done.stdout

        yield run


LOAD = f"""
import torch
from vla_rl.encoders import FrozenVLMEncoder
encoder = FrozenVLMEncoder.from_pretrained("OWNER/VLM", dtype=torch.float32)
features = encoder.encode({IMAGE}, ["reach the red square"])
print(encoder.fingerprint, features.tokens.double().sum().item())
"""


@pytest.mark.slow
def test_a_vlm_is_downloaded_once_and_gives_the_features_of_the_local_one(served):
    encoder = tiny_encoder()
    features = encoder.encode(eval(IMAGE), ["reach the red square"])
    fingerprint, total = served("-c", LOAD).split()
    assert float(total) == pytest.approx(features.tokens.double().sum().item(), rel=1e-6)
    assert served("-c", LOAD, offline=True).split() == [fingerprint, total], "from the cache"
    said = served("-c", LOAD.replace("OWNER/VLM", "OWNER/OTHER"), fails=True)
    assert "OWNER/OTHER" in said.splitlines()[-1]


@pytest.mark.slow
def test_a_script_takes_a_hub_id(served, tmp_path, monkeypatch):
    toy_store(tmp_path / "demos", ("reach-red", "reach-blue"), episodes=2)
    monkeypatch.chdir(tmp_path)
    options = "--demos demos --total-timesteps 2 --batch-size 4 --eval-episodes 1 --num-envs 1 --save-model"
    served(str(ROOT / "examples" / "sft_vlm.py"), "--vlm", "OWNER/VLM", "--scope", "lora", *options.split())
    (saved,) = tmp_path.glob("runs/**/model/encoder/encoder.json")
    assert json.loads(saved.read_text())["source"] == "OWNER/VLM"


@pytest.mark.slow
def test_a_policy_goes_up_and_comes_back(served, tmp_path):
    policy = tiny_policy()
    policy.save_pretrained(tmp_path / "policy")
    push = """
import sys
from vla_rl.policy import VLAPolicy
url = VLAPolicy.from_pretrained(sys.argv[1]).push_to_hub("OWNER/POLICY", token="hf_x")
assert url.endswith("/OWNER/POLICY/commit/" + 40 * "0"), url
VLAPolicy.from_pretrained("OWNER/POLICY").save_pretrained(sys.argv[2])
"""
    served("-c", push, str(tmp_path / "policy"), str(tmp_path / "back"))
    back = type(policy).from_pretrained(str(tmp_path / "back"))
    assert not differing(parameters(policy.head), parameters(back.head))
    assert torch.equal(
        policy.encoder.encode(eval(IMAGE), ["go"]).tokens, back.encoder.encode(eval(IMAGE), ["go"]).tokens
    )
    assert "vla_rl" in (tmp_path / "hub/models/OWNER/POLICY/README.md").read_text()
