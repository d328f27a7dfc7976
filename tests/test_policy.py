import json

import numpy as np
import pytest
import torch
from tiny import HEAD, INSTRUCTIONS, parameters, tiny_encoder, tiny_policy

from vla_rl.data import BalancedSampler, Episode, EpisodeStore, Statistics
from vla_rl.encoders import LoRASettings
from vla_rl.heads import GaussianHead
from vla_rl.importing import import_path, load_object
from vla_rl.policy import VLAPolicy, stack_cameras

STATISTICS = Statistics(
    action_mean=np.array([0.2, -0.1], np.float32),
    action_std=np.array([0.5, 2.0], np.float32),
    state_mean=np.array([1.0, -1.0], np.float32),
    state_std=np.array([0.25, 4.0], np.float32),
    num_steps=10,
    num_episodes=1,
)


def observations(batch=3):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8),
        "state": rng.standard_normal((batch, 2)).astype(np.float32),
        "task_id": np.arange(batch) % 3,
    }


def scale_up(policy, factor=20.0):
    """Make the actions large, so that clipping is seen."""
    with torch.no_grad():
        policy.head.mean.weight.mul_(factor)
    return policy


def test_one_observation_gives_the_same_action_as_in_a_batch():
    policy = tiny_policy(statistics=STATISTICS)
    obs = observations()
    batch = policy.act(obs, INSTRUCTIONS)
    assert batch.shape == (3, 2) and batch.dtype == np.float32
    for i, sentence in enumerate(INSTRUCTIONS):
        single = policy.act({key: value[i] for key, value in obs.items()}, sentence)
        assert single.shape == (2,)
        np.testing.assert_allclose(single, batch[i], atol=2e-3)
    assert np.abs(batch[0] - batch[1]).max() > 0.01


def test_the_instruction_and_the_picture_and_the_state_matter(policy):
    obs = observations(1)
    base = policy.act(obs, INSTRUCTIONS[:1])
    changed = {
        "instruction": policy.act(obs, INSTRUCTIONS[1:2]),
        "image": policy.act({**obs, "image": 255 - obs["image"]}, INSTRUCTIONS[:1]),
        "state": policy.act({**obs, "state": obs["state"] + 1}, INSTRUCTIONS[:1]),
    }
    for name, action in changed.items():
        assert np.abs(action - base).max() > 1e-3, name
    np.testing.assert_array_equal(policy.act({**obs, "task_id": np.array([2])}, INSTRUCTIONS[:1]), base)


