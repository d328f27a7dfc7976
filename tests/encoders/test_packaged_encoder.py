import json
import shutil

import numpy as np
import pytest
import torch

from vla_rl.encoders import FrozenVLMEncoder, LoRASettings, packaged, small_vlm

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
TEXTS = ["open the drawer", "close the window"]


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A package with a stand-in for the encoder `tiny`, in float16 as shipped."""
    encoder = small_vlm(TEXTS, image_size=32, width=48, vision_layers=1, text_layers=1, heads=2)
    directory = tmp_path / "assets" / "tiny"
    encoder.model.half().save_pretrained(directory)
    encoder.processor.save_pretrained(directory)
    monkeypatch.setattr(packaged, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets"


def test_the_name_loads_the_packaged_files_in_mixed_precision(assets):
    named, plain = FrozenVLMEncoder.from_pretrained("tiny"), FrozenVLMEncoder.from_pretrained(assets / "tiny")
    assert named.compute_dtype == torch.bfloat16
    assert plain.compute_dtype == torch.float32
    error = named.encode(FRAMES, TEXTS).tokens.float() - plain.encode(FRAMES, TEXTS).tokens.float()
    assert 0 < error.abs().mean() < 0.02
    exact = FrozenVLMEncoder.from_pretrained("tiny", dtype=torch.float32)
    assert torch.equal(exact.encode(FRAMES, TEXTS).tokens, plain.encode(FRAMES, TEXTS).tokens)


def test_a_saved_adapter_finds_the_package_wherever_it_is(assets, tmp_path, monkeypatch):
    encoder = FrozenVLMEncoder.from_pretrained("tiny", lora=LoRASettings(r=2))
    encoder.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "encoder.json").read_text())["source"] == "tiny"
    assert not (tmp_path / "saved" / "model").exists()
    shutil.move(assets, tmp_path / "elsewhere")
    monkeypatch.setattr(packaged, "ASSETS", tmp_path / "elsewhere")
    loaded = FrozenVLMEncoder.from_pretrained(tmp_path / "saved")
    assert loaded.fingerprint == encoder.fingerprint
    assert torch.equal(loaded.encode(FRAMES, TEXTS).tokens, encoder.encode(FRAMES, TEXTS).tokens)


def test_missing_files_say_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'tiny' should be in .*pretrain\.py"):
        FrozenVLMEncoder.from_pretrained("tiny")
