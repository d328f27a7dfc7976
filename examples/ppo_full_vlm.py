# docs: ../docs/scripts/ppo_full_vlm.md
"""The baseline of iRe-VLA (arXiv 2501.16664): PPO on the whole model, VLM and action head."""

import importlib.util
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    """Everything that can be set; see docs/scripts/ppo_full_vlm.md."""

    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = True
    """if toggled, cuda will be enabled by default"""
    track: bool = False
    """if toggled, this experiment will be tracked with Weights and Biases"""
    wandb_project_name: str = "vla-rl"
    """the wandb's project name"""
    wandb_entity: str | None = None
    """the entity (team) of wandb's project"""
    capture_video: bool = False
    """whether to capture videos of the agent performances (check out the `videos` folder)"""
    save_model: bool = False
    """whether to save the policy into the `runs/{run_name}/model` folder and to evaluate it from there"""

    # The environment
    env_id: str = "vla_rl_envs:VLA/Toy-v0"
    """the id of the environment"""
    task: str = ""
    """label of the RL task, `task` or `task:variant` (the environment's own if empty)"""
    image_size: int | None = None
    """height and width of the pictures (the environment's own if None)"""
    horizon: int | None = None
    """most steps in an episode (the environment's own if None)"""
    async_envs: bool = False
    """step every environment in a process of its own"""
    eval_episodes: int = 64
    """deterministic episodes before and after"""
    eval_seed: int = 10_000
    """reset seed of the first evaluation episode"""

    # The policy
    policy: str = tyro.MISSING
    """directory of the policy to start from, written by `sft_vlm.py --save-model` or by the library"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """precision of the VLM's matrix products (that of the saved policy if None)"""
    init_std: float = 0.3
    """standard deviation of the exploration at the start, in normalised action units"""

    # Algorithm specific arguments
    scope: Literal["lora", "all"] = "lora"
    """what learns beside the head: LoRA on the text model, or the whole VLM"""
    lora_rank: int = 16
    """rank of the LoRA weights; their alpha is twice this"""
    total_timesteps: int = 160_000
    """total timesteps of the experiments"""
    learning_rate: float = 1e-4
    """the learning rate of the actor's optimizer"""
    critic_learning_rate: float = 3e-4
    """the learning rate of the critic's optimizer"""
    num_envs: int = 32
    """the number of parallel game environments"""
    num_steps: int = 256
    """the number of steps to run in each environment per policy rollout"""
    gamma: float = 0.99
    """the discount factor gamma"""
    gae_lambda: float = 0.95
    """the lambda for the general advantage estimation"""
    update_epochs: int = 8
    """the K epochs to update the policy, at most"""
    minibatch_size: int = 2048
    """env steps per gradient step"""
    clip_coef: float = 0.2
    """the surrogate clipping coefficient"""
    vf_coef: float = 0.5
    """coefficient of the value function"""
    ent_coef: float = 0.0
    """coefficient of the entropy"""
    max_grad_norm: float = 0.5
    """the maximum norm for the gradient clipping, actor and critic apart"""
    target_kl: float | None = 0.05
    """above this KL of a minibatch the actor rests for the rest of the update; the critic goes on"""
    critic_warmup_iterations: int = 2
    """first iterations, in which the fresh critic learns alone"""
    converged_success: float = 0.95
    """stop early when the noisy success rate reaches this in two iterations after the other"""
    compile_mode: Literal["default", "reduce-overhead"] | None = None
    """mode of `torch.compile` for VLM and update ("reduce-overhead" uses CUDA graphs); None does without"""


def make_env(args: Args, label: str, idx: int, run_name: str):
    """Thunk of an environment with `Dict(image, state, task_id)` observations and `info["success"]`."""

    def thunk():
        task, _, variant = label.partition(":")
        settings = {"task": task, "variant": variant, "image_size": args.image_size, "horizon": args.horizon}
        given = {key: value for key, value in settings.items() if value}
        env = gym.make(args.env_id, render_mode="rgb_array", **given)
        if args.capture_video and idx == 0:
            env = gym.wrappers.RecordVideo(env, f"videos/{run_name}", name_prefix=label.replace(":", "-") or "rl-video")
        return gym.wrappers.RecordEpisodeStatistics(env)

    return thunk


