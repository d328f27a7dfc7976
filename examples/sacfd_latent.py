# docs: ../docs/scripts/sacfd_latent.md
"""Stage 1 of iRe-VLA as on its real robot: SAC from demonstrations (SACfD) on cached features of a frozen VLM."""

import copy
import importlib.util
import json
import math
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
    """Everything that can be set; see docs/scripts/sacfd_latent.md."""

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
    total_timesteps: int = 20_000
    """total timesteps of the experiments"""
    num_envs: int = 16
    """the number of parallel game environments"""
    num_steps: int = 8
    """env steps per environment between updates"""
    num_demos: int = 20
    """successes of the policy as it comes that are gathered before anything learns; later ones join them"""
    learning_starts: int = 5_000
    """env steps, at most, to gather them in"""
    demo_fraction: float = 0.5
    """part of a batch from the demonstrations"""
    utd_ratio: float = 0.5
    """critic updates per env step"""
    policy_frequency: int = 2
    """critic updates per update of actor and temperature"""
    critic_warmup_updates: int = 500
    """first updates, in which the fresh critics learn alone"""
    batch_size: int = 256
    """the batch size of sample from the replay memory"""
    buffer_size: int = 100_000
    """frames in the replay memory, and as many again for the demonstrations"""
    gamma: float = 0.99
    """the discount factor gamma"""
    num_lookahead: int = 10
    """steps of the return that a target looks ahead"""
    tau: float = 0.005
    """target smoothing coefficient"""
    num_critics: int = 4
    """critics over one token learner"""
    num_min_critics: int = 2
    """random subset of the target critics whose minimum is the target"""
    q_lr: float = 3e-4
    """the learning rate of the Q network optimizer"""
    policy_lr: float = 1e-4
    """the learning rate of the policy network optimizer"""
    alpha_lr: float = 1e-3
    """the learning rate of the logarithm of the temperature"""
    alpha: float = 0.01
    """weight of the entropy at the start"""
    target_std: float = 0.15
    """the temperature keeps the entropy at that of a Gaussian of this deviation, in normalised action units"""
    bc_coef: float = 0.5
    """weight of behaviour cloning on the demonstrations"""
    max_grad_norm: float = 1.0
    """the maximum norm for the gradient clipping, actor and critics apart"""
    compile_mode: Literal["default", "reduce-overhead"] | None = None
    """mode of `torch.compile` for the VLM ("reduce-overhead" uses CUDA graphs); None does without"""


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


