"""What an encoder does to run fast on a device: no needless waiting for it, compiled layers, quantised weights."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vla_rl.encoders import FrozenVLMEncoder, LoRASettings, small_vlm

SENTENCE = "open the drawer"
SIZE = {"image_size": 32, "patch_size": 16, "width": 32, "vision_layers": 1, "text_layers": 2, "heads": 2}


def tiny(**more):
    return small_vlm([SENTENCE, "go"], **{**SIZE, **more})


def frames(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


class Operations(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_inputs_of_a_rollout_are_made_without_waiting_for_the_device():
    encoder = tiny()
    texts = [SENTENCE, "go", SENTENCE]
    expected = encoder.encode(frames(3), texts)
    given = torch.from_numpy(frames(3))
    with Operations() as operations:
        encoder._pixels(given)
    assert "sub" in operations.names
    # Reading a number, finding indices, or making a tensor from Python numbers would be a copy to or from the host.
    assert not {"_local_scalar_dense", "nonzero", "lift_fresh", "index"} & set(operations.names)
    with Operations() as operations:
        batch = encoder._prompts.batch(texts, (32, 32), encoder.device)
    assert operations.names == []
    assert batch["attention_mask"].sum() == expected.mask.sum()


def test_kept_prompt_batches_are_bounded_and_right():
    encoder = tiny()
    for count in range(1, 60):
        batch = encoder._prompts.batch(["go"] * count, (32, 32), encoder.device)
        assert len(batch["input_ids"]) == count
    assert len(encoder._prompts._batches) == 32


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_give_the_same_features_and_gradients(backend):
    plain, compiled = tiny(), tiny()
    for encoder in (plain, compiled):
        torch.manual_seed(0)
        encoder.add_lora(LoRASettings(r=2, alpha=4, top_layers=1))
        for name, weight in encoder.named_parameters():
            if "lora_" in name:
                weight.data.normal_(0, 0.1)
    compiled.compile(backend=backend)
    texts = ["go", SENTENCE]
    expected, actual = plain.encode(frames(2), texts), compiled.encode(frames(2), texts)
    torch.testing.assert_close(actual.tokens, expected.tokens, rtol=1e-2, atol=1e-2)
    lower = compiled.encode_lower(frames(2), texts)
    gradients = []
    for encoder, given in ((plain, {"images": frames(2)}), (compiled, {"images": None, "lower": lower})):
        with encoder.trainable("lora") as adapter:
            encoder.forward(instructions=texts, **given).tokens.sin().mean().backward()
            gradients.append([weight.grad for weight in adapter])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_quantised_weights_without_their_package_are_refused(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = type("Config", (), {"quant_method": "bitsandbytes"})()
    with pytest.raises(ImportError, match=r"8 or 4 bits need bitsandbytes.*vla-rl\[quantize\]"):
        FrozenVLMEncoder.from_pretrained(tmp_path / "encoder", quantization_config=config)
