import json
from dataclasses import replace

import numpy as np
import pytest
import scripted
import torch
from gymnasium.vector import AutoresetMode
from scripted import SCRIPT, Truth, observation, script, succeeds
from tiny import INSTRUCTIONS, random_features

from vla_rl.encoders.features import Features
from vla_rl.rl.latent_buffer import LatentBuffer
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.stage1_sac import LatentMemory

GAMMA = 0.9


def numbered(first, count, *, tokens=2):
    """Frames that say their own number."""
    values = torch.arange(first, first + count).float()
    mask = torch.ones(count, tokens, dtype=torch.bool)
    return Features(values[:, None, None].expand(count, tokens, 3), mask, "e"), values[:, None]


def buffer(capacity=100, **more):
    return LatentBuffer(capacity, action_dim=1, fingerprint="e", **more)


def add_episode(ring, first, rewards, *, terminated):
    """Frames first .. first + T; action t is minus the number of its frame."""
    features, state = numbered(first, len(rewards) + 1)
    ring.add_episode(features, state, actions=-state[:-1], rewards=torch.tensor(rewards), terminated=terminated)


def transitions(ring, *, n_step=1, draws=2000):
    """Every transition that the ring gives: frame -> (action, rewards, discount, next frame)."""
    batch = ring.sample(draws, gamma=GAMMA, n_step=n_step, generator=torch.Generator().manual_seed(0))
    found = {}
    for row in range(draws):
        frame, following = int(batch.state[row]), int(batch.next_state[row])
        assert batch.features.tokens[row].unique().tolist() == [frame]
        assert batch.next_features.tokens[row].unique().tolist() == [following]
        values = (batch.actions[row].item(), batch.rewards[row].item(), batch.discounts[row].item(), following)
        assert found.setdefault(frame, values) == values
    return found


def test_one_step_transitions():
    ring = buffer()
    add_episode(ring, 0, [1.0, 2.0], terminated=True)
    add_episode(ring, 10, [3.0, 4.0], terminated=False)
    found = transitions(ring)
    assert len(ring) == 4 and found.keys() == {0, 1, 10, 11}
    assert found[0] == pytest.approx((0.0, 1.0, 0.9, 1))
    assert found[1][:3] == (-1.0, 2.0, 0.0)  # nothing follows a terminal state
    assert found[10] == pytest.approx((-10.0, 3.0, 0.9, 11))
    assert found[11] == pytest.approx((-11.0, 4.0, 0.9, 12))  # a truncation bootstraps from its final frame


def test_three_step_returns_stop_at_the_end_of_the_episode():
    ring = buffer()
    add_episode(ring, 0, [1.0, 2.0, 3.0, 4.0], terminated=True)
    add_episode(ring, 10, [5.0, 6.0], terminated=False)
    found = transitions(ring, n_step=3)
    assert found[0] == pytest.approx((0.0, 1 + 0.9 * 2 + 0.81 * 3, 0.729, 3))
    assert found[1][1:3] == pytest.approx((2 + 0.9 * 3 + 0.81 * 4, 0.0))
    assert found[3][1:3] == pytest.approx((4.0, 0.0))
    assert found[10] == pytest.approx((-10.0, 5 + 0.9 * 6, 0.81, 12))
    assert found[11] == pytest.approx((-11.0, 6.0, 0.9, 12))


def test_three_step_returns_stop_at_the_latest_frame():
    ring = buffer()
    ids = ring.add_frames(*numbered(0, 3))
    ring.add_steps(
        ids[:2],
        actions=torch.zeros(2, 1),
        rewards=torch.tensor([1.0, 2.0]),
        bootstrap=torch.ones(2, dtype=torch.bool),
        next_ids=ids[1:],
    )
    assert transitions(ring, n_step=3)[0] == pytest.approx((0.0, 1 + 0.9 * 2, 0.81, 2))


def test_the_oldest_steps_make_room():
    ring = buffer(8)
    for first in (0, 10, 20, 30):
        add_episode(ring, first, [0.0, 0.0], terminated=False)
    # The last 8 of 12 frames are 11, 12, 20 .. 22, 30 .. 32; frames 12, 22 and 32 are final.
    found = transitions(ring)
    assert found.keys() == {11, 20, 21, 30, 31} and len(ring) == 5
    assert {frame: row[3] for frame, row in found.items()} == {11: 12, 20: 21, 21: 22, 30: 31, 31: 32}
    assert ring.alive(torch.tensor([3, 4, 11, 12])).tolist() == [False, True, True, False]


def test_a_step_from_a_frame_that_is_gone_is_dropped():
    ring = buffer(4)
    old = ring.add_frames(*numbered(0, 2))
    new = ring.add_frames(*numbered(10, 4))
    ring.add_steps(
        torch.cat([old, new[:1]]),
        actions=torch.ones(3, 1),
        rewards=torch.ones(3),
        bootstrap=torch.ones(3, dtype=torch.bool),
        next_ids=torch.cat([new[:2], new[1:2]]),
    )
    assert transitions(ring) == {10: pytest.approx((1.0, 1.0, 0.9, 11))}