def make_envs(args: Args, label: str, num_envs: int, run_name: str) -> gym.vector.VectorEnv:
    """Vector environment that resets in the step after an episode's end."""
    thunks = [make_env(args, label, i, run_name) for i in range(num_envs)]
    if args.async_envs:
        return gym.vector.AsyncVectorEnv(thunks, context="spawn", autoreset_mode="NextStep")
    return gym.vector.SyncVectorEnv(thunks, autoreset_mode="NextStep")


class VLM(nn.Module):
    """A VLM without its output layer, in eval mode: the last hidden states of its text model are the features."""

    def __init__(self, model: Any, processor: Any, dtype: str, source: str | None = None, lora: dict | None = None):
        super().__init__()
        self.model, self.processor, self.dtype = model, processor, dtype
        self.source, self.lora = source, lora  # where the base weights came from, None once they are our own
        self.model.requires_grad_(False).eval()
        self.output_layer = [model.get_output_embeddings()]  # in a list: no part of this module
        self.model.set_output_embeddings(nn.Identity())
        self.feature_dim = model.config.get_text_config().hidden_size
        self.prompts: dict[str, dict[str, Tensor]] = {}
        processor.tokenizer.padding_side = "right"
        for flag in ("do_image_splitting", "crop_to_patches"):  # one picture, one tile
            if hasattr(processor.image_processor, flag):
                setattr(processor.image_processor, flag, False)
        if "longest_edge" in (getattr(processor.image_processor, "max_image_size", None) or {}):
            processor.image_processor.size = dict(processor.image_processor.max_image_size)

    @classmethod
    def load(cls, name: str, dtype: str | None) -> "VLM":
        """From a hub id, a model directory, or a directory that `save` (or the library) wrote."""
        source = str(Path(name).resolve()) if name != "tiny" and Path(name).is_dir() else name
        settings: dict[str, Any] = {"source": source, "weights": False, "dtype": "float32", "lora": None}
        if (Path(name) / "encoder.json").is_file():
            settings |= json.loads((Path(name) / "encoder.json").read_text())
        path = f"{name}/model" if settings["weights"] else settings["source"]
        if path == "tiny" and (package := importlib.util.find_spec("vla_rl")):  # the VLM that comes with the library
            path = f"{package.submodule_search_locations[0]}/assets/tiny"
        base = {"prompt": "{instruction}", "layer": -1, "feature_dtype": "float16"}
        base |= dict.fromkeys(("truncate_layers", "quantization", "revision"))
        if unusual := [key for key, value in base.items() if settings.get(key, value) != value]:
            raise ValueError(f"the encoder in {name} has a {unusual[0]} of its own, which scripts do not know")
        model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        if settings["lora"]:
            model.load_adapter(f"{name}/adapter")
        processor = transformers.AutoProcessor.from_pretrained(path)
        source = None if settings["weights"] else settings["source"]
        return cls(model, processor, dtype or settings["dtype"], source, settings["lora"])

    def save(self, directory: Path) -> None:
        """Write settings, the adapter, and the base weights where they are our own."""
        directory.mkdir(parents=True)
        if self.lora is not None:
            self.model.save_pretrained(directory / "adapter")
        if self.source is None:
            self.model.set_output_embeddings(self.output_layer[0])
            state = self.model.state_dict().items()
            base = {name.replace(".base_layer.", "."): value for name, value in state if "lora_" not in name}
            self.model._hf_peft_config_loaded = False
            self.model.save_pretrained(directory / "model", state_dict=base)
            self.model._hf_peft_config_loaded = self.lora is not None
            self.model.set_output_embeddings(nn.Identity())
            self.processor.save_pretrained(directory / "model")
        settings = {"source": self.source, "weights": self.source is None, "lora": self.lora}
        settings |= {"dtype": self.dtype, "image_size": None}
        (directory / "encoder.json").write_text(json.dumps(settings, indent=2))

    def open(self, scope: str, lora_rank: int) -> list[nn.Parameter]:
        """Let the LoRA weights (added here if there are none), or everything, learn; returns what does."""
        if scope == "lora" and self.lora is None:
            import peft

            inside = set(self.model.get_decoder().modules())
            targets = [name for name, m in self.model.named_modules() if isinstance(m, nn.Linear) and m in inside]
            self.lora = {"r": lora_rank, "alpha": 2 * lora_rank}
            self.model.add_adapter(peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=targets))
            self.model.requires_grad_(False).eval()
        if scope == "all":
            self.source = None
        chosen = {"head": [], "lora": ["lora_"], "all": [""]}[scope]  # parts of names
        return [p.requires_grad_(True) for name, p in self.model.named_parameters() if any(x in name for x in chosen)]

    def prompt(self, instruction: str, image: np.ndarray) -> dict[str, Tensor]:
        """What the processor makes of an instruction and a picture, pixels included; once per instruction."""
        if instruction not in self.prompts:
            text, options = instruction, {}
            if self.processor.chat_template:
                conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}]
                text = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
                bos = self.processor.tokenizer.bos_token
                options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
            inputs = self.processor(images=[image], text=[text], return_tensors="pt", **options)
            self.prompts[instruction] = {name: value for name, value in inputs.items() if name != "labels"}
            ours, deviation = self.pixels(torch.as_tensor(image)[None]), min(self.processor.image_processor.image_std)
            if (ours - inputs["pixel_values"]).abs().max() > 1.01 / 255 / deviation:
                raise ValueError(f"pixels() differs from {type(self.processor).__name__} by more than a grey level")
        return self.prompts[instruction]

    def pixels(self, images: Tensor) -> Tensor:
        """The processor's `pixel_values` for uint8 `images` [B, H, W, 3], made on their device."""
        shape = next(iter(self.prompts.values()))["pixel_values"].shape[1:]
        processor, pixels = self.processor.image_processor, images.permute(0, 3, 1, 2).float()
        if pixels.shape[-2:] != shape[-2:]:
            mode = {1: "lanczos", 2: "bilinear"}.get(int(processor.resample), "bicubic")
            pixels = pixels.cpu() if mode == "lanczos" else pixels  # torch has that filter for the CPU alone
            for size in ((pixels.shape[-2], shape[-1]), shape[-2:]):  # as Pillow: rows, then columns, in whole levels
                pixels = F.interpolate(pixels, size=size, mode=mode, antialias=True).add(0.5).floor().clamp(0, 255)
        mean, std = torch.tensor([processor.image_mean, processor.image_std], device=images.device).view(2, 3, 1, 1)
        return ((pixels.to(images.device) * processor.rescale_factor - mean) / std).view(-1, *shape)

    def forward(self, images: np.ndarray | Tensor, instructions: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B, M, D] and mask [B, M] of pictures uint8 [B, H, W, 3], with gradients to what is open."""
        device = next(self.model.parameters()).device
        images = torch.as_tensor(images, device=device)
        names, rows = np.unique(instructions, return_inverse=True)
        prompts = [self.prompt(str(name), images[0].cpu().numpy()) for name in names]
        longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
        inputs = {}
        for key in prompts[0].keys() - {"pixel_values"}:
            pad = self.processor.tokenizer.pad_token_id or 0 if key == "input_ids" else 0
            values = [prompt[key] for prompt in prompts]
            if values[0].ndim == 2:
                values = [F.pad(value, (0, longest - value.shape[1]), value=pad) for value in values]
            inputs[key] = torch.cat(values)[rows].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            tokens = self.model(pixel_values=self.pixels(images), **inputs, use_cache=False).logits
        return tokens.float(), inputs["attention_mask"].bool()

    @torch.no_grad()
    def encode(self, obs: dict[str, np.ndarray], instructions: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (float16), mask and state of observations: what can be cached while the VLM is frozen."""
        tokens, mask = self(obs["image"], [instructions[i] for i in obs["task_id"]])
        return tokens.half(), mask, torch.as_tensor(obs["state"], device=tokens.device)


