import copy
import functools
import pickle

import numpy as np
import pytest
import torch

from vla_rl.encoders import FrozenVLMEncoder, LoRASettings, small_vlm

INSTRUCTIONS = ("open the drawer", "press the red button now", "close the window")
TINY = {"image_size": 32, "width": 48, "vision_layers": 1, "text_layers": 2, "heads": 2}


def tiny(**more) -> FrozenVLMEncoder:
    torch.set_num_threads(1)
    return small_vlm(INSTRUCTIONS, **{**TINY, **more})


def frames(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 32, 32, 3), dtype=np.uint8)


def weights(encoder: FrozenVLMEncoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in encoder.model.state_dict().items()}


def test_default_size_and_token_counts():
    encoder = small_vlm(INSTRUCTIONS)
    assert 3.2e6 < sum(p.numel() for p in encoder.parameters()) < 3.8e6
    features = encoder.encode(np.zeros((2, 64, 64, 3), dtype=np.uint8), INSTRUCTIONS[:2])
    assert encoder.feature_dim == features.tokens.shape[-1] == 192
    assert features.tokens.dtype == torch.float16
    assert 16 < features.tokens.shape[1] < 30


@pytest.mark.parametrize("training", [False, True])
def test_image_tokens_see_the_instruction(training):
    encoder = tiny()
    encoder.train(training)
    images = np.concatenate([frames(1)] * 2)
    if training:
        with encoder.trainable("all"):
            tokens = encoder.forward(images, INSTRUCTIONS[:2]).tokens.detach()
    else:
        tokens = encoder.forward(images, INSTRUCTIONS[:2]).tokens
    assert (tokens[0, :4] - tokens[1, :4]).abs().amax(-1).min() > 1e-3


def test_every_prompt_token_sees_every_other():
    encoder = tiny()
    encoder.model.requires_grad_(True)
    embedding = encoder.model.get_input_embeddings()
    seen = []
    handle = embedding.register_forward_hook(lambda module, args, output: seen.append(output))
    features = encoder.forward(frames(1), ["open the drawer"])
    handle.remove()
    seen[0].retain_grad()
    text = slice(4, features.tokens.shape[1])
    for position in range(features.tokens.shape[1]):
        (gradient,) = torch.autograd.grad(features.tokens[0, position, 0], seen[0], retain_graph=True)
        assert (gradient[0, text].abs().sum(-1) > 0).all(), f"token {position} misses some of the instruction"


def test_unseen_instructions_tokenise_without_loss():
    encoder = tiny()
    tokenizer = encoder.processor.tokenizer
    text = "zażółć the 🦾 quickly"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text
    features = encoder.encode(frames(2), [text, "open the drawer"])
    assert features.mask[0].sum() > features.mask[1].sum()


def test_seed_decides_the_weights_and_global_random_state_is_untouched():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert first.fingerprint == second.fingerprint != other.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_equals_forward(dtype):
    encoder = tiny(dtype=dtype)
    encoded = encoder.encode(frames(3), INSTRUCTIONS)
    assert torch.equal(encoded.tokens, encoder.forward(frames(3), INSTRUCTIONS).tokens.half())
    assert not encoded.tokens.requires_grad
    assert not encoded.tokens.is_inference()


def test_bfloat16_stays_close_to_float32():
    exact, rounded = (
        tiny().forward(frames(3), INSTRUCTIONS),
        tiny(dtype=torch.bfloat16).forward(frames(3), INSTRUCTIONS),
    )
    error = (exact.tokens - rounded.tokens)[exact.mask].abs()
    assert 0 < error.mean() < 0.02


def test_frozen_means_frozen():
    encoder = tiny()
    before, fingerprint = weights(encoder), encoder.fingerprint
    encoder.encode(frames(3), INSTRUCTIONS)
    encoder.train().encode(frames(2), INSTRUCTIONS[:2])
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.forward(frames(3), INSTRUCTIONS).tokens.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())
    encoder._fingerprint = None
    assert encoder.fingerprint == fingerprint


