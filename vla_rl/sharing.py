"""Sharing a policy on the Hugging Face hub: its model card, made from what the run has written, and the upload."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_rl.evaluation import standing_labels

if TYPE_CHECKING:
    from vla_rl.policy import VLAPolicy

TAGS = ("robotics", "reinforcement-learning", "vision-language-action", "ire-vla")
PAPER = "https://arxiv.org/abs/2501.16664"
_GROUPS = {"expert": "expert tasks", "rl": "RL tasks", "unseen": "unseen tasks"}


def read_run(workdir: str | Path) -> dict[str, Any]:
    """What a work directory tells a model card: `results`, `config` and `data`, for `model_card` and `push_to_hub`.

    Args:
        workdir: holds `results.json`, `config.json` and `expert_data/`, as `vla-rl train` writes them; what is missing
            is left out.

    Raises:
        FileNotFoundError: none of the three is there.
    """
    from vla_rl.data import EpisodeStore
    from vla_rl.data.statistics import summarize

    path = Path(workdir)
    found: dict[str, Any] = {}
    for name in ("results", "config"):
        if (path / f"{name}.json").is_file():
            found[name] = json.loads((path / f"{name}.json").read_text())
    if (path / "expert_data").is_dir():
        with EpisodeStore(path / "expert_data", mode="r") as store:
            found["data"] = [
                {"task": s.task, "source": s.source, "episodes": s.episodes, "steps": s.steps} for s in summarize(store)
            ]
    if not found:
        raise FileNotFoundError(
            f"{workdir} holds no results.json, config.json or expert_data; give the work directory of a run"
        )
    return found


def model_card(
    policy: VLAPolicy,
    *,
    repo_id: str | None = None,
    results: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    data: Sequence[Mapping[str, Any]] | None = None,
    evaluation: str | None = None,
    description: str = "",
    license: str | None = None,
    datasets: Sequence[str] | None = None,
) -> str:
    """The text of a model card: what the policy is, how it was trained, on what, and how often it succeeds.

    Args:
        policy: what the card is of.
        repo_id: hub id, for the title and the example.
        results: what a run's `results.json` holds: label of an evaluation (`"after-stage0"`) -> group of tasks ->
            `{"mean", "interval", "tasks": {name: {"n", "successes", "rate", "interval"}}}`. Other entries are ignored.
        config: a run's settings: `stage0`, `stage1` and `stage2` are listed, and `seed`.
        data: one mapping per task of the demonstrations, with the same keys: a table.
        evaluation: the label in `results` whose success is this policy's; None takes the last, or where that
            was rolled back the one gone back to.
        description: sentences of your own for the top.
        license: identifier such as `"mit"`.
        datasets: hub ids of the training data.

    Returns:
        Markdown with the hub's metadata in front.

    Raises:
        KeyError: `evaluation` is no label of `results`.
        ValueError: `results` is something else.
    """
    from huggingface_hub import ModelCardData

    evaluations = _evaluations(results or {})
    if results and not evaluations and not results.keys() & {"guards", "seconds"}:  # as a run has from its start
        raise ValueError(
            f"results has the keys {sorted(results)} and no evaluation; give what a run's results.json holds: "
            '{"after-stage2": {"rl": {"mean": 0.9, "tasks": {...}}}}'
        )
    if evaluation is not None and evaluation not in evaluations:
        raise KeyError(f"evaluation {evaluation!r} is not in the results, only {list(evaluations)}; give one of these")
    name = (repo_id or "policy").split("/")[-1]
    last = evaluation or next(reversed(standing_labels(list(evaluations), results or {})), None)
    metadata = ModelCardData(
        library_name="vla-rl",
        pipeline_tag="robotics",
        tags=list(TAGS),
        license=license,
        datasets=None if datasets is None else list(datasets),
        base_model=_hub_source(policy),
        model_name=name,
        eval_results=_eval_results(evaluations[last]) if last is not None else None,
    )
    sections = [f"# {name}", description, _summary(policy), *_usage(policy, repo_id)]
    if data:
        sections += ["## Training data", _table([*data[0]], [[*row.values()] for row in data])]
    if config and any(stage in config for stage in ("stage0", "stage1", "stage2")):
        sections += ["## Training", _training(config)]
    if evaluations:
        sections += ["## Success", *_success(evaluations, last)]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"


def save_model_card(policy: VLAPolicy, directory: str | Path, **card: Any) -> Path:
    """Write `model_card(policy, **card)` as `README.md` into a directory and return its path."""
    path = Path(directory) / "README.md"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{directory} is no directory; write the policy there first, by policy.save_pretrained")
    path.write_text(model_card(policy, **card))
    return path


def push_to_hub(
    policy: VLAPolicy,
    repo_id: str,
    *,
    run: str | Path | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    commit_message: str = "Upload policy with vla_rl",
    **card: Any,
) -> str:
    """Upload a policy with its model card; `VLAPolicy.from_pretrained(repo_id)` loads it again.

    Args:
        policy: what to upload.
        repo_id: `"user/name"`; created if it does not exist.
        run: work directory that the policy came from; the card takes results, settings and data from it.
        private: whether a new repository is private; None takes the account's default.
        token: of the hub; None takes the one of `hf auth login`.
        branch: to upload to, created if it does not exist; None is the main one.
        commit_message: of the upload.
        card: arguments of `model_card`, in place of what `run` holds.

    Returns:
        Address of the commit.

    Raises:
        ValueError: the encoder's weights are not uploaded with the policy, and nobody else has them.
    """
    from huggingface_hub import HfApi

    content = {**(read_run(run) if run is not None else {}), **card}
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        policy.save_pretrained(directory)
        _require_reachable_weights(Path(directory) / "encoder")
        save_model_card(policy, directory, repo_id=repo_id, **content)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=directory, revision=branch, commit_message=commit_message
        )
    return str(commit.commit_url)


def _require_reachable_weights(directory: Path) -> None:
    """Raise if a saved encoder refers to weights in a directory of this machine."""
    from vla_rl.encoders.checkpoint import FILE_NAME, EncoderSettings
    from vla_rl.encoders.packaged import packaged_path
    from vla_rl.saved_files import read_object

    if "class" in read_object(directory / FILE_NAME):  # not of a hub model: all weights lie there
        return
    saved = EncoderSettings.read(directory)
    if (
        not saved.weights
        and saved.source is not None
        and packaged_path(saved.source) is None
        and Path(saved.source).is_dir()
    ):
        raise ValueError(
            f"the encoder's weights lie in {saved.source}, where nobody else finds them; set policy.encoder.source = "
            "None to upload them in full, or load the encoder by its hub id"
        )


def _evaluations(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Label -> group -> result, of the entries that are evaluations."""
    return {
        label: dict(entry)
        for label, entry in results.items()
        if isinstance(entry, Mapping)
        and entry
        and all(isinstance(value, Mapping) and {"mean", "tasks"} <= value.keys() for value in entry.values())
    }


