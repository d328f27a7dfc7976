"""Seconds of a gradient step and an env step: what `vla_rl.estimate_time` says beside what whole models take.

    python benchmarks/step_times.py                 every model, n = 3, into benchmarks/results/step_times.json
    python benchmarks/step_times.py --models small  some of them

Random weights of four families, small and medium, and SmolVLM at its real size; the medium ones are the builds of
`tests/encoders/families.py`, wider and deeper. Estimate and measurement alternate, in processor time on one thread. The
measured gradient steps are those of `train_supervised`, which fills its cache in the first; the env step is `encode` of
one frame. `ppo_epoch_s` is one epoch of `ppo_update` over a rollout of 1,024 env steps from cached tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import INSTRUCTION, Rows, encoder_of

from vla_rl.encoders import FrozenVLMEncoder, LoRASettings
from vla_rl.estimate import Workload
from vla_rl.estimate_time import measure_times
from vla_rl.heads import GaussianHead
from vla_rl.heads.value import ValueHead
from vla_rl.policy import VLAPolicy
from vla_rl.rl.ppo import PPOConfig, ppo_update
from vla_rl.rl.rollout import Rollout
from vla_rl.sl.supervised import SLConfig, train_supervised

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step_times.json"
MEDIUM = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "LoRA on all layers, 32 rows": (32, {"lora": LoRASettings()}),
    "LoRA on all layers, 4 rows": (4, {"lora": LoRASettings()}),
    "LoRA on the top 2, 32 rows": (32, {"lora": LoRASettings(top_layers=2)}),
    "text backbone, 8 rows": (8, {"scope": "text"}),
}
REAL = "smolvlm-256m"
REAL_CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "LoRA on all layers, 4 rows": (4, {"lora": LoRASettings()}),
    "LoRA on the top 8, 4 rows": (4, {"lora": LoRASettings(top_layers=8)}),
}
MODELS = ("small", "wide", "smolvlm", "llava", "internvl", REAL)


def build(name: str) -> FrozenVLMEncoder:
    """An encoder of random weights, in bfloat16."""
    if name in ("small", "wide", REAL):
        return encoder_of(name)
    sys.path.append(str(ROOT / "tests" / "encoders"))
    import families
    import transformers.models.smolvlm.processing_smolvlm as module

    module.num2words = module.num2words or str  # spells out numbers of video frames, which there are none of
    families.SMALL.update(MEDIUM)
    families.VISION.update(MEDIUM)
    torch.manual_seed(0)
    model, processor = families.FAMILIES[name].build()
    return FrozenVLMEncoder(model, processor, dtype=torch.bfloat16)


def measured(
    encoder: FrozenVLMEncoder, rows: Rows, options: dict[str, Any], *, steps: int, env_steps: int = 40
) -> tuple[float, float]:
    """Median seconds of a gradient step and of an env step."""
    head = GaussianHead(encoder.feature_dim, 7, state_dim=8)
    policy = VLAPolicy(encoder, head)
    envs = []
    for _ in range(env_steps):
        start = time.process_time()
        encoder.encode(rows.batch.images[:1], [INSTRUCTION])
        envs.append(time.process_time() - start)
    marks: list[float] = []
    config = SLConfig(steps=steps + 2, batch_size=rows.batch_size, random_shift=0, scope=options.get("scope", "lora"))
    note: Callable[[int, float], None] = lambda step, loss: marks.append(time.process_time())  # noqa: E731
    train_supervised(policy, rows, config=config, on_step=note)  # type: ignore[arg-type]
    return float(np.median(np.diff(marks))), float(np.median(envs[env_steps // 8 :]))


def ppo_epoch(encoder: FrozenVLMEncoder, tokens: int, *, rows: int = 1024) -> float:
    """Seconds of one epoch of an update from cached tokens."""
    policy = VLAPolicy(encoder, GaussianHead(encoder.feature_dim, 7, state_dim=8))
    policy.head.requires_grad_(True)
    critic = ValueHead(encoder.feature_dim, state_dim=8)
    features = torch.randn(rows, tokens, encoder.feature_dim).half()
    flat = torch.zeros(1, rows, dtype=torch.bool)
    rollout = Rollout(
        tokens=features,
        mask=torch.ones(rows, tokens, dtype=torch.bool),
        fingerprint=encoder.fingerprint,
        state=torch.randn(rows, 8),
        actions=torch.zeros(1, rows, 7),
        rewards=torch.zeros(1, rows),
        terminated=flat,
        done=flat,
        valid=~flat,
        task_id=np.zeros(rows, np.int64),
        images=None,
        values=torch.zeros(1, rows),
        advantages=torch.randn(1, rows),
        returns=torch.randn(1, rows),
    )
    with torch.no_grad():
        state = rollout.states(torch.arange(rows))
        found = policy.head.distribution(rollout.features(torch.arange(rows)), state)
        rollout.log_probs = found.log_prob(rollout.flat_actions)[None]
    optimizer = torch.optim.Adam([*policy.head.parameters(), *critic.parameters()], lr=0.0)
    config = PPOConfig(update_epochs=1, minibatch_size=256)
    start = time.process_time()
    ppo_update(policy, critic, optimizer, rollout, config=config)
    return time.process_time() - start


def run(name: str, repeats: int) -> dict[str, Any]:
    """Every case of one model."""
    real = name == REAL
    result: dict[str, Any] = {"cases": {}}
    for case, (count, options) in (REAL_CASES if real else CASES).items():
        found: dict[str, list[float]] = {"step_s": [], "step_estimated_s": [], "env_s": [], "env_estimated_s": []}
        for _ in range(repeats):
            encoder = build(name)
            if options.get("scope", "lora") == "lora":
                encoder.add_lora(options["lora"])
            work = Workload(tokens=0, vision_tokens=0, batch_size=count, **options)
            times = measure_times(encoder.model.config, encoder.processor, work, image_size=64, instruction=INSTRUCTION)
            step, env_step = measured(encoder, Rows(count, 64), options, steps=5, env_steps=8 if real else 40)
            for key, value in zip(found, (step, times.gradient_step, env_step, times.env_step), strict=True):
                found[key].append(value)
        result["cases"][case] = found
        ratio = [float(np.median(found[f"{k}_estimated_s"]) / np.median(found[f"{k}_s"])) for k in ("step", "env")]
        print(f"{name}, {case}: estimated / measured {ratio[0]:.2f} (step), {ratio[1]:.2f} (env step)", flush=True)
    encoder = build(name)
    tokens = encoder.prompt_length([INSTRUCTION], np.zeros((1, 64, 64, 3), np.uint8))
    result |= {"tokens": tokens, "feature_dim": encoder.feature_dim}
    result["ppo_epoch_s"] = [ppo_epoch(encoder, tokens) for _ in range(repeats)]
    print(f"{name}: PPO epoch over 1,024 rows of {tokens} tokens {np.median(result['ppo_epoch_s']):.2f} s", flush=True)
    return result


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.models:
        results[name] = run(name, args.repeats)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