def test_training_in_scope_text_leaves_the_vision_tower_alone():
    encoder = tiny()
    before = weights(encoder)
    with encoder.trainable("text") as parameters:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        encoder.forward(frames(2), INSTRUCTIONS[:2]).tokens.sin().mean().backward()
        optimizer.step()
    changed = {name for name, value in encoder.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("language_model" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_fingerprint_follows_all_that_decides_features(tmp_path):
    tiny().save_pretrained(tmp_path / "a")
    load = FrozenVLMEncoder.from_pretrained
    base = load(tmp_path / "a")
    prints = {
        base.fingerprint,
        load(tmp_path / "a", prompt="do: {instruction}").fingerprint,
        load(tmp_path / "a", layer=1).fingerprint,
        load(tmp_path / "a", dtype=torch.bfloat16).fingerprint,
        load(tmp_path / "a", lora=LoRASettings(r=2)).fingerprint,
        load(tmp_path / "a", lora=LoRASettings(r=4)).fingerprint,
    }
    darker = tiny()
    darker.processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    prints.add(darker.fingerprint)
    coarser = tiny()
    coarser.processor.image_processor.resample = 0  # another filter, for pictures of another size than the model's
    prints.add(coarser.fingerprint)
    with base.trainable("all") as parameters:
        parameters[0].data.view(-1)[0] += 1.0
    prints.add(base.fingerprint)
    assert len(prints) == 9
    assert load(tmp_path / "a").fingerprint == load(tmp_path / "a").fingerprint


def test_weights_from_load_state_dict_are_noticed_and_saved(tmp_path):
    base, other = tiny(), tiny()
    base.save_pretrained(tmp_path / "base")
    load = functools.partial(FrozenVLMEncoder.from_pretrained, tmp_path / "base", lora=LoRASettings(r=2))
    with other.trainable("text") as parameters:
        parameters[0].data.add_(0.5)
    other.add_lora(LoRASettings(r=2))
    encoder, same = load(), load()
    before = encoder.fingerprint
    encoder.load_state_dict(other.state_dict())
    tokens = encoder.encode(frames(2), ["go", "go"]).tokens
    assert encoder.fingerprint == other.fingerprint != before
    assert torch.equal(tokens, other.encode(frames(2), ["go", "go"]).tokens)
    encoder.save_pretrained(tmp_path / "changed")
    again = FrozenVLMEncoder.from_pretrained(tmp_path / "changed")
    assert torch.equal(again.encode(frames(2), ["go", "go"]).tokens, tokens)
    adapted = {name: value + 1 for name, value in same.state_dict().items() if "lora_" in name}
    same.load_state_dict(same.state_dict() | adapted)  # the adapter alone is another: what lies below has its source
    assert same.fingerprint != before and not same._base_changed


def test_fingerprint_is_marked_while_weights_move():
    encoder = tiny()
    fingerprint = encoder.fingerprint
    with encoder.trainable("all"):
        assert encoder.forward(frames(1), ["go"]).fingerprint == f"{fingerprint}-training"
    assert encoder.fingerprint == fingerprint


@pytest.mark.parametrize("layer", [0, 1])
def test_layer_selects_an_entry_of_hidden_states(layer, tmp_path):
    tiny().save_pretrained(tmp_path / "a")
    encoder = FrozenVLMEncoder.from_pretrained(tmp_path / "a", layer=layer)
    inputs = encoder._prompts.process(frames(1)[0], "go")
    inputs.pop("labels")
    with torch.no_grad():
        expected = encoder.model(**inputs, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(encoder.forward(frames(1), ["go"]).tokens, expected, rtol=1e-4, atol=1e-5)
    for layer in (2, -2):
        with pytest.raises(ValueError, match=f"layer={layer}, expected -1"):
            FrozenVLMEncoder.from_pretrained(tmp_path / "a", layer=layer)


def test_adapter_on_changed_weights_is_saved_with_them(tmp_path):
    encoder = tiny(dtype=torch.bfloat16)
    encoder.add_lora(LoRASettings(r=2, dropout=0.1))
    with encoder.trainable("all") as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        encoder.forward(frames(2), INSTRUCTIONS[:2]).tokens.sin().mean().backward()
        optimizer.step()
    encoder.save_pretrained(tmp_path / "a")
    loaded = FrozenVLMEncoder.from_pretrained(tmp_path / "a")
    assert loaded.fingerprint == encoder.fingerprint
    assert torch.equal(
        loaded.encode(frames(2), INSTRUCTIONS[:2]).tokens, encoder.encode(frames(2), INSTRUCTIONS[:2]).tokens
    )


def test_adapter_dropout_acts_only_in_forward_while_open():
    encoder = tiny()
    encoder.add_lora(LoRASettings(r=4, dropout=0.5))
    with encoder.trainable() as parameters:
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.3)
        noisy = [encoder.forward(frames(1), ["go"]).tokens for _ in range(2)]
        calm = [encoder.encode(frames(1), ["go"]).tokens for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(*calm)
    # Attention is computed in another way while weights are open, which rounds differently.
    after = encoder.encode(frames(1), ["go"]).tokens
    torch.testing.assert_close(after, calm[0], rtol=0.01, atol=0.01)
    assert (noisy[0] - after).abs().max() > 0.1


def test_a_moved_source_is_noticed(tmp_path):
    tiny(seed=1).model.save_pretrained(tmp_path / "source")
    tiny(seed=1).processor.save_pretrained(tmp_path / "source")
    FrozenVLMEncoder.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.safetensors"))
    tiny(seed=2).model.save_pretrained(tmp_path / "source")
    with pytest.warns(UserWarning, match="changed since"):
        FrozenVLMEncoder.from_pretrained(tmp_path / "saved")


def test_saving_refuses_a_directory_in_use(tmp_path):
    encoder = tiny()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        encoder.save_pretrained(tmp_path)
    with encoder.trainable("all"), pytest.raises(RuntimeError, match="open for training"):
        encoder.save_pretrained(tmp_path / "new")


def test_encoder_survives_pickle_and_deepcopy():
    encoder = tiny()
    expected = encoder.encode(frames(2), INSTRUCTIONS[:2])
    for clone in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        features = clone.encode(frames(2), INSTRUCTIONS[:2])
        assert torch.equal(features.tokens, expected.tokens)
        assert features.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 3, 32, 32), np.uint8), np.zeros((32, 32, 3), np.uint8)],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match="expected uint8 \\[B, H, W, 3\\]"):
        tiny().encode(images, ["go"])