def _eval_results(groups: Mapping[str, Any]) -> list[Any]:
    """The success of one evaluation as the hub's metadata, one entry per task."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="robotics",
            task_name=_GROUPS.get(group, group),
            dataset_type=name,
            dataset_name=name,
            metric_type="success_rate",
            metric_name=f"success rate (n = {task['n']})",
            metric_value=round(task["rate"], 4),
        )
        for group, result in groups.items()
        for name, task in result["tasks"].items()
    ]


def _hub_source(policy: VLAPolicy) -> str | None:
    """The encoder's hub id, if it has one."""
    source = getattr(policy.encoder, "source", None)
    return source if source is not None and source.count("/") == 1 and not Path(source).exists() else None


def _summary(policy: VLAPolicy) -> str:
    encoder, head = policy.encoder, policy.head
    model = type(getattr(encoder, "model", encoder)).__name__
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    source = _hub_source(policy)
    lora = getattr(encoder, "lora", None)
    origin = f", from [{source}](https://hf.co/{source})" if source else ""
    rows = [
        ("VLM", f"{model}, {weights / 1e6:,.1f} M parameters{origin}"),
        ("LoRA", "none" if lora is None else f"rank {lora.r}, alpha {lora.alpha}"),
        ("prompt", f"`{getattr(encoder, 'prompt', '{instruction}')}`"),
        ("head", f"{type(head).__name__}, {sum(p.numel() for p in head.parameters()) / 1e6:,.2f} M parameters"),
        ("action", f"{len(policy.action_mean)} numbers in [-1, 1]"),
        ("proprioception", f"{len(policy.state_mean)} numbers" if policy.uses_state else "none"),
    ]
    size = getattr(encoder, "image_size", None)
    if size is not None:
        rows.append(("image", f"{size[0]} x {size[1]} pixels, uint8 RGB"))
    text = f"A vision-language-action policy trained with `vla_rl`, an implementation of [iRe-VLA]({PAPER})."
    return f"{text}\n\n{_table(['part', 'what'], rows)}"


