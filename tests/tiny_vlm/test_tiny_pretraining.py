import dataclasses
from pathlib import Path

import numpy as np
import probes
import pytest
import shards
import torch
from batches import Collator, Stream
from colours import NAMES
from evaluate import evaluate
from pretrain import Args, build, export, make_optimizer, one_cycle, save_checkpoint, train_step
from scenes import CELLS, LABELS, UNKNOWN_COLOUR
from texts import INSTRUCTIONS, Pair, location, vocabulary_texts

from vla_rl import FrozenVLMEncoder

pytestmark = pytest.mark.simulator

SMALL = Args(image_size=32, width=48, vision_layers=1, text_layers=2, heads=2, batch_size=16, learning_rate=3e-3)
PLACES = [(0.1, 0.2), (0.7, 0.3), (0.4, 0.9), (0.9, 0.6)]


def shard(count: int = 32, seed: int = 0) -> shards.Shard:
    """A white square on grey at one of four places, with a text of four kinds each."""
    rng = np.random.default_rng(seed)
    images = rng.integers(90, 110, (count, 32, 32, 3), dtype=np.uint8)
    cells = np.zeros((count, 2, CELLS, CELLS), dtype=np.uint8)
    cells[:, 0], cells[:, 1] = len(LABELS), UNKNOWN_COLOUR
    pairs, truths = [], np.full((count, len(shards.TRUTHS)), np.nan, dtype=np.float32)
    for row in range(count):
        column, line = place = PLACES[row % 4]
        images[row, int(line * 32) - 2 : int(line * 32) + 2, int(column * 32) - 2 : int(column * 32) + 2] = 255
        pairs.append(
            [
                Pair("caption", "describe the picture", "white cube"),
                Pair("where", "where is the cube", location(place), place),
                Pair("state", "is the gripper open", "yes" if row % 2 else "no"),
                Pair("presence", "is there a door", "no"),
            ]
        )
        truths[row, :3] = column, line, 1.0
        cells[row, :, int(line * CELLS), int(column * CELLS)] = LABELS.index("cube"), NAMES.index("white")
    return shards.Shard(images, pairs, truths, cells)


def batch_of(collator, part, rows=16):
    return collator.choose(part, np.arange(rows), np.random.default_rng(0))


@pytest.fixture
def parts():
    torch.manual_seed(0)
    encoder, learner = build(SMALL)
    return encoder, learner, Collator(encoder.processor)


def test_batches_are_what_the_processor_makes(parts):
    encoder, _, collator = parts
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    for prompt, answer in [
        ("open the drawer", f"handle {location((0.3, 0.8))} open"),
        ("what is at", "red cube , zażółć"),
    ]:
        batch = collator(shard(), np.array([0]), [Pair("where", prompt, answer)], ["nothing"])
        expected = encoder.processor(
            images=[image], text=[encoder.processor.image_token + prompt], suffix=[answer], return_tensors="pt"
        )
        assert torch.equal(batch.ids, expected["input_ids"])
        assert torch.equal(batch.answer.long(), expected["token_type_ids"])
        used = encoder._prompts.get(prompt, (32, 32))["input_ids"]
        assert torch.equal(batch.ids[:, : used.shape[1]], used), "a policy must see the prompts of pretraining"


def test_prompts_look_both_ways_and_answers_only_back(parts):
    _, learner, collator = parts
    batch = batch_of(collator, shard(), rows=1)
    learner.eval()
    start, end = int(batch.answer[0].nonzero()[0]), int(batch.mask[0].sum()) - 1

    def change(position: int) -> torch.Tensor:
        ids = batch.ids.clone()
        ids[0, position] = 7
        with torch.no_grad():
            return (learner(dataclasses.replace(batch, ids=ids))[0] - learner(batch)[0])[0].abs().amax(-1)

    assert change(end)[:end].max() == 0
    assert change(start - 1)[:start].min() > 0


def test_every_word_of_the_instructions_is_one_token(parts):
    tokenizer = parts[0].processor.tokenizer
    texts = (*INSTRUCTIONS.values(), *vocabulary_texts())
    words = {word for text in texts for word in text.replace(",", " ").split()}
    split = [word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) != 1]
    assert split == []


def test_twenty_steps_lower_every_loss_on_a_batch(parts):
    _, learner, collator = parts
    optimizer, batch = make_optimizer(learner, SMALL), batch_of(collator, shard())
    log = [train_step(learner, optimizer, batch, SMALL, rate=1.0) for _ in range(20)]
    assert log[-1]["answer"] < 0.5 * log[0]["answer"]
    assert log[-1]["place"] < 0.7 * log[0]["place"]
    assert log[-1]["label"] < 0.5 * log[0]["label"]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]


def test_cell_heads_keep_rows_and_columns_in_place(parts):
    _, learner, _ = parts
    side, fine = learner.side, learner.fine
    assert (side, fine) == (2, 8)
    # Value of a patch's output: its own row and column in the picture, counted in cells.
    rows, columns = np.meshgrid(np.arange(CELLS), np.arange(CELLS), indexing="ij")
    truth = torch.tensor(np.stack([rows, columns]), dtype=torch.float32)
    patches = truth.reshape(2, side, fine, side, fine).permute(1, 3, 2, 4, 0).reshape(1, side * side, -1)
    assert torch.equal(learner._spread(patches)[0], truth)


