import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vla_rl import estimate_time
from vla_rl.cli import main
from vla_rl.encoders import FrozenVLMEncoder, LoRASettings, small_vlm
from vla_rl.estimate import LiveBytes, Workload, estimate
from vla_rl.estimate_cli import _INSTRUCTION, Estimate
from vla_rl.estimate_time import _gradient_step, _median, measure_times
from vla_rl.heads import GaussianHead

SENTENCE = "open the drawer"
SIZE = {"image_size": 32, "patch_size": 8, "width": 64, "vision_layers": 2, "text_layers": 4, "heads": 2}


def encoder_of(*, dtype=torch.bfloat16, lora=None):
    encoder = small_vlm([SENTENCE], **SIZE, dtype=dtype)
    if lora is not None:
        encoder.add_lora(lora)
    return encoder


def workload(encoder, **more):
    tokens = encoder.prompt_length([SENTENCE])
    return Workload(**{"tokens": tokens, "vision_tokens": 16, "batch_size": 24, **more})


def test_live_bytes_by_hand():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first + 1
        view = second.view(10, 100)
        assert live.now == live.peak == 8000
        del first
        assert live.now == 4000
        second.add_(1)
        third = torch.zeros(500, dtype=torch.float16)
        assert (live.now, live.peak) == (5000, 8000)
        del second
        assert live.now == 5000  # the view holds it
        del view, third
        assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_encoder(dtype):
    encoder = encoder_of(dtype=dtype, lora=LoRASettings(r=4, alpha=8, top_layers=2))
    head = GaussianHead(encoder.feature_dim, 7, state_dim=8)
    plain = encoder_of(dtype=dtype)
    figures = estimate(plain.model.config, workload(plain, dtype=dtype, lora=encoder.lora))
    weights = [*encoder.model.parameters(), *head.parameters()]
    buffers = [*encoder.model.buffers(), *head.buffers()]
    assert figures.parameters == sum(weight.numel() for weight in weights)
    assert figures.weights == sum(tensor.nbytes for tensor in [*weights, *buffers])
    with encoder.trainable("lora") as adapter:
        learn = sum(weight.numel() for weight in [*adapter, *head.parameters()])
    assert figures.trainable == learn
    assert figures.optimizer == 8 * learn
    assert figures.cache_row == 4 * figures_tokens(plain) * encoder.feature_dim
    seen = plain.encode_vision(np.zeros((3, 32, 32, 3), np.uint8))
    assert estimate(plain.model.config, workload(plain, dtype=dtype)).cache_row == seen[0].nbytes
    assert figures.peak == figures.weights + figures.optimizer + figures.step


def figures_tokens(encoder):
    return encoder.encode(np.zeros((1, 32, 32, 3), np.uint8), [SENTENCE]).tokens.shape[1]