def _usage(policy: VLAPolicy, repo_id: str | None) -> list[str]:
    size = getattr(policy.encoder, "image_size", None) or (224, 224)
    state = f', "state": np.zeros({len(policy.state_mean)}, np.float32)' if policy.uses_state else ""
    code = [
        "import numpy as np",
        "from vla_rl import VLAPolicy",
        "",
        f'policy = VLAPolicy.from_pretrained("{repo_id or "path/to/policy"}")',
        "# of several cameras, image_<camera> each",
        f'obs = {{"image": np.zeros(({size[0]}, {size[1]}, 3), np.uint8){state}}}',
        'action = policy.act(obs, "what the robot is to do")',
    ]
    return ["## Use", "```python\n" + "\n".join(code) + "\n```"]


def _training(config: Mapping[str, Any]) -> str:
    mode, scope = config.get("stage1_mode", "ppo"), config.get("stage1_scope", "head")
    vlm = "VLM frozen" if scope == "head" else f"VLM learns too, {scope}"
    collects = f"{config.get('collect_episodes')} episodes collected, nothing learned"
    stages: list[tuple[str, str, Any]] = [("0", "supervised", config.get("stage0"))]
    if mode == "collect":
        stages.append(("1", collects, {}))
    elif mode != "none":
        algorithm, name = ("SAC from demonstrations", "sacfd") if mode == "sacfd" else ("PPO", "stage1")
        stages.append(("1", f"reinforcement learning, {algorithm}, {vlm}", config.get(name)))
    if config.get("stage2_data") != "none":
        stages.append(("2", "supervised", config.get("stage2")))
    lines = []
    for number, kind, settings in stages:
        if not isinstance(settings, Mapping) or settings.get("steps") == 0:
            continue
        items = ", ".join(f"`{key}={value}`" for key, value in settings.items() if not isinstance(value, Mapping))
        lines.append(f"* **stage {number}** ({kind})" + (f": {items}" if items else ""))
    if "seed" in config:
        lines.append(f"* seed {config['seed']}")
    return "\n".join(lines)


def _success(evaluations: Mapping[str, Mapping[str, Any]], last: str | None) -> list[str]:
    groups = list(dict.fromkeys(group for entry in evaluations.values() for group in entry))
    overview = [[label, *(_cell(entry.get(group)) for group in groups)] for label, entry in evaluations.items()]
    assert last is not None
    tasks = [
        [name, f"{task['rate']:.2f}", f"[{task['interval'][0]:.2f}, {task['interval'][1]:.2f}]", task["n"]]
        for result in evaluations[last].values()
        for name, task in result["tasks"].items()
    ]
    return [
        "Mean success rate of the deterministic policy with its 95 % Wilson interval and the number of episodes. The "
        f"policy here is the one of `{last}`.",
        _table(["evaluation", *(_GROUPS.get(group, group) for group in groups)], overview),
        f"By task, `{last}`:",
        _table(["task", "success", "interval", "n"], tasks),
    ]


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    low, high = result["interval"]
    n = sum(task["n"] for task in result["tasks"].values())
    return f"{result['mean']:.2f} [{low:.2f}, {high:.2f}] n={n}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