@pytest.mark.slow
def test_it_learns_to_answer_and_to_point(parts):
    _encoder, learner, collator = parts
    optimizer, part = make_optimizer(learner, SMALL), shard(64)
    rng = np.random.default_rng(0)
    for step in range(150):
        rows = rng.integers(64, size=16)
        train_step(learner, optimizer, collator.choose(part, rows, rng), SMALL, rate=one_cycle(step / 150, warmup=0.1))
    scores = evaluate(learner, collator, shard(32, seed=1), device="cpu")
    assert scores["where"]["commonest"] == 0.25
    assert scores["where"]["accuracy"] > 0.9
    assert scores["where"]["distance"] < 0.03
    assert scores["state"]["accuracy"] > 0.9 > scores["state"]["commonest"]
    assert scores["votes"]["asked"] < 0.1


def test_a_resumed_run_goes_on_with_the_same_numbers(tmp_path):
    shards.save(shard(64), shards.shard_path(tmp_path, 0))

    def run(steps: range, checkpoint: Path | None) -> torch.Tensor:
        encoder, learner = build(SMALL)
        optimizer = make_optimizer(learner, SMALL)
        if checkpoint is not None:
            state = torch.load(checkpoint, weights_only=True)
            learner.load_state_dict(state["learner"])
            optimizer.load_state_dict(state["optimizer"])
            assert state["step"] == steps.start
        stream = Stream(tmp_path, Collator(encoder.processor), batch_size=16, seed=0)
        for step in steps:
            train_step(learner, optimizer, stream.batch(step), SMALL, rate=0.5)
        save_checkpoint(tmp_path / f"{steps.stop}.pt", learner, optimizer, {"step": steps.stop, "seconds": 1.0})
        return torch.cat([value.flatten() for value in learner.state_dict().values()])

    whole = run(range(0, 6), None)
    run(range(0, 3), None)
    assert torch.equal(run(range(3, 6), tmp_path / "3.pt"), whole)


def test_a_stream_shows_each_picture_once_per_window(tmp_path):
    for number in range(2):
        part = shard(32, seed=number)
        part.images[:, 0, 0, 0] = np.arange(32) + 32 * number
        shards.save(part, shards.shard_path(tmp_path, number))
    encoder, _ = build(SMALL)
    stream = Stream(tmp_path, Collator(encoder.processor), batch_size=16, seed=0)
    first, second = ([stream.batch(step) for step in window] for window in (range(4), range(4, 8)))
    seen = torch.cat([batch.frames[:, 0, 0, 0] for batch in first])
    assert sorted(seen.tolist()) == list(range(64))
    assert not torch.equal(seen, torch.cat([batch.frames[:, 0, 0, 0] for batch in second]))
    with pytest.raises(FileNotFoundError, match=r"generate\.py"):
        Stream(tmp_path / "empty", Collator(encoder.processor), batch_size=16, seed=0)


def test_shards_survive_the_disk(tmp_path):
    part = shard(8)
    shards.save(part, tmp_path / "a.npz")
    loaded = shards.load(tmp_path / "a.npz")
    assert np.array_equal(loaded.images, part.images)
    assert loaded.pairs == part.pairs
    np.testing.assert_array_equal(loaded.truths, part.truths)
    assert np.array_equal(loaded.cells, part.cells)


def test_the_export_is_an_encoder_with_the_features_of_training(parts, tmp_path):
    encoder, learner, collator = parts
    part = shard(2)
    optimizer = make_optimizer(learner, SMALL)
    train_step(learner, optimizer, batch_of(collator, part, rows=2), SMALL, rate=1.0)
    export(encoder, learner, tmp_path / "model", {"steps": 1})
    loaded = FrozenVLMEncoder.from_pretrained(tmp_path / "model")
    tokens = loaded.encode(part.images, ["where is the cube", "open the drawer"]).tokens.float()
    pairs = [Pair("where", text, "") for text in ("where is the cube", "open the drawer")]
    batch = collator(part, np.arange(2), pairs, ["nothing"] * 2)
    learner.eval()
    with torch.no_grad():
        hidden = learner(batch)[0]
    prompt = ~batch.answer[0] & batch.mask[0].bool()
    assert (tokens[0][: int(prompt.sum())] - hidden[0][prompt]).abs().max() < 0.05
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 2.2 * sum(
        p.numel() for p in learner.model.parameters()
    )


def test_the_schedule_rises_and_falls():
    rates = [one_cycle(progress / 100, warmup=0.1) for progress in range(101)]
    assert np.argmax(rates) == 10
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_probes_find_what_is_linear_and_only_that():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(600, 20)), rng.normal(size=(20, 2))
    y = x @ weights + 3.0
    guess = probes.fit_predict(x[:400], y[:400], x[400:])
    assert probes.r2(y[400:], guess) > 0.99
    noise = rng.normal(size=(600, 2))
    assert probes.r2(noise[400:], probes.fit_predict(x[:400], noise[:400], x[400:])) < 0.05
    # Fewer rows than columns take the other closed form; both solve the same equations.
    a, b = rng.normal(size=(10, 30)), rng.normal(size=(10, 1))
    (few,), *_ = probes.ridge(a, b, [2.0])
    centred, target = a - a.mean(0), b - b.mean(0)
    np.testing.assert_allclose(
        few, np.linalg.solve(centred.T @ centred + 2.0 * np.eye(30), centred.T @ target), atol=1e-8
    )
    truth, said = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert probes.balanced_accuracy(truth, said) == pytest.approx((2 / 3 + 1) / 2)


def test_intervals_of_probes_know_that_pictures_come_in_sessions():
    """Sixteen pictures that are alike say as much as one: the interval is that of the sessions' means."""
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(100) < 0.5, 16)
    truth, guess = np.ones(1600, dtype=np.int64), right.astype(np.int64)
    low, high = probes.interval(probes.balanced_accuracy, truth, guess, np.repeat(np.arange(100), 16))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.2)
    low, high = probes.interval(probes.balanced_accuracy, truth, guess, np.arange(1600))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 40, rel=0.2)
