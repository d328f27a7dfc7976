"""SIGTERM within a stage 1: it goes on with what it had learned, found and spent, and the same way every time."""

import copy
import shutil
import signal
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from stopped_stages import (
    EPISODES,
    HORIZON,
    MODES,
    NUM_ENVS,
    PPO,
    SAC,
    act,
    head_of,
    in_part,
    names,
    newest,
    same,
    same_episodes,
)
from tiny import differing, parameters, tiny_policy

from vla_rl.preemption import put_off_sigterm, stop_on_sigterm
from vla_rl.rl import snapshots as snapshots_module
from vla_rl.rl import stage1
from vla_rl.rl.exploration import ExplorationConfig, ExtraReward
from vla_rl.rl.rollout import RolloutCollector
from vla_rl.rl.sac_learner import SACLearner
from vla_rl.rl.snapshots import StageSnapshots
from vla_rl.rl.stage1_sac import LatentMemory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Each kind of stage 1, stopped in its middle."""
    runs = {}
    for mode, sigterm_at in (("ppo", 14), ("whole", 14), ("sac", 36), ("collect", 7)):
        folder = tmp_path_factory.mktemp(mode) / "stage"
        runs[mode] = act(mode, folder, sigterm_at=sigterm_at), folder
        assert runs[mode][0].result is None and len(names(folder)) == 1
    return runs


@pytest.fixture
def again(stopped, tmp_path):
    def go_on(mode, name="copy", **more):
        if not (tmp_path / name).exists():
            shutil.copytree(stopped[mode][1], tmp_path / name)
        return act(mode, tmp_path / name, **more)

    return go_on


@pytest.mark.parametrize("mode", MODES)
def test_no_stage_without_sigterm_writes_anything(mode, tmp_path):
    folder = tmp_path / "stage"
    with_it, without = act(mode, folder), act(mode, None)
    assert not folder.exists()
    assert not differing(parameters(with_it.policy), parameters(without.policy))
    assert same_episodes(with_it.result.successes, without.result.successes)


@pytest.mark.parametrize("mode", MODES)
def test_it_goes_on_with_its_head_its_successes_and_its_budget(stopped, again, mode):
    first, folder = stopped[mode]
    state, tensors = newest(folder)
    steps = state["collector"]["num_env_steps"]
    assert steps > 0
    # The last finished update of PPO is the last line of its log; SAC's head may have learned since.
    left = head_of(first.log[-1][1] if mode in ("ppo", "whole") else parameters(first.policy))
    assert not differing(in_part("head", tensors), left)
    second = again(mode)
    assert "goes on after" in second.said[0] and f"{steps:,} env steps" in second.said[0]
    assert all(step > steps for step, _ in second.log)
    noted = len(state["record"]["outcomes"])
    assert second.result.num_episodes == noted + len(second.episodes)
    found = [episode for episode in [*first.episodes[:noted], *second.episodes] if episode.success]
    assert same_episodes(second.result.successes, found) and any(e.success for e in first.episodes[:noted])
    if mode == "collect":
        assert second.result.num_episodes == EPISODES
    else:
        budget, rollout = (SAC, SAC.rollout_steps) if mode == "sac" else (PPO, PPO.rollout_steps)
        assert budget.total_timesteps <= second.result.num_env_steps < budget.total_timesteps + rollout * NUM_ENVS
        spent = sum(episode.total_steps for episode in second.episodes)
        assert spent <= second.result.num_env_steps - steps < spent + 2 * NUM_ENVS * HORIZON
    assert second.result.num_vlm_frames >= second.result.num_env_steps


@pytest.mark.parametrize("mode", MODES)
def test_two_continuations_are_the_same_and_new_episodes_differ_from_those_before(stopped, again, mode):
    first, _ = stopped[mode]
    one, other = again(mode, "one"), again(mode, "other")
    assert not differing(parameters(one.policy), parameters(other.policy))
    assert same_episodes(one.episodes, other.episodes)
    assert replace(one.result, successes=[]) == replace(other.result, successes=[])
    assert one.resets[0] == other.resets[0] != first.resets[0] == 3
    assert not any(same_episodes([new], [old]) for new in one.episodes for old in first.episodes)


def watch_updates(monkeypatch, mode, look):
    """Call `look` with what learns before and after every update."""
    owner, name = (stage1, "ppo_update") if mode == "ppo" else (SACLearner, "update")
    original = getattr(owner, name)

    def update(*args, **kwargs):
        look("before", args, kwargs)
        result = original(*args, **kwargs)
        look("after", args, kwargs)
        return result

    monkeypatch.setattr(owner, name, update)


def test_ppo_learns_on_with_the_same_critic_moments_and_draws(stopped, tmp_path, monkeypatch):
    found = {"before": [], "after": []}

    def look(when, args, kwargs):
        policy, critic, optimizer = args[:3]
        parts = {"head": policy.head, "critic": critic, "optimizer": optimizer}
        state = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        found[when].append(state | {"draws": kwargs["generator"].get_state(), "warm": kwargs["train_actor"]})

    watch_updates(monkeypatch, "ppo", look)
    act("ppo", tmp_path / "stage", sigterm_at=14)
    left = found["after"][-1]
    assert left["optimizer"]["state"], "Adam has moments"
    number = len(found["after"])
    assert number == 2, "the rollout that SIGTERM came in was finished and learned from"
    second = act("ppo", tmp_path / "stage")
    begun = found["before"][number]
    assert begun.pop("warm") and left.pop("warm")
    assert same(begun, left)
    updates = len(found["after"])
    assert updates == number + len(second.log)
    assert abs(updates - len(act("ppo", None).log)) <= 1  # autoresets are no env steps: a rollout more or less


def buffer(memory):
    return [memory.num_demos, *(whole_ring(buffer) for buffer in (memory.online, memory.demos))]


def whole_ring(buffer):
    pieces = buffer.pieces(1 << 30)
    assert [piece["first"] for piece in pieces] == [0] * (buffer.num_added > 0)
    return buffer.state_dict() | {"arrays": pieces[0]["arrays"] if pieces else {}}


def test_sac_learns_on_with_the_same_critics_temperature_and_memory(tmp_path, monkeypatch):
    memories, collectors, begun, left, ids = [], [], [], [], []

    def remember(cls, instances):
        original = cls.__init__

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            instances.append(self)

        monkeypatch.setattr(cls, "__init__", init)

    def look(when, args, kwargs):
        learner = args[0]
        if when == "after":
            left[:] = [learner]
            ids.append(learner.num_updates)
            return
        if len(begun) > len(memories) - 1:  # the first of each part alone
            return
        begun.append(whole(learner))

    def whole(learner):
        parts = (learner.critic, learner.target, learner.critic_optimizer, learner.actor_optimizer)
        state = [copy.deepcopy(part.state_dict()) for part in (*parts, learner.temperature_optimizer)]
        state += [learner.temperature, learner.num_updates, parameters(learner.policy.head)]
        return state, copy.deepcopy(buffer(memories[-1])), collectors[-1].num_env_steps

    remember(LatentMemory, memories)
    remember(RolloutCollector, collectors)
    watch_updates(monkeypatch, "sac", look)
    act("sac", tmp_path / "stage", sigterm_at=36)
    assert ids[-1] > SAC.critic_warmup_updates + 10
    state, (num_demos, online, demos), _ = whole(left[0])
    assert num_demos > 0 and demos["num_added"] > 0
    second = act("sac", tmp_path / "stage")
    (_, _, first_step), (state_then, (more, online_then, demos_then), _) = begun
    assert same(state_then, state)
    assert more >= num_demos
    for then, now in ((online_then, online), (demos_then, demos)):
        kept = now["num_added"]
        assert then["num_added"] >= kept > 0
        for name in ("tokens", "mask", "state", "actions", "rewards", "bootstrap", "next", "valid"):
            assert torch.equal(then["arrays"][name][:kept], now["arrays"][name]), name
    # Every env step since learning began is paid for in updates once, whichever part it was collected in.
    learned_on = second.result.num_env_steps - first_step
    assert ids == list(range(1, len(ids) + 1)) and len(ids) == SAC.critic_warmup_updates + int(
        SAC.utd_ratio * learned_on
    )


@pytest.mark.parametrize("mode", MODES)
def test_sigterm_again_and_again(again, tmp_path, mode):
    state = newest_of(tmp_path / "copy", again, mode, sigterm_at=3)
    assert state["collector"]["num_env_steps"] > 0
    last = again(mode)
    assert last.result is not None
    budget = {"sac": SAC.total_timesteps, "collect": 0}.get(mode, PPO.total_timesteps)
    assert last.result.num_env_steps >= budget
    assert names(tmp_path / "copy")[-1].endswith("-001"), "the second snapshot is of the continuation"


def newest_of(folder, again, mode, **more):
    seen = again(mode, **more)
    assert seen.result is None
    return newest(folder)[0]


def test_nothing_is_written_before_the_first_update(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots_module, "put_off_sigterm", partial(put_off_sigterm, grace=0.1))
    seen = act("ppo", tmp_path / "stage", sigterm_at=2, on_episode=lambda: time.sleep(0.2))
    assert seen.result is None and not (tmp_path / "stage").exists()
    assert act("ppo", tmp_path / "stage").resets[0] == 3


def test_a_rollout_that_takes_too_long_is_broken_off_and_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots_module, "put_off_sigterm", partial(put_off_sigterm, grace=0.3))
    ended = []

    def slow():
        ended.append(1)
        if len(ended) > 14:
            time.sleep(0.4)

    first = act("ppo", tmp_path / "stage", sigterm_at=14, on_episode=slow)
    state, tensors = newest(tmp_path / "stage")
    assert state["update"] == 1 and state["collector"]["num_env_steps"] == first.log[-1][0]
    assert state["dropped"]["steps"] > 0 and state["dropped"]["episodes"] >= NUM_ENVS
    assert not differing(in_part("head", tensors), head_of(first.log[-1][1]))
    second = act("ppo", tmp_path / "stage")
    assert f"{state['dropped']['steps']} env steps since the last update" in second.said[0]
    assert second.result.num_env_steps >= PPO.total_timesteps


def test_an_update_that_takes_too_long_is_as_if_it_had_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots_module, "put_off_sigterm", partial(put_off_sigterm, grace=0.3))
    original, updates = stage1.ppo_update, []

    def slow(policy, *args, **kwargs):
        result = original(policy, *args, **kwargs)
        updates.append(parameters(policy.head))
        if len(updates) == 2:
            time.sleep(5)
        return result

    monkeypatch.setattr(stage1, "ppo_update", slow)
    first = act("ppo", tmp_path / "stage", sigterm_at=14)
    state, tensors = newest(tmp_path / "stage")
    head = {name.removeprefix("/head/"): value for name, value in tensors.items() if name.startswith("/head/")}
    assert state["update"] == 1 and not differing(head, updates[0])
    assert differing(head, parameters(first.policy.head)), "the second update has changed it by then"


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "checksums.json"])
def test_a_damaged_snapshot_begins_the_stage_again(stopped, tmp_path, file):
    shutil.copytree(stopped["ppo"][1], tmp_path / "stage")
    path = next((tmp_path / "stage").glob("step*")) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"is damaged .*; going on from the beginning of the stage"):
        seen = act("ppo", tmp_path / "stage")
    whole = act("ppo", None)
    assert seen.said == [] and seen.resets[0] == 3
    assert not differing(parameters(seen.policy), parameters(whole.policy))


def test_a_damaged_one_gives_way_to_the_one_before(again, tmp_path):
    again("ppo", sigterm_at=3)
    older, newer = names(tmp_path / "copy")
    (tmp_path / "copy" / newer / "state.json").unlink()
    with pytest.warns(UserWarning, match=f"{newer} is damaged .*; going on from .*{older}"):
        assert again("ppo").result is not None


def test_who_handles_sigterm_otherwise_is_told_that_nothing_will_be_written(tmp_path):
    snapshots = StageSnapshots(tmp_path / "stage")
    with stop_on_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init() does
        told = pytest.warns(UserWarning, match="stage gets no snapshot: .*after whatever else takes the signal")
        with told, snapshots.on_sigterm():
            pass


def test_one_of_another_stage_is_refused(tmp_path):
    act("ppo", tmp_path / "stage", sigterm_at=14, of={"config": asdict(PPO), "policy": "a"})
    with pytest.raises(ValueError, match="was begun with another policy; go on with the same, or remove it"):
        act("ppo", tmp_path / "stage", of={"config": asdict(PPO), "policy": "b"})


def test_a_vlm_that_learns_goes_on_with_its_weights(stopped, again, monkeypatch):
    first, folder = stopped["whole"]
    left, untrained = first.log[-1][1], parameters(tiny_policy(init_std=1.0))
    changed = {name for name in differing(untrained, left) if name.startswith("encoder.")}
    assert len(changed) > 10
    saved = in_part("vlm", newest(folder)[1]).values()
    assert {tensor.sum().item() for tensor in saved} >= {left[name].sum().item() for name in changed}
    begun = []
    collect = RolloutCollector.collect

    def look(self, *args, **kwargs):
        begun.append(parameters(self.policy))
        return collect(self, *args, **kwargs)

    monkeypatch.setattr(RolloutCollector, "collect", look)
    again("whole")
    assert not differing(begun[0], left)


@pytest.mark.parametrize("mode", ["ppo", "sac"])
def test_curricula_novelty_and_classifier_go_on(tmp_path, monkeypatch, mode):
    exploration = ExplorationConfig(start_curriculum=True, rnd_coef=0.1, shaping_coef=0.1)
    extras, original = [], ExtraReward.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        extras.append(self)

    monkeypatch.setattr(ExtraReward, "__init__", remember)
    act(mode, tmp_path / "stage", sigterm_at=20, exploration=exploration)
    state, _ = newest(tmp_path / "stage")
    left = extras[0].state_dict()
    assert left["num_positives"] and left["novelty"]["moments"][0] > 0
    frontiers = [each["frontier"] for each in state["curriculum"]]
    assert min(frontiers) < 1
    found = {}
    collect = RolloutCollector.steps

    def look(self, *args, **kwargs):
        if not found:
            found["frontiers"] = list(self.env.get_attr("frontier"))
            found["extra"] = copy.deepcopy(extras[1].state_dict())
        return collect(self, *args, **kwargs)

    monkeypatch.setattr(RolloutCollector, "steps", look)
    act(mode, tmp_path / "stage", exploration=exploration)
    assert found["frontiers"] == frontiers
    assert same(found["extra"], left)
