"""The paper's table on a preset: the method, its variants and the controls over several seeds, one JSON file per run.

    python benchmarks/tables.py --preset metaworld-reduced --seeds 0 1 2
    python benchmarks/render_tables.py

Stage 0 is trained once per seed, by the row `sft`, and the other rows start from its checkpoint and its demonstrations.
Runs whose file exists are not repeated; one that was interrupted begins again in a directory of its own. Options that
are not named below go to every `vla-rl train`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from table_runs import read_run, run_file, summarize, write_run

from vla_rl.presets import PRESETS
from vla_rl.report import versions
from vla_rl.rundir import write_json
from vla_rl.vector import available_cores

METHODS: dict[str, tuple[str, ...]] = {
    "sft": ("--method", "sft"),
    "more-sft": ("--method", "ire-vla", "--train.stage1-mode", "none", "--train.stage2-data", "expert"),
    "filtered-bc": (
        *("--method", "ire-vla", "--train.stage1.critic-warmup-updates", str(10**9)),
        *("--train.stage1.update-epochs", "1"),
    ),
    "ppo": ("--method", "ppo"),
    "ppo-replay": ("--method", "ppo-replay"),
    "ppo-bc": ("--method", "ppo", "--train.stage1.bc-coef", "1.0"),
    "ire-vla-frozen": ("--method", "ire-vla-frozen"),
    "ire-vla": ("--method", "ire-vla"),
    "ire-vla-sacfd": ("--method", "ire-vla-sacfd"),
}
"""Row -> what is added to `vla-rl train PRESET`. `more-sft`: the supervised steps of stage 2 on the demonstrations
alone. `filtered-bc`: stage 1 of iRe-VLA, but the actor is never updated, so that stage 2 imitates the successes of the
noisy stage-0 policy at equal env steps. `ppo-bc`: PPO on VLM and head with a term of behaviour cloning on the
demonstrations in the same loss."""

EXPLORATION: dict[str, tuple[str, ...]] = {
    "no-curriculum": ("--method", "ire-vla", "--train.exploration.no-start-curriculum"),
    "rnd": (
        *("--method", "ire-vla", "--train.exploration.no-start-curriculum"),
        *("--train.exploration.rnd-coef", "0.01"),
    ),
    "curriculum-rnd": ("--method", "ire-vla", "--train.exploration.rnd-coef", "0.01"),
    "curriculum-shaping": ("--method", "ire-vla", "--train.exploration.shaping-coef", "0.5"),
}
"""Rows beside `ire-vla` of `metaworld-skill`, whose stage 1 has the curriculum of start states: without it, novelty
(RND) in its place, novelty beside it, potential-based shaping beside it."""

ROWS = METHODS | EXPLORATION

RESULTS = Path(__file__).parent / "results" / "tables"
MADE_WITH = "made_with.json"  # written into a work directory before its run starts
EVAL_SEED, EVAL_SEEDS_PER_RUN = 10_000, 1_000


@dataclass
class Args:
    """Which runs."""

    preset: str = "metaworld-reduced"
    """a name in vla_rl/presets.py"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one run per seed and row, one after the other"""
    methods: tuple[str, ...] = tuple(METHODS)
    """rows of METHODS, or of EXPLORATION by name; sft is always run, as the others start from it"""
    name: str | None = None
    """of the table, where options make it another one than the preset's; None for the preset's name"""
    root: Path = Path("runs/tables")
    """work directories go to <root>/<name>/<method>-s<seed>"""
    out: Path = RESULTS
    """files go to <out>/<name>/<method>-s<seed>.json"""


class RunFailedError(RuntimeError):
    """`vla-rl train` did not end well."""


