# docs: ../docs/scripts/sft_vlm.md
"""Stage 0 of iRe-VLA (arXiv 2501.16664): supervised learning of VLM and action head on demonstrations."""

import importlib.util
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    """Everything that can be set; see docs/scripts/sft_vlm.md."""

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
    """whether to capture videos of the evaluation (check out the `videos` folder)"""
    save_model: bool = False
    """whether to save the policy into the `runs/{run_name}/model` folder and to evaluate it from there"""

    # The environment
    env_id: str = "vla_rl_envs:VLA/Toy-v0"
    """the id of the environment"""
    eval_tasks: tuple[str, ...] = ()
    """task labels (`task` or `task:variant`) to evaluate; the tasks of the demonstrations if empty"""
    image_size: int | None = None
    """height and width of the pictures (the environment's own if None)"""
    horizon: int | None = None
    """most steps in an episode (the environment's own if None)"""
    async_envs: bool = False
    """step every environment in a process of its own"""
    num_envs: int = 16
    """the number of parallel environments in the evaluation"""
    eval_episodes: int = 64
    """deterministic episodes per task at the end"""
    eval_seed: int = 10_000
    """reset seed of the first evaluation episode"""

    # The policy
    vlm: str = "small"
    """directory or hub id of the VLM; "tiny" is the library's own, "small" builds one from random weights"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """precision of the VLM's matrix products"""
    small_image_size: int = 64
    """height and width of what the "small" VLM sees"""
    small_patch_size: int = 16
    """height and width of its patches"""
    small_width: int = 192
    """its hidden size"""
    small_vision_layers: int = 4
    """layers of its vision tower"""
    small_text_layers: int = 3
    """layers of its text model"""
    small_heads: int = 6
    """its attention heads"""
    width: int = 128
    """width of the token learner"""
    num_queries: int = 8
    """learned queries of the token learner"""
    hidden_dim: int = 256
    """size of the last hidden layer of the head"""

    # Algorithm specific arguments
    demos: str = "demos/toy"
    """directory of the demonstrations, with `data/main_data.hdf5` in Minari's layout"""
    scope: Literal["head", "lora", "all"] = "all"
    """what learns beside the head: nothing, LoRA on the text model, or the whole VLM"""
    lora_rank: int = 16
    """rank of the LoRA weights; their alpha is twice this"""
    total_timesteps: int = 2_000
    """gradient steps"""
    batch_size: int = 256
    """env steps per gradient step, balanced over tasks"""
    learning_rate: float = 1e-3
    """peak learning rate of the head (one cycle)"""
    vlm_learning_rate: float = 1e-3
    """peak learning rate of the VLM's weights (one cycle)"""
    weight_decay: float = 1e-4
    """AdamW's weight decay"""
    warmup_fraction: float = 0.1
    """part of the steps in which the learning rate rises"""
    random_shift: int = 4
    """augmentation by a random shift of up to this many pixels"""
    max_grad_norm: float = 1.0
    """the maximum norm for the gradient clipping"""
    compile_mode: Literal["default", "reduce-overhead"] | None = None
    """mode of `torch.compile` for VLM and head ("reduce-overhead" uses CUDA graphs); None does without"""


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