def test_normalisation_by_hand():
    policy = tiny_policy(statistics=STATISTICS)
    torch.testing.assert_close(policy.normalize_action([[0.7, 1.9]]), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(policy.normalize_state(np.array([[1.5, 7.0]])), torch.tensor([[2.0, 2.0]]))
    np.testing.assert_allclose(policy.env_action(torch.tensor([[1.0, -1.0]])), [[0.7, -2.1]], rtol=1e-6)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
    np.testing.assert_allclose(policy.env_action(policy.normalize_action(actions)), actions, atol=1e-6)


def test_the_action_is_the_mean_in_env_units_clipped():
    policy = scale_up(tiny_policy(statistics=STATISTICS))
    obs = observations(16)
    sentences = [INSTRUCTIONS[0]] * 16
    state = (torch.from_numpy(obs["state"]) - torch.tensor([1.0, -1.0])) / torch.tensor([0.25, 4.0])
    with torch.no_grad():
        mean = policy.head.predict(policy.encode(obs, sentences), state)
    raw = mean.numpy() * [0.5, 2.0] + [0.2, -0.1]
    action = policy.act(obs, sentences)
    assert (np.abs(raw) > 1).any() and (np.abs(raw) < 1).any()
    np.testing.assert_allclose(action, np.clip(raw, -1, 1), atol=1e-5)


def test_samples_scatter_around_the_mean_unless_the_noise_is_given():
    policy = tiny_policy(init_std=0.05)
    obs = observations(1)
    policy.head.start_exploration(policy.encode(obs, INSTRUCTIONS[:1]), policy.normalize_state(obs["state"]))
    torch.manual_seed(0)
    mean = policy.act(obs, INSTRUCTIONS[:1])
    samples = np.concatenate([policy.act(obs, INSTRUCTIONS[:1], deterministic=False) for _ in range(300)])
    np.testing.assert_allclose(samples.mean(0), mean[0], atol=0.015)
    np.testing.assert_allclose(samples.std(0), [0.05, 0.05], rtol=0.2)
    noise = policy.head.draw_noise(1)
    first, again = (policy.act(obs, INSTRUCTIONS[:1], deterministic=False, noise=noise) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_saved_policy_acts_the_same(tmp_path, lora, trained):
    policy = tiny_policy(statistics=STATISTICS)
    if lora:
        policy.encoder.add_lora(LoRASettings(r=2, alpha=4))
    if trained:
        with policy.encoder.trainable("lora" if lora else "all") as weights, torch.no_grad():
            for weight in weights:
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    policy.save_pretrained(tmp_path / "policy")
    again = VLAPolicy.from_pretrained(tmp_path / "policy")
    assert again.encoder.fingerprint == policy.encoder.fingerprint
    obs = observations()
    np.testing.assert_array_equal(again.act(obs, INSTRUCTIONS), policy.act(obs, INSTRUCTIONS))
    before, after = parameters(policy.head), parameters(again.head)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (again.encoder.lora is not None) == lora


def test_bfloat16_survives_saving(tmp_path):
    encoder = tiny_encoder(dtype=torch.bfloat16)
    policy = VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 2, state_dim=2, **HEAD))
    policy.save_pretrained(tmp_path / "policy")
    again = VLAPolicy.from_pretrained(tmp_path / "policy")
    assert again.encoder.compute_dtype == torch.bfloat16
    np.testing.assert_array_equal(again.act(observations(), INSTRUCTIONS), policy.act(observations(), INSTRUCTIONS))


class OtherHead(GaussianHead):
    """A head from anywhere."""


def test_a_head_from_another_module_comes_back_by_its_import_path(tmp_path):
    encoder = tiny_encoder()
    VLAPolicy(encoder, OtherHead(encoder.feature_dim, 2, **HEAD)).save_pretrained(tmp_path / "policy")
    again = VLAPolicy.from_pretrained(tmp_path / "policy")
    assert type(again.head) is OtherHead and not again.uses_state
    obs = observations(1)
    without = {key: value for key, value in obs.items() if key != "state"}
    np.testing.assert_array_equal(again.act(obs, INSTRUCTIONS[:1]), again.act(without, INSTRUCTIONS[:1]))


def test_saving_refuses_a_directory_in_use(tmp_path, policy):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        policy.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    policy.save_pretrained(tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "policy.json").read_text())["head"]["kwargs"]["action_dim"] == 2


def test_loading_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no policy\.json; give a directory written by save_pretrained"):
        VLAPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((3, 2), "2 action entries, the head was built for 3"), ((2, 5), "2 state entries, the head was built for 5")],
)
def test_statistics_of_another_size_are_refused(sizes, message):
    action_dim, state_dim = sizes
    encoder = tiny_encoder()
    head = GaussianHead(encoder.feature_dim, action_dim, state_dim=state_dim, **HEAD)
    with pytest.raises(ValueError, match=message):
        VLAPolicy(encoder, head, statistics=STATISTICS)


def test_a_missing_state_is_named(policy):
    obs = {"image": observations(1)["image"]}
    with pytest.raises(ValueError, match="no 'state'"):
        policy.act(obs, INSTRUCTIONS[:1])


def test_cameras_are_stacked_by_name():
    image = observations(2)["image"]
    assert stack_cameras({"image": image}) is image
    stacked = stack_cameras({"image_wrist": image, "image_front": 255 - image, "state": image})
    np.testing.assert_array_equal(stacked, np.stack([255 - image, image], axis=1))
    with pytest.raises(KeyError, match=r"no 'image'.*VLAObservation"):
        stack_cameras({"state": image})
    with pytest.raises(
        ValueError, match=r"share one size .*'image_b': \[32, 16, 3\]\}; give VLAObservation one image_size"
    ):
        stack_cameras({"image_a": image, "image_b": image[:, :, :16]})