@dataclass(frozen=True)
class Table:
    """Where the runs of one preset lie.

    Attributes:
        preset: name.
        options: of `vla-rl train`, added to every run.
        root: work directories; the working directory of the runs, so that recorded commands hold no other paths.
        out: files.
    """

    preset: str
    options: tuple[str, ...]
    root: Path
    out: Path

    def run_seed(self, seed: int, methods: list[str]) -> list[str]:
        """Make the runs of one seed that have no file yet, `sft` first; returns what went wrong.

        Raises:
            ValueError: see `is_there` and `make`.
        """
        missing = [method for method in methods if not self.is_there(method, seed)]
        if not missing:
            return []
        try:
            stage0 = self.make("sft", seed)
        except RunFailedError as error:
            return [str(error)]
        failed = []
        for method in missing:
            if method != "sft":
                try:
                    self.make(method, seed, stage0=stage0)
                except RunFailedError as error:
                    failed.append(str(error))
        return failed

    def is_there(self, method: str, seed: int) -> bool:
        """Whether a run has its file.

        Raises:
            ValueError: it was made with other options.
        """
        path = run_file(self.out, method, seed)
        if not path.is_file():
            return False
        made = tuple(read_run(path).data["options"])
        if made != self.options:
            raise ValueError(
                f"{path} was made with the options {made}, not {self.options}; remove it or give another --out"
            )
        return True

    def make(self, method: str, seed: int, *, stage0: Path | None = None) -> Path:
        """The finished work directory of one run, made if it is not there; so is its file.

        Args:
            method: row.
            seed: of the run.
            stage0: work directory of the seed's `sft`, to start from.

        Raises:
            RunFailedError: the run ended with an error.
            ValueError: a stage 0 that had to be made again is not the one that the seed's other runs began with.
        """
        # A baseline that collapses is to be seen, not rescued.
        fixed = ["--guards.rollback-after", "0", "--train.seed", str(seed)]
        command = ["vla-rl", "train", self.preset, *self.options, *ROWS[method], *fixed]
        command += ["--train.eval-seed", str(EVAL_SEED + EVAL_SEEDS_PER_RUN * seed), "--train.no-stop-at-zero"]
        if stage0 is not None:
            command += ["--expert-data", f"{stage0.name}/expert_data"]
            if checkpoint_of(stage0).is_dir():
                command += ["--policy", str(checkpoint_of(stage0).relative_to(self.root)), "--train.stage0.steps", "0"]
        workdir = finished(self.root, f"{method}-s{seed}", command)
        if workdir is None:
            workdir = fresh(self.root, f"{method}-s{seed}")
            whole = [*command, "--workdir", workdir.name]
            workdir.mkdir()
            write_json(workdir / MADE_WITH, {**commit(), "versions": versions(), "cores": available_cores()})
            print("$", shlex.join(whole), flush=True)
            if subprocess.run(whole, cwd=self.root, check=False).returncode:
                raise RunFailedError(f"{method}, seed {seed}: `{shlex.join(whole)}` failed in {self.root}")
        digest = sha256_of(self.start_of(stage0 or workdir))
        path = run_file(self.out, method, seed)
        if not path.is_file():
            head = {"preset": self.preset, "method": method, "seed": seed, "options": list(self.options)}
            head |= {"command": shlex.join([*command, "--workdir", workdir.name]), "stage0_sha256": digest}
            head |= json.loads((workdir / MADE_WITH).read_text())
            print(write_run(self.out, summarize(workdir, **head)), flush=True)
        elif read_run(path).data["stage0_sha256"] != digest:
            raise ValueError(
                f"stage 0 of seed {seed} was made again and came out other than the one in {path}; remove that seed's "
                "files, so that all rows start from the same one"
            )
        return workdir

    def start_of(self, stage0: Path) -> Path:
        """The policy that a seed's rows begin with."""
        if checkpoint_of(stage0).is_dir():
            return checkpoint_of(stage0)
        options = [part for option in self.options for part in option.split("=", 1)]
        given = options[options.index("--policy") + 1] if "--policy" in options else PRESETS[self.preset][1].policy
        return self.root / (given or "")


def main(args: Args, options: tuple[str, ...] = ()) -> int:
    """Run what is missing; returns the exit status: 1 if a run failed, whose message is above.

    Args:
        args: which runs.
        options: of `vla-rl train`, added to every run; paths in them are relative to `<root>/<name>`.

    Raises:
        ValueError: a preset or a row that is not known, or a file that does not fit.
    """
    if args.preset not in PRESETS or not set(args.methods) <= set(ROWS):
        raise ValueError(
            f"preset {args.preset!r} or one of the rows {args.methods} is not known; presets are {', '.join(PRESETS)}, "
            f"rows {', '.join(ROWS)}"
        )
    name = args.name or args.preset
    table = Table(args.preset, options, (args.root / name).absolute(), args.out / name)
    table.root.mkdir(parents=True, exist_ok=True)
    methods = [method for method in ROWS if method in args.methods or method == "sft"]
    failed = [message for seed in args.seeds for message in table.run_seed(seed, methods)]
    for message in failed:
        print(message, file=sys.stderr)
    return int(bool(failed))


def checkpoint_of(stage0: Path) -> Path:
    """The policy that `sft` trained; missing where the preset starts from a policy and trains no stage 0."""
    return stage0 / "checkpoints" / "stage0"


def finished(root: Path, name: str, command: list[str]) -> Path | None:
    """The work directory of a run that came to its end with this command, if there is one."""
    for path in attempts(root, name):
        report = path / "report.md"
        if report.is_file() and f"    {shlex.join([*command, '--workdir', path.name])}\n" in report.read_text():
            return path
    return None


def fresh(root: Path, name: str) -> Path:
    """A work directory that does not exist yet: `name`, or `name-2` and so on beside earlier attempts."""
    taken = {path.name for path in attempts(root, name)}
    return root / next(
        candidate for n in range(1, len(taken) + 2) if (candidate := name if n == 1 else f"{name}-{n}") not in taken
    )


def attempts(root: Path, name: str) -> list[Path]:
    """Work directories of one row and seed."""
    return sorted({*root.glob(name), *root.glob(f"{name}-[0-9]*")})


def sha256_of(policy: Path) -> str | None:
    """Digest of a policy's weights; None if it is no directory here but on a hub."""
    if not (policy / "policy.json").is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(policy.rglob("*.safetensors")):
        digest.update(str(path.relative_to(policy)).encode() + path.read_bytes())
    return digest.hexdigest()


def commit() -> dict[str, str | bool | None]:
    """The commit of this repository, and whether the code was changed since."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "--no-optional-locks", *arguments], cwd=here, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", "vla_rl", "envs", "benchmarks/*.py")
    return {"commit": git("rev-parse", "HEAD"), "modified": None if status is None else bool(status)}


if __name__ == "__main__":
    parsed, unknown = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    try:
        sys.exit(main(parsed, tuple(unknown)))
    except ValueError as error:
        sys.exit(f"tables.py: {error}")