@pytest.mark.parametrize("top_layers", [None, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_step_takes_what_a_real_one_takes(top_layers, checkpointing):
    lora = LoRASettings(r=4, alpha=8, top_layers=top_layers)
    encoder = encoder_of(lora=lora)
    head = GaussianHead(encoder.feature_dim, 7, state_dim=8)
    rows = 24
    images = np.random.default_rng(0).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    texts = [SENTENCE] * rows
    given = {"vision": encoder.encode_vision(images)} if top_layers is None else {}
    given = given or {"lower": encoder.encode_lower(images, texts)}
    encoder.vision_shape()
    with encoder.trainable("lora", checkpointing=checkpointing), LiveBytes() as live:
        features = encoder.forward(None, texts, **given)
        head.supervised_loss(features, torch.zeros(rows, 8), torch.zeros(rows, 7)).backward()
        measured = live.peak
    work = workload(encoder, lora=lora, gradient_checkpointing=checkpointing)
    estimated = estimate(encoder_of().model.config, work).step
    assert estimated == pytest.approx(measured, rel=0.15)


def test_operations_by_hand():
    encoder = encoder_of(dtype=torch.float32, lora=LoRASettings())
    figures = estimate(encoder.model.config, workload(encoder, dtype=torch.float32))
    language = encoder.model.model.language_model
    linear = sum(module.weight.numel() for module in language.modules() if isinstance(module, torch.nn.Linear))
    tokens = encoder.prompt_length([SENTENCE])
    text = 2 * linear * tokens + 4 * 4 * tokens**2 * 64
    tower = encoder.model.get_encoder(modality="image")
    linear = sum(m.weight.numel() for m in tower.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))
    vision = 2 * linear * 16 + 4 * 2 * 16**2 * 64
    assert figures.env_step_flops == pytest.approx(text + vision, rel=0.02)
    assert figures.fill_flops == pytest.approx(vision, rel=0.02)


def test_every_way_to_save_memory_saves_some():
    config = encoder_of().model.config

    def figures(**more):
        return estimate(config, workload(encoder, **more))

    encoder = encoder_of()
    plain = figures()
    top = figures(lora=LoRASettings(top_layers=1))
    assert top.step < 0.5 * plain.step and top.step_flops < 0.5 * plain.step_flops
    assert top.fill_flops > plain.fill_flops
    assert figures(gradient_checkpointing=True).step < 0.7 * plain.step
    parts = figures(gradient_accumulation=4)
    assert parts.step < 0.6 * plain.step
    assert parts.step_flops == pytest.approx(plain.step_flops, rel=0.01)
    assert figures(optimizer="adamw8bit").optimizer == plain.optimizer / 4
    assert figures(offload=True).weights < plain.weights
    fewer = figures(truncate_layers=2)
    assert fewer.weights < plain.weights and fewer.env_step_flops < plain.env_step_flops
    text = figures(scope="text")
    assert text.trainable > plain.trainable and text.peak > plain.peak
    assert figures(scope="head").step_flops < 0.2 * plain.step_flops


def test_the_command_reads_a_directory_and_a_preset(tmp_path, capsys):
    encoder = encoder_of()
    encoder.save_pretrained(tmp_path / "encoder")
    for model, extra in ((str(tmp_path / "encoder"), ["--image-size", "32"]), ("kitchen-reduced", [])):
        assert main(["estimate", "--model", model, "--tflops", "0.1", *extra]) == 0
        printed = capsys.readouterr().out
        assert "peak on the device" in printed and "as given" in printed
    assert main(["estimate", "--model", str(tmp_path / "encoder"), "--tflops", "1", "--tokens", "30"]) == 1
    assert "--tokens 30 with --vision-tokens None: give both" in " ".join(capsys.readouterr().err.split())
    for option in (["--batch-size", "8"], ["--image-size", "32"], ["--top-layers", "4"]):
        assert main(["estimate", "--model", "kitchen-reduced", "--tflops", "1", *option]) == 1
        name = option[0].removeprefix("--").replace("-", "_")
        error = " ".join(capsys.readouterr().err.split())
        assert f"has a {name} of its own, so {option[1]} would be ignored; give --model its VLM, tiny" in error
    (tmp_path / "bare").mkdir()
    encoder.model.config.save_pretrained(tmp_path / "bare")
    assert main(["estimate", "--model", str(tmp_path / "bare"), "--tflops", "1"]) == 1
    assert "give --tokens and --vision-tokens" in " ".join(capsys.readouterr().err.split())
    arguments = ["--tokens", "30", "--vision-tokens", "16", "--tflops", "1"]
    assert main(["estimate", "--model", str(tmp_path / "bare"), *arguments]) == 0
    assert main(["estimate", "--model", str(tmp_path / "encoder"), "--image-size", "32", "--batch-size", "4"]) == 0
    assert "one and up to four layers of each kind" in " ".join(capsys.readouterr().out.split())


def test_a_few_layers_extrapolate_to_the_whole_model(monkeypatch):
    """By a clock that counts operations; how near seconds come, benchmarks/step_times.py says."""
    lora = LoRASettings(r=4, alpha=8, top_layers=3)
    size = {"image_size": 64, "patch_size": 16, "width": 192, "vision_layers": 6, "text_layers": 6, "heads": 3}
    encoder = small_vlm([SENTENCE], **size, dtype=torch.bfloat16)
    work = Workload(tokens=0, vision_tokens=0, batch_size=16, lora=lora)
    plain = encoder.model.config
    counter = FlopCounterMode(display=False)
    monkeypatch.setattr(estimate_time, "_clock", lambda device: counter.get_total_flops())
    with counter:
        times = measure_times(plain, encoder.processor, work, image_size=64, instruction=SENTENCE)
    assert (plain.text_config.num_hidden_layers, plain.vision_config.num_hidden_layers) == (6, 6)
    encoder.add_lora(lora)
    frames = torch.zeros(16, 64, 64, 3, dtype=torch.uint8)
    head = GaussianHead(encoder.feature_dim, 7, state_dim=8)
    with counter:
        step = _gradient_step(encoder, head, work, frames, SENTENCE, device="cpu", repeats=3)
        env_step = _median(lambda: encoder.encode(frames[:1], [SENTENCE]), "cpu", repeats=3)
    assert times.gradient_step == pytest.approx(step, rel=1e-6) and step > 1e9
    assert times.env_step == pytest.approx(env_step, rel=1e-6) and env_step > 1e8


def test_a_saved_encoder_is_estimated_with_its_own_prompt_and_layers(tmp_path):
    prompt = "In: what should the robot do to {instruction}? Out:"
    encoder = small_vlm(["go"], image_size=32, text_layers=2)
    encoder.save_pretrained(tmp_path / "whole")
    loaded = FrozenVLMEncoder.from_pretrained(tmp_path / "whole", prompt=prompt, truncate_layers=1)
    loaded.save_pretrained(tmp_path / "cut")
    _, work, probe = Estimate(model=str(tmp_path / "cut"), image_size=32).workload()
    loaded.image_size = (32, 32)
    assert work.tokens == loaded.prompt_length([_INSTRUCTION]) and work.truncate_layers == 1
    assert probe["prompt"] == prompt
