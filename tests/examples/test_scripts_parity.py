"""Scripts and library, from the same weights, data and seeds: the same losses."""

import runpy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from scripts import EXAMPLES, SMALL_HEAD, run_script, scalars
from tiny import HEAD, tiny_encoder, tiny_policy, toy_env

from vla_rl import EpisodeStore, FrozenVLMEncoder, GaussianHead, VLAPolicy
from vla_rl.data import BalancedSampler, compute_statistics
from vla_rl.heads import ValueHead
from vla_rl.rl import stage1_sac
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.sac import SACfDConfig
from vla_rl.rl.sac_learner import SACLearner
from vla_rl.rl.stage1 import run_ppo
from vla_rl.sl.supervised import SLConfig, train_supervised

SEED = 3


def new_envs(num_envs):
    mode = gym.vector.AutoresetMode.NEXT_STEP
    return gym.vector.SyncVectorEnv([lambda: toy_env("reach-red:new")] * num_envs, autoreset_mode=mode)


def skip_first_draw(head):
    """The collector draws noise once more than the script, before the size of the exploration is set."""
    draw, calls = head.draw_noise, []

    def draw_noise(num_envs):
        calls.append(num_envs)
        return draw(num_envs) if len(calls) > 1 else torch.zeros(num_envs, *head.log_std.shape)

    head.draw_noise = draw_noise


@pytest.fixture(scope="module")
def saved_policy(tmp_path_factory, expert_path):
    path = tmp_path_factory.mktemp("policy") / "sft"
    tiny_policy(statistics=compute_statistics([EpisodeStore(expert_path, mode="r")])).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vlm") / "encoder"
    tiny_encoder().save_pretrained(path)
    return path


@pytest.mark.parametrize("scope", ["all", "head"])
def test_sft(scope, encoder_path, expert_path, tmp_path, monkeypatch):
    options = (
        f"--demos {expert_path} --vlm {encoder_path} --dtype float32 --scope {scope} --total-timesteps 41 "
        f"--batch-size 16 --random-shift 2 --learning-rate 1e-2 --seed {SEED} --eval-episodes 0 {SMALL_HEAD}"
    )
    ours = scalars(tmp_path, run_script(monkeypatch, tmp_path, "sft_vlm.py", options))["losses/bc_loss"]

    store = EpisodeStore(expert_path, mode="r")
    encoder = FrozenVLMEncoder.from_pretrained(encoder_path, dtype=torch.float32)
    torch.manual_seed(SEED)
    head = GaussianHead(encoder.feature_dim, 2, state_dim=2, **HEAD)
    policy = VLAPolicy(encoder, head, statistics=compute_statistics([store]))
    config = SLConfig(steps=41, batch_size=16, scope=scope, learning_rate=1e-2, random_shift=2)
    theirs = {}
    train_supervised(
        policy, BalancedSampler([store], batch_size=16, seed=SEED), config=config, seed=SEED, on_step=theirs.__setitem__
    )
    assert [step for step, _ in ours] == [0, 20, 40]
    assert ours[0][1] > 1.2 * ours[-1][1]
    # Frozen features are cached in float16 by the library, and made anew in float32 by the script.
    np.testing.assert_allclose(
        [v for _, v in ours], [theirs[s] for s, _ in ours], rtol=1e-3 if scope == "all" else 5e-3
    )


@pytest.mark.parametrize(
    ("name", "scope"), [("ppo_frozen_vlm.py", "head"), ("ppo_full_vlm.py", "all"), ("ire_vla_metaworld.py", "head")]
)
def test_ppo(name, scope, saved_policy, expert_path, tmp_path, monkeypatch):
    whole = name == "ire_vla_metaworld.py"
    options = (
        f"--policy {saved_policy} --num-envs 4 --num-steps 48 --total-timesteps 500 "
        f"--update-epochs 2 --minibatch-size 64 --critic-warmup-iterations 1 --learning-rate 1e-3 "
        f"--target-kl 0.02 --seed {SEED} --dtype float32 --init-std 1.0 "
    )
    if whole:
        options += (
            f"--env-id vla_rl_envs:VLA/Toy-v0 --rl-tasks reach-red:new --unseen-tasks reach-blue --eval-episodes 1 "
            f"--demos {expert_path} --stage2.steps 1 --stage2.batch-size 8 --lora-rank 2"
        )
    else:
        options += "--task reach-red:new --eval-episodes 0" + ("" if scope == "head" else f" --scope {scope}")
    ours = scalars(tmp_path, run_script(monkeypatch, tmp_path, name, options))

    policy = VLAPolicy.from_pretrained(saved_policy)
    policy.head.init_std = 1.0
    skip_first_draw(policy.head)
    torch.manual_seed(SEED)
    GaussianHead(**policy.head.config())  # the script makes a head before its critic
    if whole:  # and both anew for the RL task
        ValueHead(policy.encoder.feature_dim, state_dim=2, **HEAD)
        GaussianHead(**policy.head.config())
    config = PPOConfig(
        total_timesteps=500, num_envs=4, rollout_steps=48, update_epochs=2, minibatch_size=64,
        critic_warmup_updates=1, learning_rate=1e-3, target_kl=0.02,
    )  # fmt: skip
    logged = []
    result = run_ppo(
        policy, new_envs(4), task="reach-red:new", config=config, scope=scope, seed=SEED,
        log=lambda metrics, step: logged.append((step, metrics)),
    )  # fmt: skip
    assert len(logged) == 3 and result.num_episodes > 20
    for tag, values in ours.items():
        if tag in ("charts/SPS", "charts/episodic_return", "charts/episodic_length", "losses/bc_loss") or "eval" in tag:
            continue
        theirs = [(step, metrics[tag]) for step, metrics in logged if tag in metrics]
        assert [step for step, _ in values] == [step for step, _ in theirs]
        np.testing.assert_allclose([v for _, v in values], [v for _, v in theirs], rtol=2e-3, atol=2e-5, err_msg=tag)
    assert ours["losses/approx_kl"][-1][1] > 1e-4  # the actor did learn