def small_vlm(instructions, seed, image_size=64, patch_size=16, width=192, vision_layers=4, text_layers=3, heads=6):
    """A PaliGemma (SigLIP tower, Gemma text model) of a few million random weights, and its processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    bpe, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.pre_tokenizer, bpe.decoder = byte_level, decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    options = {"initial_alphabet": byte_level.alphabet(), "special_tokens": list(names.values())}
    bpe.train_from_iterator(instructions, trainers.BpeTrainer(vocab_size=1024, show_progress=False, **options))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="right", **names)
    image_processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    image_processor.image_seq_length = (image_size // patch_size) ** 2
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)

    both = {"hidden_size": width, "num_attention_heads": heads}
    text = {"model_type": "gemma", "num_key_value_heads": heads, "head_dim": width // heads, **both}
    text |= {"vocab_size": len(tokenizer), "intermediate_size": 8 * width // 3, "max_position_embeddings": 2048}
    text |= {"num_hidden_layers": text_layers, "pad_token_id": tokenizer.pad_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"model_type": "siglip_vision_model", "intermediate_size": 4 * width, "vision_use_head": False, **both}
    vision |= {"image_size": image_size, "patch_size": patch_size, "num_hidden_layers": vision_layers}
    sizes = {"image_token_index": processor.image_token_id, "hidden_size": width, "projection_dim": width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, **sizes)
        return transformers.PaliGemmaForConditionalGeneration(config), processor


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


class Demos:
    """All steps of episodes in HDF5 files, in RAM, drawn with every task alike (times its weight)."""

    def __init__(self, paths: list[str], seed: int, task_weights: dict[str, float] | None = None):
        self.rng = np.random.default_rng(seed)
        episodes = []
        for path in paths:
            with h5py.File(Path(path) / "data" / "main_data.hdf5", "r") as file:
                for group in (file[f"episode_{i}"] for i in range(len(file)) if f"episode_{i}" in file):
                    arrays = [group[f"observations/{key}"][:-1] for key in ("image", "state")] + [group["actions"][()]]
                    episodes.append((group.attrs["task"], group.attrs["instruction"], arrays))
        episodes.sort(key=lambda episode: episode[0])
        self.images, self.state, self.actions = (np.concatenate(x) for x in zip(*(e[2] for e in episodes), strict=True))
        lengths = [len(arrays[2]) for _, _, arrays in episodes]
        tasks, self.instructions = (np.repeat([episode[k] for episode in episodes], lengths) for k in (0, 1))
        self.tasks, self.first, self.size = np.unique(tasks, return_index=True, return_counts=True)
        shares = np.array([(task_weights or {}).get(task, 1.0) for task in self.tasks])
        self.cumulative = shares.cumsum() / shares.sum()

    def sample(self, batch_size: int) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
        """Pictures, instructions, states and actions of random steps."""
        draws = self.rng.random((2, batch_size))
        task = np.searchsorted(self.cumulative, draws[0], side="right").clip(max=len(self.tasks) - 1)
        rows = self.first[task] + (draws[1] * self.size[task]).astype(int)
        return self.images[rows], list(self.instructions[rows]), self.state[rows], self.actions[rows]


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each picture [B, H, W, 3] by up to `pixels` each way, repeating its edge (DrQ, arXiv 2004.13649)."""
    batch, height, width = images.shape[:3]
    shift = torch.randint(-pixels, pixels + 1, (2, batch), generator=generator)
    rows = (torch.arange(height) + shift[0][:, None]).clamp(0, height - 1)
    cols = (torch.arange(width) + shift[1][:, None]).clamp(0, width - 1)
    return images[torch.arange(batch)[:, None, None], rows[:, :, None], cols[:, None, :]]


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
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_name}
        wandb.init(**names, sync_tensorboard=True, config=vars(args), monitor_gym=True, save_code=True)
    writer = SummaryWriter(f"runs/{run_name}")
    table = "".join(f"\n|{key}|{value}|" for key, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|{table}")
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")

    # data and model
    demos = Demos([args.demos], args.seed)
    eval_tasks = args.eval_tasks or tuple(str(task) for task in demos.tasks)
    if args.vlm == "small":
        sizes = {key.removeprefix("small_"): value for key, value in vars(args).items() if key.startswith("small_")}
        vlm = VLM(*small_vlm(sorted(set(demos.instructions)), args.seed, **sizes), args.dtype)
    else:
        vlm = VLM.load(args.vlm, args.dtype)

    # TRY NOT TO MODIFY: seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic

    agent = Agent(
        feature_dim=vlm.feature_dim,
        action_dim=demos.actions.shape[1],
        state_dim=demos.state.shape[1],
        width=args.width,
        num_queries=args.num_queries,
        hidden_dim=args.hidden_dim,
    )
    for name, values in (("action", demos.actions), ("state", demos.state)):
        getattr(agent, f"{name}_mean").copy_(torch.as_tensor(values.mean(0, dtype=np.float64)))
        getattr(agent, f"{name}_std").copy_(torch.as_tensor(values.std(0, dtype=np.float64).clip(1e-3)))
    vlm, agent = vlm.to(device), agent.to(device)
    head, opened = list(agent.head.parameters()), vlm.open(args.scope, args.lora_rank)
    if args.compile_mode:
        vlm.model.compile(mode=args.compile_mode)
        agent.get_mean = torch.compile(agent.get_mean, mode=args.compile_mode)

    # supervised learning: J0 = E || pi(o, l) - a ||^2 over theta and phi
    groups = [{"params": head, "lr": args.learning_rate}, {"params": opened, "lr": args.vlm_learning_rate}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    peaks, total = [group["lr"] for group in groups], max(args.total_timesteps, 2)
    rise = max(args.warmup_fraction, 1.5 / total)  # OneCycleLR divides by zero at a rise of one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=total, pct_start=rise)
    generator = torch.Generator().manual_seed(args.seed)
    start_time = time.time()
    for global_step in range(args.total_timesteps):
        images, instructions, state, actions = demos.sample(args.batch_size)
        images = torch.as_tensor(images)
        if args.random_shift and args.scope != "head":
            images = random_shift(images, args.random_shift, generator)
        tokens, mask = vlm(images, instructions)
        target = (torch.as_tensor(actions, device=device) - agent.action_mean) / agent.action_std
        bc_loss = F.mse_loss(agent.get_mean(tokens, mask, torch.as_tensor(state, device=device)), target)

        optimizer.zero_grad(set_to_none=True)
        bc_loss.backward()
        nn.utils.clip_grad_norm_(head + opened, args.max_grad_norm)
        optimizer.step()
        schedule.step()

        if global_step % 20 == 0:
            sps = (global_step + 1) * args.batch_size / (time.time() - start_time)
            writer.add_scalar("losses/bc_loss", bc_loss.item(), global_step)
            writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
            writer.add_scalar("charts/SPS", sps, global_step)
            if global_step % 200 == 0:
                print(f"step {global_step}: loss {bc_loss.item():.4f}, {sps:.0f} samples/s")

    if args.save_model:
        model_path = Path(f"runs/{run_name}/model")
        save_policy(model_path, vlm, agent)
        print(f"model saved to {model_path}")
        vlm, agent = (module.to(device) for module in load_policy(model_path))
    rates = []
    for task in eval_tasks if args.eval_episodes else ():
        success = evaluate(args, task, vlm, agent, f"{run_name}-eval")
        rates.append(success.mean())
        writer.add_scalar(f"eval/{task}", rates[-1], args.total_timesteps)
        print(f"{task}: success {rates[-1]:.3f} of {len(success)} deterministic episodes")
    if rates:
        writer.add_scalar("eval/success_rate", np.mean(rates), args.total_timesteps)
    writer.close()