def test_several_cameras_reach_the_encoder(policy):
    image = observations(2)["image"]
    obs = {"image_a": image, "image_b": 255 - image, "state": observations(2)["state"]}
    action = policy.act(obs, INSTRUCTIONS[:2])
    assert action.shape == (2, 2)
    other = policy.act({**obs, "image_b": image}, INSTRUCTIONS[:2])
    assert np.abs(action - other).max() > 1e-4


def test_import_paths():
    assert import_path(GaussianHead) == "vla_rl.heads.gaussian:GaussianHead"
    assert load_object("vla_rl.heads:GaussianHead") is GaussianHead
    for path in ("no_such_module:Thing", "vla_rl.heads:Nothing", "vla_rl.heads", ""):
        with pytest.raises(ValueError, match=r"cannot load .*'package\.module:Name'"):
            load_object(path)


def test_one_number_is_not_spread_over_all(policy):
    obs = observations()
    with pytest.raises(ValueError, match=r"the state is \[3, 1\], the head was built for 2"):
        policy.act({**obs, "state": obs["state"][:, :1]}, INSTRUCTIONS)
    with pytest.raises(ValueError, match=r"the action is \[3, 1\], the head was built for 2"):
        policy.normalize_action(np.zeros((3, 1)))


@pytest.mark.parametrize("names", [["image"], ["image_front", "image_wrist"]])
def test_one_instruction_for_a_batch_is_refused(policy, names):
    obs = observations()
    with pytest.raises(ValueError, match=r"one instruction for 'image.*' of 3 observations; give a list of 3"):
        policy.act({**dict.fromkeys(names, obs["image"]), "state": obs["state"]}, "reach the red square")


def test_a_head_of_another_width_or_without_a_size_is_refused():
    encoder = tiny_encoder()
    with pytest.raises(ValueError, match=f"of width 99, the encoder gives {encoder.feature_dim}"):
        VLAPolicy(encoder, GaussianHead(99, 2))

    class Sizeless(GaussianHead):
        def config(self):
            return {"feature_dim": encoder.feature_dim}

    with pytest.raises(ValueError, match=r"config\(\) of Sizeless holds \['feature_dim'\].*action_dim"):
        VLAPolicy(encoder, Sizeless(encoder.feature_dim, 2))


def test_a_head_that_no_other_program_can_import_is_told(tmp_path):
    class Local(GaussianHead):
        pass

    encoder = tiny_encoder()
    with pytest.warns(UserWarning, match="no other program can import .*Local"):
        VLAPolicy(encoder, Local(encoder.feature_dim, 2)).save_pretrained(tmp_path / "policy")


def test_a_picture_beside_that_of_a_named_camera_is_a_view_too(tmp_path):
    """What acts sees the views that supervised learning takes from a store."""
    rng = np.random.default_rng(0)
    shape = (3, 32, 32, 3)
    obs = {name: rng.integers(0, 256, shape, dtype=np.uint8) for name in ("image", "image_wrist")}
    obs |= {"state": np.zeros((3, 2), np.float32), "task_id": np.zeros(3, np.int64)}
    ends = np.array([False, True])
    episode = Episode(
        observations=obs, actions=np.zeros((2, 2), np.float32), rewards=np.zeros(2), terminations=ends,
        truncations=np.zeros(2, bool), success=True, source="expert", task="reach", instruction="go",
    )  # fmt: skip
    with EpisodeStore(tmp_path / "store", mode="w-") as store:
        store.append(episode)
        learned = BalancedSampler([store], batch_size=1, seed=0).rows([1]).images
    acted = stack_cameras({name: array[1:2] for name, array in obs.items()})
    np.testing.assert_array_equal(learned, acted)
    assert acted.shape == (1, 2, *shape[1:])