def test_wrong_calls_say_what_to_do():
    encoder = tiny()
    with pytest.raises(ValueError, match="2 instructions for 3 observations"):
        encoder.encode(frames(3), INSTRUCTIONS[:2])
    with pytest.raises(ValueError, match="a string, not a list of instructions for 2 observations"):
        encoder.encode(frames(2), "go")
    with pytest.raises(ValueError, match="exactly one"):
        encoder.forward(None, ["go"])
    with pytest.raises(ValueError, match="no LoRA adapter; call add_lora"), encoder.trainable():
        pass
    with pytest.raises(ValueError, match="expected 'lora', 'text' or 'all'"), encoder.trainable("everything"):
        pass
    with pytest.raises(ValueError, match="no field"):
        FrozenVLMEncoder(encoder.model, encoder.processor, prompt="do it")
    encoder.add_lora(LoRASettings(r=2))
    with pytest.raises(ValueError, match="already has"):
        encoder.add_lora(LoRASettings(r=2))
    with pytest.raises(ValueError, match="multiple of patch_size"):
        tiny(image_size=40)


def test_overflow_of_the_storage_type_is_an_error(tmp_path):
    encoder = tiny()
    with encoder.trainable("all"), torch.no_grad():
        encoder.model.model.language_model.norm.weight.fill_(1e6)
    with pytest.raises(FloatingPointError, match="feature_dtype"):
        encoder.encode(frames(1), ["go"])
    encoder.feature_dtype = torch.float32
    tokens = encoder.encode(frames(1), ["go"]).tokens
    assert tokens.abs().max() > 1e5
    encoder.save_pretrained(tmp_path / "encoder")
    again = FrozenVLMEncoder.from_pretrained(tmp_path / "encoder")
    assert again.feature_dtype == torch.float32 and torch.equal(again.encode(frames(1), ["go"]).tokens, tokens)


def test_gradient_checkpointing_gives_the_same_gradients():
    encoder = tiny()
    encoder.add_lora(LoRASettings(r=2))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
        encoder.train()
        assert encoder.model.training == checkpointing
        with encoder.trainable() as parameters:
            encoder.zero_grad()
            encoder.forward(frames(2), INSTRUCTIONS[:2]).tokens.sin().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_weights_open_after_an_exception_are_frozen_again():
    encoder = tiny()
    with pytest.raises(KeyError), encoder.trainable("all"):
        raise KeyError
    assert not any(p.requires_grad for p in encoder.parameters())


def test_training_on_a_cpu_computes_the_same_gradients_by_plain_attention():
    encoder, images = tiny(), frames(3)
    encoder.encode(images, INSTRUCTIONS)

    def gradients(implementation: str) -> tuple[str, list[torch.Tensor]]:
        with encoder.trainable("all") as parameters:
            chosen = encoder.model.config._attn_implementation
            encoder.model.set_attn_implementation(implementation)
            loss = encoder.forward(images, INSTRUCTIONS).tokens.square().mean()
            return chosen, list(torch.autograd.grad(loss, parameters, allow_unused=True))

    chosen, plain = gradients("eager")
    _, fused = gradients("sdpa")
    assert chosen == "eager"
    assert encoder.model.config._attn_implementation == "sdpa"
    compared = [(a, b) for a, b in zip(plain, fused, strict=True) if a is not None]
    assert len(compared) > 10
    for a, b in compared:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_saved_loaded_and_saved_again_with_an_adapter(tmp_path):
    encoder = tiny()
    encoder.add_lora(LoRASettings(r=4))
    with encoder.trainable("lora") as parameters:
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.1)
    encoder.save_pretrained(tmp_path / "first")
    FrozenVLMEncoder.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = FrozenVLMEncoder.from_pretrained(tmp_path / "second")
    assert again.fingerprint == encoder.fingerprint
    images = frames(2)
    torch.testing.assert_close(
        again.encode(images, INSTRUCTIONS[:2]).tokens, encoder.encode(images, INSTRUCTIONS[:2]).tokens, rtol=0, atol=0
    )