def test_sacfd(saved_policy, tmp_path, monkeypatch):
    shared = {"total_timesteps": 600, "num_envs": 4, "learning_starts": 150, "utd_ratio": 0.25, "batch_size": 32}
    options = "".join(f" --{key.replace('_', '-')} {value}" for key, value in shared.items())
    options += (
        f" --policy {saved_policy} --task reach-red:new --num-steps 8 --critic-warmup-updates 10 --init-std 1.0 "
        f"--num-lookahead 3 --policy-lr 1e-3 --seed {SEED} --eval-episodes 0"
    )
    ours = scalars(tmp_path, run_script(monkeypatch, tmp_path, "sacfd_latent.py", options))

    policy = VLAPolicy.from_pretrained(saved_policy)
    policy.head.init_std = 1.0
    skip_first_draw(policy.head)
    config = SACfDConfig(**shared, critic_warmup_updates=10, n_step=3, learning_rate=1e-3)
    torch.manual_seed(SEED)
    GaussianHead(**policy.head.config())  # the script makes an agent before its critics, and these before the noise
    weights = SACLearner(policy, config=config).critic.state_dict()

    def learner(policy, *, config):
        with torch.random.fork_rng():
            made = SACLearner(policy, config=config)
        made.critic.load_state_dict(weights)
        made.target.load_state_dict(weights)
        return made

    monkeypatch.setattr(stage1_sac, "SACLearner", learner)
    logged = []
    result = stage1_sac.run_sac(
        policy, new_envs(4), task="reach-red:new", config=config, seed=SEED,
        log=lambda metrics, step: logged.append((step, metrics)),
    )  # fmt: skip
    assert len(logged) > 5 and result.num_episodes > 15
    names = {
        "losses/qf_loss": "losses/value_loss",
        "losses/qf_values": "losses/q",
        "losses/actor_loss": "losses/policy_loss",
        "losses/alpha": "losses/temperature",
        "losses/entropy": "losses/entropy",
        "losses/bc_loss": "losses/bc_loss",
        "charts/demonstrations": "charts/demonstrations",
    }
    for tag, name in names.items():
        theirs = [(step, metrics[name]) for step, metrics in logged if name in metrics]
        assert [step for step, _ in ours[tag]] == [step for step, _ in theirs] and len(theirs) > 3
        np.testing.assert_allclose([v for _, v in ours[tag]], [v for _, v in theirs], rtol=3e-3, atol=1e-4, err_msg=tag)


@pytest.mark.parametrize("name", ["idefics3", "gemma3", "blip2_opt"])
def test_features_of_a_real_model_class(name, tmp_path):
    families = runpy.run_path(str(Path(__file__).parents[1] / "encoders" / "families.py"))
    path = families["FAMILIES"][name].save(tmp_path / name)
    images = np.random.default_rng(0).integers(0, 256, (2, families["SIZE"], families["SIZE"], 3), dtype=np.uint8)
    sentences = list(families["INSTRUCTIONS"][:2])
    vlm = runpy.run_path(str(EXAMPLES / "sft_vlm.py"), run_name="script")["VLM"].load(str(path), "float32")
    with torch.no_grad():
        tokens, mask = vlm(images, sentences)
    theirs = FrozenVLMEncoder.from_pretrained(path)
    theirs.feature_dtype = torch.float32
    features = theirs.encode(images, sentences)
    assert torch.equal(mask, features.mask) and vlm.feature_dim == theirs.feature_dim
    assert theirs.num_forwards == 1
    torch.testing.assert_close(tokens[mask], features.tokens[mask], rtol=1e-5, atol=1e-5)
    # Pictures that have to be resized, by Lanczos for Idefics 3 and SmolVLM.
    small = images[:, ::2, ::2]
    vlm.prompts.clear()
    expected = vlm.prompt(sentences[0], small[0])["pixel_values"]  # which compares ours with it
    difference = (vlm.pixels(torch.as_tensor(small[:1])) - expected).abs()
    level = 1 / 255 / min(vlm.processor.image_processor.image_std)
    assert difference.max() <= 1.01 * level and difference.mean() < 0.1 * level