class EnsembleLinear(nn.Module):
    """E linear layers at once: [B, in] or [E, B, in] to [E, B, out]."""

    def __init__(self, num: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num, inputs, outputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.bias = nn.Parameter(torch.zeros(num, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Apply them."""
        return x @ self.weight + self.bias


class SoftQNetwork(nn.Module):
    """A token learner of the actor's shape, then E layer-normalised MLPs over it and the action (RLPD, 2302.02948)."""

    def __init__(
        self, num_critics: int, *, feature_dim: int, action_dim: int, state_dim: int, hidden_dim: int, **pool: int
    ):
        super().__init__()
        self.pool = TokenLearner(feature_dim, **pool)
        layers = [nn.Linear(self.pool.output_dim + state_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.Tanh()]
        self.latent = nn.Sequential(*layers)
        layers = [EnsembleLinear(num_critics, hidden_dim + action_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU()]
        layers += [EnsembleLinear(num_critics, hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU()]
        self.mlps = nn.Sequential(*layers, EnsembleLinear(num_critics, hidden_dim, 1))

    def embed(self, tokens: Tensor, mask: Tensor, state: Tensor) -> Tensor:
        """What the MLPs know of a frame, [B, L], for normalised states."""
        return self.latent(torch.cat([self.pool(tokens, mask), state], dim=-1))

    def forward(self, embedding: Tensor, action: Tensor) -> Tensor:
        """Q [E, B] of embedded frames and actions [B, A] as executed."""
        return self.mlps(torch.cat([embedding, action], dim=-1)).squeeze(-1)


class Project(torch.autograd.Function):
    """Clip to [-1, 1]; backwards, outside the box only the part of the gradient that leads back into it passes."""

    @staticmethod
    def forward(ctx: Any, action: Tensor) -> Tensor:
        """Clip."""
        ctx.save_for_backward(action)
        return action.clamp(-1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Drop what leads further out."""
        (action,) = ctx.saved_tensors
        return gradient.masked_fill(((action > 1) & (gradient < 0)) | ((action < -1) & (gradient > 0)), 0.0)


class Agent(nn.Module):
    """The action head on the VLM's tokens, and the normalisation of actions and states."""

    def __init__(self, *, action_dim: int, **shape: int):
        super().__init__()
        self.kwargs = {"action_dim": action_dim, **shape}
        self.head = Head(output_dim=action_dim, **shape)
        self.head.log_std = nn.Parameter(torch.full((shape["hidden_dim"], action_dim), -1.2))
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

    def get_action(self, tokens: Tensor, mask: Tensor, state: Tensor, noise: Tensor) -> Tensor:
        """Noisy action in normalised units; the noise is `latent @ matrix`, a matrix kept for an episode (gSDE)."""
        mean, latent = self.head(tokens, mask, self.normalize(state))
        return mean + torch.einsum("bl,bla->ba", latent, noise * self.head.log_std.exp())

    def get_distribution(self, tokens: Tensor, mask: Tensor, state: Tensor) -> Normal:
        """The Gaussian that `get_action` draws from, over noise matrices, in normalised units."""
        mean, latent = self.head(tokens, mask, self.normalize(state))
        return Normal(mean, (latent.detach().square() @ self.head.log_std.exp().square() + 1e-8).sqrt())

    def executed(self, action: Tensor) -> Tensor:
        """`env_action` with gradients: what the critics see."""
        return Project.apply(action * self.action_std + self.action_mean)

    @torch.no_grad()
    def start_exploration(self, tokens: Tensor, mask: Tensor, state: Tensor, std: float) -> None:
        """Set the size of the noise so that actions deviate by `std` on these frames."""
        latent = self.head(tokens, mask, self.normalize(state))[1]
        self.head.log_std.fill_(np.log(std) - 0.5 * torch.log(latent.square().sum(-1).mean() + 1e-8).item())


def padded(parts: list[Tensor]) -> list[Tensor]:
    """Parts [B, M, ...] with zeros up to the longest M, since prompts differ in length; as they are if none differs."""
    if len({x.shape[1:] for x in parts}) == 1:
        return parts
    longest = max(x.shape[1] for x in parts)
    return [torch.cat([x, x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])], dim=1) for x in parts]


class LatentBuffer:
    """A ring of frames and the steps taken from them; the frame that followed row i is in row i + `stride`.

    Under NEXT_STEP autoreset that holds for the last step of an episode too.
    """

    def __init__(self, size: int, stride: int):
        self.size, self.stride, self.count = size // stride * stride, stride, 0
        self.data: dict[str, Tensor] = {}

    def add(self, rows: dict[str, Tensor]) -> None:
        """Append rows, in the order of time (and of environment within a step)."""
        length = len(rows["reward"])
        if not self.data:
            self.data = {
                key: torch.zeros((self.size, *x.shape[1:]), dtype=x.dtype, device=x.device) for key, x in rows.items()
            }
        slots = torch.arange(self.count, self.count + length) % self.size
        for key, value in rows.items():
            self.data[key], value = padded([self.data[key], value])
            self.data[key][slots] = value
        self.count += length

    def sample(self, batch_size: int, gamma: float, num_steps: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Steps drawn uniformly, each followed for up to `num_steps` or to its episode's end."""
        data, newest = self.data, self.count - self.stride  # the newest rows have no next frame yet
        rows = torch.arange(max(0, self.count - self.size), newest)
        rows = rows[data["valid"][rows % self.size].cpu()]
        row = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
        first, rewards, discounts = row % self.size, 0.0, torch.ones(batch_size, device=data["reward"].device)
        going = torch.ones_like(discounts, dtype=torch.bool)
        for _ in range(num_steps):
            slot = row % self.size
            rewards = rewards + torch.where(going, discounts * data["reward"][slot], 0.0)
            discounts = torch.where(going, discounts * gamma * ~data["terminated"][slot], discounts)
            row = torch.where(going.cpu(), row + self.stride, row)
            going = going & ~data["done"][slot] & (row < newest).to(going.device)
        after = {f"next_{key}": data[key][row % self.size] for key in ("tokens", "mask", "state")}
        keys = ("tokens", "mask", "state", "action")
        return {key: data[key][first] for key in keys} | after | {"rewards": rewards, "discounts": discounts}


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

    # model, with fresh critics
    vlm, agent = (module.to(device) for module in load_policy(args.policy, args.dtype))
    if args.eval_episodes:
        success = evaluate(args, args.task, vlm, agent, f"{run_name}-before")
        writer.add_scalar("eval/success_rate", success.mean(), 0)
        print(f"before: success {success.mean():.3f} of {len(success)} deterministic episodes")
    qf = SoftQNetwork(args.num_critics, **agent.kwargs).to(device)
    qf_target = copy.deepcopy(qf).requires_grad_(False)
    log_alpha = torch.tensor(math.log(args.alpha), device=device, requires_grad=True)
    target_entropy = len(agent.action_mean) * (math.log(args.target_std) + 0.5 * math.log(2 * math.pi * math.e))
    q_optimizer = torch.optim.Adam(qf.parameters(), lr=args.q_lr)
    actor_optimizer = torch.optim.Adam(agent.head.parameters(), lr=args.policy_lr)
    a_optimizer = torch.optim.Adam([log_alpha], lr=args.alpha_lr)
    generator = torch.Generator().manual_seed(args.seed)
    if args.compile_mode:
        vlm.model.compile(mode=args.compile_mode)

    # env setup
    envs = make_envs(args, args.task, args.num_envs, run_name)
    instructions = envs.get_attr("instructions")[0]
    next_obs, _ = envs.reset(seed=args.seed)
    next_frame = vlm.encode(next_obs, instructions)  # tokens, mask, state
    agent.start_exploration(*next_frame, args.init_std)
    noise = torch.randn((args.num_envs, *agent.head.log_std.shape), device=device)
    next_valid = np.ones(args.num_envs, dtype=bool)
    episode_success = np.zeros(args.num_envs, dtype=bool)
    running: list[list[dict[str, Tensor]]] = [[] for _ in range(args.num_envs)]
    online, demos, num_demos = LatentBuffer(args.buffer_size, args.num_envs), LatentBuffer(args.buffer_size, 1), 0

    # TRY NOT TO MODIFY: start the game
    global_step, num_updates, owed, learning = 0, 0, 0.0, False
    finished, episodic_returns, losses, seen = [], [], {}, 0
    start_time = time.time()
    while global_step < args.total_timesteps:
        steps_before = global_step
        for _ in range(args.num_steps):
            with torch.no_grad():
                action = agent.get_action(*next_frame, noise)
            executed = agent.env_action(action)
            next_obs, reward, terminated, truncated, infos = envs.step(executed)
            done = terminated | truncated
            # the step after an episode's end is a reset, where the action counts for nothing: it is not valid
            row = dict(zip(("tokens", "mask", "state"), next_frame, strict=True))
            facts = {"action": executed, "reward": reward.astype(np.float32), "terminated": terminated, "done": done}
            row |= {key: torch.as_tensor(x, device=device) for key, x in (facts | {"valid": next_valid}).items()}
            online.add(row)
            global_step += int(next_valid.sum())
            episode_success |= next_valid & infos["success"]
            next_frame = vlm.encode(next_obs, instructions)  # the only pass of this frame through the VLM
            for i in np.flatnonzero(next_valid):
                running[i].append({key: value[i] for key, value in row.items()})
            for i in np.flatnonzero(done):
                if episode_success[i]:  # the whole episode and its last frame, which is no step
                    last = dict(zip(("tokens", "mask", "state"), (x[i] for x in next_frame), strict=True))
                    last = running[i][-1] | last | {"valid": torch.zeros_like(row["valid"][i])}
                    for step in (*running[i], last):
                        demos.add({key: value[None] for key, value in step.items()})
                    num_demos += 1
                running[i] = []
            if done.any():
                finished += list(zip(episode_success[done], infos["episode"]["l"][done], strict=True))
                episodic_returns += list(infos["episode"]["r"][done])
                episode_success[done] = False
                noise[torch.as_tensor(done)] = torch.randn((done.sum(), *noise.shape[1:]), device=device)
            next_valid = ~done

        # ALGO LOGIC: training, once there are demonstrations
        if learning:
            owed += args.utd_ratio * (global_step - steps_before)
        elif num_demos >= args.num_demos or global_step >= args.learning_starts:
            learning, owed = True, float(args.critic_warmup_updates)
        for _ in range(int(owed)):
            owed -= 1
            from_demos = round(args.demo_fraction * args.batch_size) if num_demos else 0
            parts = [(demos, from_demos), (online, args.batch_size - from_demos)]
            batches = [x.sample(n, args.gamma, args.num_lookahead, generator) for x, n in parts if n]
            data = {key: torch.cat(padded([batch[key] for batch in batches])) for key in batches[0]}
            frame, state = (data["tokens"], data["mask"], data["state"]), agent.normalize(data["state"])
            with torch.no_grad():
                after = data["next_tokens"], data["next_mask"], data["next_state"]
                next_action = agent.executed(agent.get_distribution(*after).sample())
                embedding = qf_target.embed(*after[:2], agent.normalize(after[2]))
                chosen = torch.randperm(args.num_critics)[: args.num_min_critics]
                next_q = qf_target(embedding, next_action)[chosen].min(0).values
                targets = data["rewards"] + data["discounts"] * next_q  # no entropy in it: the reward is sparse (RLPD)
            embedding = qf.embed(data["tokens"], data["mask"], state)
            qf_values = qf(embedding, data["action"])
            qf_loss = (qf_values - targets).square().mean(1).sum()
            q_optimizer.zero_grad(set_to_none=True)
            qf_loss.backward()
            nn.utils.clip_grad_norm_(qf.parameters(), args.max_grad_norm)
            q_optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(qf_target.parameters(), qf.parameters(), strict=True):
                    slow.lerp_(fast, args.tau)
            num_updates += 1
            record = {"qf_loss": qf_loss / args.num_critics, "qf_values": qf_values.mean()}
            if num_updates > args.critic_warmup_updates and num_updates % args.policy_frequency == 0:
                probs = agent.get_distribution(*frame)
                entropy = probs.entropy().sum(-1)
                qf.requires_grad_(False)
                q = qf(embedding.detach(), agent.executed(probs.rsample())).mean(0)
                actor_loss = -(q + log_alpha.exp().item() * entropy).mean()
                record |= {"actor_loss": actor_loss, "entropy": entropy.mean(), "alpha": log_alpha.exp()}
                if from_demos:
                    target = (data["action"] - agent.action_mean) / agent.action_std
                    bc_loss = F.mse_loss(probs.mean[:from_demos], target[:from_demos])
                    actor_loss = actor_loss + args.bc_coef * bc_loss
                    record["bc_loss"] = bc_loss
                actor_optimizer.zero_grad(set_to_none=True)
                actor_loss.backward()
                nn.utils.clip_grad_norm_(agent.head.parameters(), args.max_grad_norm)
                actor_optimizer.step()
                qf.requires_grad_(True)
                alpha_loss = log_alpha * (entropy.detach().mean() - target_entropy)
                a_optimizer.zero_grad(set_to_none=True)
                alpha_loss.backward()
                a_optimizer.step()
            if not torch.isfinite(qf_loss):
                raise RuntimeError(f"the loss is {qf_loss.item()}; lower the learning rates or check the rewards")
            for key, figure in record.items():
                losses.setdefault(key, []).append(figure.item())

        # TRY NOT TO MODIFY: record rewards for plotting purposes
        if len(finished) - seen < args.num_envs and global_step < args.total_timesteps:
            continue
        window = slice(min(seen, max(0, len(finished) - args.num_envs)), None)  # the last one overlaps the one before
        seen = len(finished)
        metrics = {f"losses/{name}": np.mean(figures) for name, figures in losses.items()}
        metrics |= {"charts/demonstrations": num_demos, "charts/learning_rate": args.policy_lr}
        metrics["charts/SPS"] = sps = int(global_step / (time.time() - start_time))
        if finished:
            metrics["charts/success_rate"] = np.mean([success for success, _ in finished[window]])
            metrics["charts/episodic_return"] = np.mean(episodic_returns[window])
            metrics["charts/episodic_length"] = np.mean([length for _, length in finished[window]])
            print(f"global_step={global_step}, noisy success={metrics['charts/success_rate']:.2f}, SPS={sps}")
        for tag, figure in metrics.items():
            writer.add_scalar(tag, figure, global_step)
        losses = {}
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
