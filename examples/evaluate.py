# docs: ../docs/scripts/evaluate.md
"""Deterministic success of a saved policy on some tasks, with 95 % Wilson intervals."""

import importlib.util
import json
import os
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
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass
class Args:
    """Everything that can be set; see docs/scripts/evaluate.md."""

    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    cuda: bool = True
    """if toggled, cuda will be enabled by default"""
    capture_video: bool = False
    """whether to capture videos of the first environment (check out the `videos` folder)"""
    policy: str = tyro.MISSING
    """directory of the policy, written by any of the scripts or by the library"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """precision of the VLM's matrix products (that of the saved policy if None)"""
    env_id: str = "vla_rl_envs:VLA/Toy-v0"
    """the id of the environment"""
    tasks: tuple[str, ...] = ("reach-red",)
    """task labels, each `task` or `task:variant`"""
    image_size: int | None = None
    """height and width of the pictures (the environment's own if None)"""
    horizon: int | None = None
    """most steps in an episode (the environment's own if None)"""
    async_envs: bool = False
    """step every environment in a process of its own"""
    num_envs: int = 32
    """the number of parallel environments"""
    eval_episodes: int = 64
    """episodes per task"""
    eval_seed: int = 10_000
    """reset seed of the first episode"""
    out: str | None = None
    """JSON file for the success of every episode"""


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


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927): it stays within [0, 1], and has a width at 0 and n."""
    p, scale = successes / n, 1 + z**2 / n
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / scale
    return max(0.0, (p + z**2 / (2 * n)) / scale - half), min(1.0, (p + z**2 / (2 * n)) / scale + half)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args = tyro.cli(Args)
    run_name = f"{args.env_id}__{args.exp_name}__{time.time_ns()}"
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    vlm, agent = (module.to(device) for module in load_policy(args.policy, args.dtype))
    results = {}
    for task in args.tasks:
        success = evaluate(args, task, vlm, agent, f"{run_name}-eval")
        low, high = wilson_interval(int(success.sum()), len(success))
        print(f"{task}: {success.mean():.3f} [{low:.2f}, {high:.2f}], n = {len(success)}")
        results[task] = {"success": success.tolist(), "interval": [low, high], "first_seed": args.eval_seed}
    if args.out is not None:
        Path(args.out).write_text(json.dumps({"policy": args.policy, "env_id": args.env_id, "tasks": results}))