def test_draws_are_uniform_and_repeatable():
    ring = buffer()
    add_episode(ring, 0, [0.0] * 5, terminated=True)
    add_episode(ring, 10, [0.0] * 5, terminated=True)
    batches = [
        ring.sample(10_000, gamma=GAMMA, generator=torch.Generator().manual_seed(seed)).state for seed in (0, 0, 1)
    ]
    _, counts = batches[0].unique(return_counts=True)
    assert len(counts) == 10 and counts.min() > 900 and counts.max() < 1100
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


def test_memory_is_bounded():
    ring = buffer(1_000_000, max_bytes=50_000)
    for first in range(0, 5000, 10):
        add_episode(ring, first, [0.0] * 9, terminated=False)
    assert 45_000 < ring.nbytes <= 50_000
    assert ring.capacity < 5000 and len(ring) <= ring.capacity
    with pytest.raises(ValueError, match=r"a frame of 2 x 3 tokens takes \d+ bytes, max_bytes=40"):
        add_episode(buffer(max_bytes=40), 0, [0.0], terminated=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tokens_are_stored_once_in_the_type_that_the_encoder_gives(dtype):
    """Tokens that do not fit float16, for which an encoder's `feature_dtype` is another, stay finite."""
    ring, copy = (buffer(10**6, max_bytes=10**6) for _ in range(2))
    features, state = random_features(10), torch.zeros(10, 1)
    tokens = (features.tokens * (1.0 if dtype == torch.float16 else 1e6)).to(dtype)
    features = replace(features, tokens=tokens)
    ring.fingerprint = "random"
    ids = ring.add_frames(features, state)
    copy.load_state_dict(json.loads(json.dumps(ring.state_dict())), ring.pieces(1 << 30))
    for each in (ring, copy):
        again, _ = each.frames(ids)
        assert again.tokens.dtype == dtype and torch.isfinite(again.tokens).all()
        assert torch.equal(again.tokens, tokens) and torch.equal(again.mask, features.mask)
    assert 0.95e6 < ring.nbytes <= 1e6


def test_longer_prompts_widen_the_ring():
    ring = buffer(6)
    add_episode(ring, 0, [1.0], terminated=False)
    features, state = numbered(10, 2, tokens=4)
    ring.add_episode(features, state, actions=-state[:-1], rewards=torch.ones(1), terminated=False)
    add_episode(ring, 20, [1.0], terminated=False)
    frames, _ = ring.frames(torch.tensor([0, 2, 4]))
    assert frames.mask.sum(1).tolist() == [2, 4, 2]
    assert [frames.tokens[i][frames.mask[i]].unique().tolist() for i in range(3)] == [[0], [10], [20]]


def test_features_of_another_encoder_are_refused():
    ring = buffer()
    with pytest.raises(ValueError, match="holds features of encoder e, these are of random"):
        ring.add_frames(random_features(2), None)


def test_what_does_not_fit_and_what_is_not_there():
    with pytest.raises(ValueError, match="capacity=1"):
        buffer(1)
    with pytest.raises(ValueError, match="5 frames at once do not fit into a buffer of 4"):
        buffer(4).add_frames(*numbered(0, 5))
    with pytest.raises(ValueError, match="no step to draw"):
        buffer().sample(2, gamma=GAMMA)


def fill(policy, kind, mode, *, rows, buffer_size=1000, **config):
    env, envs = scripted.make(kind, mode)
    torch.manual_seed(0)
    collector = RolloutCollector(policy, env, task="scripted")
    settings = SACfDConfig(gamma=GAMMA, buffer_size=buffer_size, **config)
    memory = LatentMemory(policy, num_envs=len(SCRIPT), table=INSTRUCTIONS, config=settings, seed=0)
    before = policy.encoder.num_frames
    for part in rows:
        for row in collector.steps(part):
            memory.add(row)
    return memory, collector, envs, policy.encoder.num_frames - before


def key(state):
    return tuple(np.round(np.asarray(state, dtype=np.float64), 4))


FRAMES = {
    key(observation(number, episode, t)["state"]): (number, episode, t)
    for number in range(len(SCRIPT))
    for episode in range(20)
    for t in range(script(number, episode)[0] + 1)
}


def check(policy, ring, envs, *, n_step=1, known=None):
    """Compare what the ring gives with the script; returns the frames acted on. A return ends where `known` does."""
    batch = ring.sample(3000, gamma=GAMMA, n_step=n_step, generator=torch.Generator().manual_seed(1))
    seen = set()
    for row in range(len(batch)):
        number, episode, t = FRAMES[key(batch.state[row])]
        if (number, episode, t) in seen:
            continue
        seen.add((number, episode, t))
        length, end = script(number, episode)
        steps = [k for k in range(t, min(t + n_step, length)) if known is None or (number, episode, k) in known]
        expected = sum(GAMMA ** (step - t) * scripted.reward(number, episode, step) for step in steps)
        last = steps[-1] + 1
        terminated = last == length and end in "TB"
        assert batch.rewards[row].item() == pytest.approx(expected, abs=1e-5)
        assert batch.discounts[row].item() == pytest.approx(0.0 if terminated else GAMMA ** len(steps))
        np.testing.assert_array_equal(batch.actions[row].numpy(), envs[number].received[episode][t])
        frames = [(batch.features[row], t)]
        if not terminated:
            frames.append((batch.next_features[row], last))
            assert FRAMES[key(batch.next_state[row])] == (number, episode, last)
        for features, time in frames:
            obs = {k: np.asarray(v)[None] for k, v in observation(number, episode, time).items()}
            torch.testing.assert_close(
                features.tokens, policy.encode(obs, [INSTRUCTIONS[number]]).tokens, atol=5e-3, rtol=1e-2
            )
    return seen


def all_steps(mode, rows):
    """What every env has gone through but for the latest step, whose next frame is not known yet."""
    truths = [Truth(number, rows, mode is AutoresetMode.NEXT_STEP) for number in range(len(SCRIPT))]
    return [[step for step in truth.steps if step.row < rows - 1] for truth in truths], truths


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(("kind", "n_step"), [("sync", 1), ("worker", 1), ("worker", 3)])
def test_transitions_are_those_of_the_script_in_any_autoreset_mode(policy, kind, mode, n_step):
    memory, collector, envs, frames = fill(policy, kind, mode, rows=(7, 1, 9))
    known, truths = all_steps(mode, 17)
    expected = {
        (truth.number, step.episode, step.t) for truth, steps in zip(truths, known, strict=True) for step in steps
    }
    assert check(policy, memory.online, envs, n_step=n_step, known=expected) == expected
    assert len(memory.online) == len(expected)
    # Once per row; a truncated episode's last frame is in no row unless the reset waits for a step of its own.
    cut = sum(step.done and not step.terminated for truth in truths for step in truth.steps)
    assert frames == 17 * len(SCRIPT) + (0 if mode is AutoresetMode.NEXT_STEP else cut)
    assert collector.num_env_steps == sum(len(truth.steps) for truth in truths)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_full_ring_gives_nothing_that_is_not_so(policy, mode):
    memory, _, envs, _ = fill(policy, "worker", mode, rows=(40,), buffer_size=20)
    found = check(policy, memory.online, envs)
    assert 8 < len(found) == len(memory.online) < 20
    assert min(episode for _, episode, _ in found) > 3


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_successes_become_demonstrations_without_being_encoded_again(policy, mode):
    memory, _, envs, frames = fill(policy, "worker", mode, rows=(17,), num_demos=1)
    known, truths = all_steps(mode, 17)
    expected = {
        (truth.number, step.episode)
        for truth, steps in zip(truths, known, strict=True)
        for step in steps
        if step.done and succeeds(truth.number, step.episode)
    }
    found = check(policy, memory.demos, envs)
    assert found == {(n, e, t) for n, e in expected for t in range(script(n, e)[0])}
    assert memory.num_demos == len(expected) > 4
    other, _, _, frames_without = fill(policy, "worker", mode, rows=(17,), num_demos=1, keep_successes=False)
    assert other.num_demos == 1 and frames == frames_without


def test_a_batch_is_half_demonstrations(policy):
    memory, _, _, _ = fill(policy, "worker", AutoresetMode.NEXT_STEP, rows=(17,), batch_size=400)
    batch, num_demos = memory.sample()
    assert (len(batch), num_demos) == (400, 200)
    front = {FRAMES[key(state)][:2] for state in batch.state[:200]}
    assert all(succeeds(number, episode) for number, episode in front)
    assert not all(succeeds(*FRAMES[key(state)][:2]) for state in batch.state[200:])
    empty, _, _, _ = fill(policy, "worker", AutoresetMode.NEXT_STEP, rows=(2,), batch_size=400)
    assert empty.sample()[1] == 0


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_terminated_step_leads_to_the_last_frame_where_a_row_shows_it(policy, mode):
    """So that novelty is that of the frame where a success ends; nothing of its value counts."""
    memory, _, _, _ = fill(policy, "worker", mode, rows=(17,))
    batch = memory.online.sample(3000, gamma=GAMMA, generator=torch.Generator().manual_seed(1))
    ends = (batch.discounts == 0).nonzero().squeeze(-1).tolist()
    assert len(ends) > 100
    for row in ends:
        number, episode, t = FRAMES[key(batch.state[row])]
        last = t + 1 if mode is AutoresetMode.NEXT_STEP else t
        assert FRAMES[key(batch.next_state[row])] == (number, episode, last)
