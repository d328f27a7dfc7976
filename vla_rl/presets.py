"""Named experiments for `vla-rl train`, as plain data; every field can be overridden from the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vla_rl.config import IterativeConfig
from vla_rl.experiment import EnvConfig, ExperimentConfig, ModelConfig
from vla_rl.rl.exploration import ExplorationConfig
from vla_rl.rl.ppo import PPOConfig
from vla_rl.rl.sac import SACfDConfig
from vla_rl.sl.supervised import SLConfig

DEMO_EXPERT = (
    "button-press-topdown",
    "drawer-open",
    "drawer-close",
    "door-open",
    "window-open",
    "window-close",
)
DEMO_RL = ("drawer-open:unseen",)
DEMO_UNSEEN = ("drawer-open:new", "window-open:new", "window-close:new")

SKILL = ("door-close",)

METAWORLD_EXPERT = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
    "coffee-pull",
    "pick-out-of-hole",
    "disassemble",
    "pick-place-wall",
    "basketball",
    "stick-pull",
    "button-press-wall",
    "faucet-open",
    "door-lock",
    "lever-pull",
    "sweep-into",
    "faucet-close",
    "coffee-button",
    "button-press-topdown-wall",
    "dial-turn",
)
METAWORLD_RL = (
    "button-press-topdown:new",
    "drawer-open:new",
    "door-open:new",
    "window-open:new",
    "window-close:new",
)
METAWORLD_UNSEEN = (
    "button-press-topdown:unseen",
    "drawer-open:unseen",
    "door-open:unseen",
    "window-open:unseen",
    "window-close:unseen",
    "button-press",
    "reach-wall",
    "push-wall",
    "door-unlock",
    "handle-press",
)

KITCHEN_EXPERT = ("knob-on", "light-on", "microwave-open", "slide-door-open", "left-door-open")
KITCHEN_RL = ("slide-door-open:red",)
KITCHEN_UNSEEN = ("slide-door-open:yellow",)

METAWORLD_BASE = str(Path(__file__).parent / "assets" / "metaworld-base")
"""The stage 0 that ships with the package: what the preset of this name trained."""

PRESETS: dict[str, tuple[str, ExperimentConfig]] = {
    "toy": (
        "a dot that moves to a coloured square, no simulator: to see that the loop runs, too short to learn",
        ExperimentConfig(
            name="toy",
            expert_tasks=("reach-red", "reach-blue"),
            rl_tasks=("reach-red:new",),
            unseen_tasks=("reach-blue:new",),
            expert_episodes=60,
            env=EnvConfig(env_id="vla_rl_envs:VLA/Toy-v0", image_size=32, horizon=20),
            train=IterativeConfig(
                stage0=SLConfig(steps=150, scope="all", random_shift=0, batch_size=128),
                stage1=PPOConfig(total_timesteps=16_384, num_envs=16, rollout_steps=64, minibatch_size=512),
                stage2=SLConfig(steps=100, scope="lora", batch_size=128),
            ),
        ),
    ),
    "metaworld-base": (
        "stage 0 alone on the demo's six tasks, from `tiny`: makes the checkpoint that the demo starts from",
        ExperimentConfig(
            name="metaworld-base",
            expert_tasks=DEMO_EXPERT,
            rl_tasks=DEMO_RL,
            unseen_tasks=DEMO_UNSEEN,
            method="sft",
            expert_episodes=60,
            model=ModelConfig(vlm="tiny", init_std=0.2),
            train=IterativeConfig(stage0=SLConfig(steps=1500, scope="all", encoder_learning_rate=3e-4)),
        ),
    ),
    "metaworld-demo": (
        "the demo: six tasks, one new variant, from the shipped stage-0 checkpoint",
        ExperimentConfig(
            name="metaworld-demo",
            expert_tasks=DEMO_EXPERT,
            rl_tasks=DEMO_RL,
            unseen_tasks=DEMO_UNSEEN,
            expert_episodes=30,
            policy=METAWORLD_BASE,
            model=ModelConfig(vlm="tiny", init_std=0.2),
            train=IterativeConfig(
                stage0=SLConfig(steps=0, scope="all"),
                stage1=PPOConfig(
                    total_timesteps=50_000,
                    rollout_steps=64,
                    minibatch_size=512,
                    learning_rate=2e-5,
                    target_kl=0.03,
                    critic_warmup_updates=3,
                ),
                stage2=SLConfig(steps=400, scope="lora", learning_rate=5e-4, encoder_learning_rate=1e-3),
                eval_episodes=20,
            ),
        ),
    ),
    "metaworld": (
        "the paper's protocol with a hub VLM: 25 expert tasks x 50 episodes, 5 RL tasks, 10 unseen ones; wants a GPU",
        ExperimentConfig(
            name="metaworld",
            expert_tasks=METAWORLD_EXPERT,
            rl_tasks=METAWORLD_RL,
            unseen_tasks=METAWORLD_UNSEEN,
            expert_episodes=50,
            env=EnvConfig(image_size=128, horizon=500),
            model=ModelConfig(vlm="HuggingFaceTB/SmolVLM-256M-Instruct"),
            train=IterativeConfig(stage0=SLConfig(steps=20_000), eval_episodes=25, rl_eval_episodes=25),
        ),
    ),
}

_DEMO = PRESETS["metaworld-demo"][1]
_METAWORLD = PRESETS["metaworld"][1]
_BLIP2_SL = SLConfig(steps=20_000, batch_size=64, gradient_accumulation=2, offload=True, cache_dir="runs/cache")
_KITCHEN = EnvConfig(env_id="vla_rl_envs:VLA/FrankaKitchen-v0", image_size=128, horizon=280)

PRESETS |= {
    "metaworld-blip2": (
        "the paper's protocol with its VLM, BLIP-2 (OPT 2.7B), LoRA on the top quarter of the text layers; wants a GPU "
        "of 24 GB",
        replace(
            _METAWORLD,
            name="metaworld-blip2",
            env=replace(_METAWORLD.env, image_size=224),
            model=ModelConfig(
                vlm="Salesforce/blip2-opt-2.7b",
                prompt="Question: what should the robot do to {instruction}? Answer:",
                lora_top_layers=8,
            ),
            train=replace(_METAWORLD.train, stage0=_BLIP2_SL, stage2=replace(_BLIP2_SL, steps=SLConfig().steps)),
        ),
    ),
    "metaworld-skill": (
        "a skill that no demonstration shows and the shipped stage 0 never has success at, by a start-state curriculum",
        replace(
            _DEMO,
            name="metaworld-skill",
            rl_tasks=SKILL,
            unseen_tasks=(),
            train=replace(
                _DEMO.train,
                stage1=replace(_DEMO.train.stage1, total_timesteps=120_000),
                exploration=ExplorationConfig(start_curriculum=True),
                stop_at_zero=False,
            ),
        ),
    ),
    "metaworld-reduced": (
        "the demo's six tasks and its training, two new variants one after the other, from the shipped stage 0: for "
        "comparing methods on a CPU",
        replace(
            _DEMO,
            name="metaworld-reduced",
            rl_tasks=("window-open:unseen", "drawer-open:unseen"),
            unseen_tasks=("window-open:new", "drawer-open:new", "window-close:new"),
            train=replace(
                _DEMO.train,
                sacfd=SACfDConfig(total_timesteps=_DEMO.train.stage1.total_timesteps),
                eval_episodes=34,
                rl_eval_episodes=34,
            ),
        ),
    ),
    "metaworld-tiny": (
        "the paper's split (25 expert tasks x 50 episodes, 5 RL tasks, 10 unseen ones) from `tiny`, with the demo's "
        "training after a stage 0 of its own: hours on a CPU",
        replace(
            _DEMO,
            name="metaworld-tiny",
            expert_tasks=METAWORLD_EXPERT,
            rl_tasks=METAWORLD_RL,
            unseen_tasks=METAWORLD_UNSEEN,
            expert_episodes=50,
            policy=None,
            train=replace(
                _DEMO.train,
                stage0=replace(PRESETS["metaworld-base"][1].train.stage0, steps=3000),
                sacfd=SACfDConfig(total_timesteps=_DEMO.train.stage1.total_timesteps),
                eval_episodes=34,
                rl_eval_episodes=34,
            ),
        ),
    ),
    "kitchen": (
        "the paper's seven Franka Kitchen tasks with a hub VLM: five expert tasks, the red slide door, the yellow one "
        "unseen; wants a GPU",
        ExperimentConfig(
            name="kitchen",
            expert_tasks=KITCHEN_EXPERT,
            rl_tasks=KITCHEN_RL,
            unseen_tasks=KITCHEN_UNSEEN,
            expert_episodes=50,
            expert_noise=0.1,
            env=_KITCHEN,
            model=ModelConfig(vlm="HuggingFaceTB/SmolVLM-256M-Instruct"),
            train=IterativeConfig(
                stage0=SLConfig(steps=20_000),
                sacfd=SACfDConfig(total_timesteps=PPOConfig().total_timesteps),
                eval_episodes=34,
                rl_eval_episodes=34,
            ),
        ),
    ),
    "kitchen-reduced": (
        "the same seven tasks from `tiny`, on a CPU; RL on the knob, as its stage 0 opens doors of any colour already",
        ExperimentConfig(
            name="kitchen-reduced",
            expert_tasks=KITCHEN_EXPERT,
            rl_tasks=("knob-on",),
            unseen_tasks=KITCHEN_RL + KITCHEN_UNSEEN,
            expert_episodes=30,
            expert_noise=0.1,
            env=replace(_KITCHEN, image_size=64),
            model=ModelConfig(vlm="tiny", init_std=0.03),
            train=IterativeConfig(
                stage0=SLConfig(steps=1500, scope="all", encoder_learning_rate=3e-4),
                stage1=replace(_DEMO.train.stage1, learning_rate=3e-6),
                sacfd=SACfDConfig(total_timesteps=_DEMO.train.stage1.total_timesteps),
                stage2=_DEMO.train.stage2,
                eval_episodes=34,
                rl_eval_episodes=34,
            ),
        ),
    ),
}