class TokenLearner(nn.Module):
    """Attention pooling with learned queries (Set Transformer): tokens [B, M, D] -> [B, num_queries * width]."""

    def __init__(self, feature_dim: int, *, width: int, num_queries: int, num_heads: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.keys_values = nn.Linear(feature_dim, 2 * width)
        self.queries = nn.Parameter(torch.randn(num_queries, width) / width**0.5)
        self.num_heads, self.output_dim = num_heads, num_queries * width

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Pool where `mask` [B, M] is True."""
        keys, values = self.keys_values(self.norm(tokens.float())).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        queries = self.queries.unflatten(1, (self.num_heads, -1))
        scores = torch.einsum("qhw,bmhw->bhqm", queries, keys) / queries.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
        return torch.einsum("bhqm,bmhw->bqhw", weights, values).flatten(1)


class Head(nn.Module):
    """Token learner, an MLP over the pooled tokens and the proprioceptive state, and a linear layer."""

    def __init__(self, feature_dim: int, output_dim: int, *, state_dim: int, hidden_dim: int, **pool: int):
        super().__init__()
        learner = TokenLearner(feature_dim, **pool)
        layers = [nn.Linear(learner.output_dim + state_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU()]
        mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, hidden_dim), nn.Tanh())
        self.body = nn.ModuleDict({"pool": learner, "mlp": mlp})
        self.mean = nn.Linear(hidden_dim, output_dim)

    def forward(self, tokens: Tensor, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, output_dim] and the latent [B, hidden_dim] that it is linear in, for normalised states."""
        latent = self.body["mlp"](torch.cat([self.body["pool"](tokens, mask), state], dim=-1))
        return self.mean(latent), latent


class Agent(nn.Module):
    """The action head and the critic on the VLM's tokens, and the normalisation of actions and states."""

    def __init__(self, *, action_dim: int, **shape: int):
        super().__init__()
        self.kwargs = {"action_dim": action_dim, **shape}
        self.head = Head(output_dim=action_dim, **shape)
        self.head.log_std = nn.Parameter(torch.full((shape["hidden_dim"], action_dim), -1.2))
        self.critic = Head(output_dim=1, **shape)
        nn.init.zeros_(self.critic.mean.weight)
        nn.init.zeros_(self.critic.mean.bias)
        for name, size in (("action", action_dim), ("state", shape["state_dim"])):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def normalize(self, state: Tensor) -> Tensor:
        """States of the environment [B, S] in the units of the demonstrations' deviations."""
        return (state - self.state_mean) / self.state_std

    def get_mean(self, tokens: Tensor, mask: Tensor, state: Tensor) -> Tensor:
        """Deterministic action in normalised units, [B, A], for states as the environment gives them."""
        return self.head(tokens, mask, self.normalize(state))[0]

    def env_action(self, action: Tensor) -> np.ndarray:
        """A normalised action in the environment's units and within its bounds."""
        return (action * self.action_std + self.action_mean).clamp(-1, 1).cpu().numpy()

    def get_value(self, tokens: Tensor, mask: Tensor, state: Tensor) -> Tensor:
        """Value of each frame, [B]."""
        return self.critic(tokens, mask, self.normalize(state))[0].squeeze(-1)

    def get_action_and_value(
        self, tokens: Tensor, mask: Tensor, state: Tensor, *, noise: Tensor | None = None, action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Action (drawn with `noise` [B, L, A] if not given), its log-probability, entropy and value.

        The Gaussian's noise is `latent @ matrix`, with a matrix that is kept for a whole episode (gSDE, Raffin et al.
        2021, arXiv 2005.05719): over matrices, its variance is `latent^2 @ std^2`.
        """
        mean, latent = self.head(tokens, mask, self.normalize(state))
        latent, scale = latent.detach(), self.head.log_std.exp()
        if action is None:
            action = mean + torch.einsum("bl,bla->ba", latent, noise * scale)
        probs = Normal(mean, (latent.square() @ scale.square() + 1e-8).sqrt())
        return action, probs.log_prob(action).sum(-1), probs.entropy().sum(-1), self.get_value(tokens, mask, state)

    @torch.no_grad()
    def start_exploration(self, tokens: Tensor, mask: Tensor, state: Tensor, std: float) -> None:
        """Set the size of the noise so that actions deviate by `std` on these frames."""
        latent = self.head(tokens, mask, self.normalize(state))[1]
        self.head.log_std.fill_(np.log(std) - 0.5 * torch.log(latent.square().sum(-1).mean() + 1e-8).item())


def save_policy(directory: Path, vlm: VLM, agent: Agent) -> None:
    """Write VLM and head so that `vla_rl.VLAPolicy.from_pretrained` reads them too."""
    vlm.save(directory / "encoder")
    tensors = {name: value.cpu() for name, value in agent.state_dict().items() if not name.startswith("critic.")}
    save_file(tensors, directory / "head.safetensors")
    head = {"class": "vla_rl.heads.gaussian:GaussianHead", "kwargs": agent.kwargs}
    (directory / "policy.json").write_text(json.dumps({"format": 1, "head": head}, indent=2))


def load_policy(directory: str | Path, dtype: str | None = None) -> tuple[VLM, Agent]:
    """Read what `save_policy` (or the library) wrote."""
    head = json.loads((Path(directory) / "policy.json").read_text())["head"]
    kwargs = {key: value for key, value in head["kwargs"].items() if key != "init_std"} | {"class": head["class"]}
    base = {"class": "vla_rl.heads.gaussian:GaussianHead", "exploration": "gsde", "pooler": "token_learner"}
    if unusual := [key for key, value in base.items() if kwargs.pop(key, value) != value]:
        raise ValueError(f"the {unusual[0]} of the head in {directory} is not {base[unusual[0]]}, all scripts know")
    agent = Agent(**kwargs)
    missing, unexpected = agent.load_state_dict(load_file(Path(directory) / "head.safetensors"), strict=False)
    if unexpected or not all(name.startswith("critic.") for name in missing):
        raise ValueError(f"the weights in {directory} do not fit: {missing} are missing, {unexpected} unknown")
    return VLM.load(f"{directory}/encoder", dtype), agent


def evaluate(args: Args, label: str, vlm: VLM, agent: Agent, run_name: str) -> np.ndarray:
    """Success (bool) of deterministic episodes with the seeds from `args.eval_seed` on."""
    num_envs = min(args.num_envs, args.eval_episodes)
    envs = make_envs(args, label, num_envs, run_name)
    instructions = envs.get_attr("instructions")[0]
    successes = []
    for seed in range(args.eval_seed, args.eval_seed + args.eval_episodes, num_envs):
        obs, _ = envs.reset(seed=seed)
        running, success = np.ones(num_envs, dtype=bool), np.zeros(num_envs, dtype=bool)
        while running.any():
            with torch.no_grad():
                action = agent.get_mean(*vlm.encode(obs, instructions))
            obs, _, terminated, truncated, infos = envs.step(agent.env_action(action))
            success |= running & infos["success"]
            running &= ~(terminated | truncated)
        successes.append(success)
    envs.close()
    return np.concatenate(successes)[: args.eval_episodes]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args = tyro.cli(Args)
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{args.task.replace(':', '-')}__{time.time_ns()}"
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_name}
        wandb.init(**names, sync_tensorboard=True, config=vars(args), monitor_gym=True, save_code=True)
    writer = SummaryWriter(f"runs/{run_name}")
    table = "".join(f"\n|{key}|{value}|" for key, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|{table}")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # TRY NOT TO MODIFY: seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic

    # model, with a fresh critic
    vlm, agent = (module.to(device) for module in load_policy(args.policy, args.dtype))
    if args.eval_episodes:
        success = evaluate(args, args.task, vlm, agent, f"{run_name}-before")
        writer.add_scalar("eval/success_rate", success.mean(), 0)
        print(f"before: success {success.mean():.3f} of {len(success)} deterministic episodes")
    opened = vlm.open(args.scope, args.lora_rank)
    groups = [{"params": [*agent.head.parameters(), *opened], "lr": args.learning_rate}]
    groups += [{"params": list(agent.critic.parameters()), "lr": args.critic_learning_rate}]
    optimizer = torch.optim.Adam(groups, eps=1e-5)
    generator = torch.Generator().manual_seed(args.seed)
    if args.compile_mode:
        vlm.model.compile(mode=args.compile_mode)
        agent.get_action_and_value = torch.compile(agent.get_action_and_value, mode=args.compile_mode)
        agent.get_value = torch.compile(agent.get_value, mode=args.compile_mode)

    # env setup
    envs = make_envs(args, args.task, args.num_envs, run_name)
    assert isinstance(envs.single_action_space, gym.spaces.Box), "only continuous action space is supported"
    instructions = envs.get_attr("instructions")[0]
    next_obs, _ = envs.reset(seed=args.seed)
    next_frame = vlm.encode(next_obs, instructions)  # tokens, mask, state
    agent.start_exploration(*next_frame, args.init_std)
    noise = torch.randn((args.num_envs, *agent.head.log_std.shape), device=device)

    next_valid = np.ones(args.num_envs, dtype=bool)
    episode_success, episode_length = np.zeros(args.num_envs, dtype=bool), np.zeros(args.num_envs, dtype=int)

    # TRY NOT TO MODIFY: start the game
    global_step, iteration, success_rates = 0, 0, []
    start_time = time.time()
    while global_step < args.total_timesteps:
        iteration += 1
        rows, images, task_ids, finished, episodic_returns = [], [], [], [], []
        for _ in range(args.num_steps):
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(*next_frame, noise=noise)
            obs = next_obs
            next_obs, reward, terminated, truncated, infos = envs.step(agent.env_action(action))
            done = terminated | truncated
            # the step after an episode's end is a reset, where the action counts for nothing: it is not valid
            facts = (reward.astype(np.float32), terminated, done, next_valid)
            rows.append((next_frame[2], action, logprob, value, *(torch.as_tensor(x, device=device) for x in facts)))
            images.append(torch.as_tensor(obs["image"]))
            task_ids.append(obs["task_id"])
            global_step += int(next_valid.sum())
            episode_length += next_valid
            episode_success |= next_valid & infos["success"]
            if done.any():
                finished += list(zip(episode_success[done], episode_length[done], strict=True))
                episodic_returns += list(infos["episode"]["r"][done])
                episode_success[done], episode_length[done] = False, 0
                noise[torch.as_tensor(done)] = torch.randn((done.sum(), *noise.shape[1:]), device=device)
            next_valid = ~done

            # the only pass of this frame through the VLM
            next_frame = vlm.encode(next_obs, instructions)
        states, actions, logprobs, values, rewards, terminations, dones, valid = (
            torch.stack(x) for x in zip(*rows, strict=True)
        )

        # bootstrap value if not terminated: after a truncation, next_value is that of the episode's last frame
        with torch.no_grad():
            next_values = torch.cat([values[1:], agent.get_value(*next_frame)[None]])
            advantages, lastgaelam = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
            for t in reversed(range(args.num_steps)):
                delta = rewards[t] + args.gamma * next_values[t] * ~terminations[t] - values[t]
                lastgaelam = valid[t] * (delta + args.gamma * args.gae_lambda * ~dones[t] * lastgaelam)
                advantages[t] = lastgaelam
            returns = advantages + values

        # flatten the batch
        b_states, b_actions, b_logprobs, b_values, b_returns, b_advantages = (
            x.flatten(0, 1) for x in (states, actions, logprobs, values, returns, advantages)
        )
        b_images, b_sentences = torch.cat(images), np.array(instructions)[np.concatenate(task_ids)]
        b_inds = valid.flatten().nonzero().squeeze(-1)
        b_advantages = (b_advantages - b_advantages[b_inds].mean()) / (b_advantages[b_inds].std() + 1e-8)

        # Optimizing the policy and value network
        losses: dict[str, list[float]] = {}
        actor_learns = iteration > args.critic_warmup_iterations
        for _ in range(args.update_epochs):
            for mb_inds in b_inds[torch.randperm(len(b_inds), generator=generator)].split(args.minibatch_size):
                index = mb_inds.cpu()
                with torch.set_grad_enabled(iteration > args.critic_warmup_iterations):
                    mb_tokens, mb_masks = vlm(b_images[index], list(b_sentences[index.numpy()]))
                inputs = mb_tokens, mb_masks, b_states[mb_inds]
                if not actor_learns:
                    newvalue, actor_loss, record = agent.get_value(*inputs), None, {}
                else:
                    _, newlogprob, entropy, newvalue = agent.get_action_and_value(*inputs, action=b_actions[mb_inds])
                    logratio = newlogprob - b_logprobs[mb_inds]
                    ratio = logratio.exp()

                    # Policy loss
                    pg_loss1 = -b_advantages[mb_inds] * ratio
                    pg_loss2 = -b_advantages[mb_inds] * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
                    actor_loss = pg_loss - args.ent_coef * entropy.mean()

                    approx_kl = ((ratio - 1) - logratio).mean()  # http://joschu.net/blog/kl-approx.html
                    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                    record = {"policy_loss": pg_loss, "entropy": entropy.mean(), "clipfrac": clipfrac}
                    record |= {"old_approx_kl": (-logratio).mean(), "approx_kl": approx_kl}
                    actor_learns = args.target_kl is None or approx_kl.item() <= args.target_kl

                # Value loss
                v_loss = 0.5 * ((newvalue - b_returns[mb_inds]) ** 2).mean()
                for key, figure in (record | {"value_loss": v_loss}).items():
                    losses.setdefault(key, []).append(figure.item())
                loss = args.vf_coef * v_loss + (actor_loss if actor_learns else 0.0)
                if not torch.isfinite(loss):
                    raise RuntimeError(f"the loss is {loss.item()}; lower the learning rate or check the rewards")

                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for group in optimizer.param_groups:
                    nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
                optimizer.step()
                if iteration > args.critic_warmup_iterations and not actor_learns:
                    break  # the critic alone is not worth further passes through the VLM
            if iteration > args.critic_warmup_iterations and not actor_learns:
                break
        next_frame = vlm.encode(next_obs, instructions)  # the VLM has changed

        # episodes still running that are longer than any success count as failures: short ones end first
        solved = [length for success, length in finished if success]
        longer = (episode_length > max(solved)).sum() if solved else 0
        success_rates.append(len(solved) / (len(finished) + longer) if finished else float("nan"))

        # TRY NOT TO MODIFY: record rewards for plotting purposes
        error, var_y = (b_returns - b_values)[b_inds].var().item(), b_returns[b_inds].var().item()
        metrics = {f"losses/{name}": np.mean(figures) for name, figures in losses.items()}
        metrics["losses/explained_variance"] = 1 - error / var_y if var_y else np.nan
        metrics |= {"charts/success_rate": success_rates[-1], "charts/learning_rate": optimizer.param_groups[0]["lr"]}
        metrics["charts/SPS"] = sps = int(global_step / (time.time() - start_time))
        if finished:
            metrics["charts/episodic_return"] = np.mean(episodic_returns)
            metrics["charts/episodic_length"] = np.mean([length for _, length in finished])
        for tag, figure in metrics.items():
            writer.add_scalar(tag, figure, global_step)
        print(f"global_step={global_step}, noisy success={success_rates[-1]:.2f}, SPS={sps}")
        learned = iteration >= args.critic_warmup_iterations + 2
        if learned and all(rate >= args.converged_success for rate in success_rates[-2:]):
            break
    envs.close()

    if args.save_model:
        model_path = Path(f"runs/{run_name}/model")
        save_policy(model_path, vlm, agent)
        print(f"model saved to {model_path}")
        vlm, agent = (module.to(device) for module in load_policy(model_path))
    if args.eval_episodes:
        success = evaluate(args, args.task, vlm, agent, f"{run_name}-after")
        writer.add_scalar("eval/success_rate", success.mean(), global_step)
        print(f"after: success {success.mean():.3f} of {len(success)} deterministic episodes")
    writer.close()
