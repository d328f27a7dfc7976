"""The checks of `vla-rl doctor`: each looks at one part of an installation and says what to type if it is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIGABYTE = 1e9
EXTRAS = (
    "metaworld", "kitchen", "lora", "smolvlm", "quantize", "plot", "archive", "lerobot", "rlds", "sb3", "torchrl",
    "ray", "wandb", "trackio",
)  # fmt: skip
"""Extras that a user chooses among; the others are for work on the project, or name several of these."""
GL_FIX = "apt-get install libegl1 libgl1-mesa-dri && export MUJOCO_GL=egl   # or libosmesa6 with MUJOCO_GL=osmesa"
"""What to type where MuJoCo draws nothing."""


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: which part of the installation.
        status: "ok"; "note" for what may be as it is; "fail" for what keeps something from working.
        text: what was found.
        fix: what to type, where something is to be mended; every failure has one.

    Raises:
        ValueError: a failure without a fix.
    """

    name: str
    status: Literal["ok", "note", "fail"]
    text: str
    fix: str | None = None

    def __post_init__(self) -> None:
        """A failure that does not say what to do helps nobody."""
        if self.status == "fail" and not self.fix:
            raise ValueError(f"the failed check {self.name!r} ({self.text}) says nothing of what to type")


KNOWN_BAD: tuple[tuple[str, str, str, str], ...] = (
    ("metaworld>=3.1,<3.2", "mujoco!=3.3.0", "Meta-World 3.1 pins mujoco 3.3.0", 'pip install "mujoco==3.3.0"'),
    (
        "robohive>=0.7,<0.8",
        "mujoco>=3.2",
        "RoboHive 0.7 needs mujoco 3.1.3, whose models newer ones do not compile",
        "vla-rl doctor robohive",
    ),
    (
        "robohive>=0.7,<0.8",
        "gymnasium>=1",
        "RoboHive 0.7 needs gymnasium 0.29.1, which vla_rl does not run on",
        "vla-rl doctor robohive",
    ),
    ("minari<0.5.4", "vla-rl>=0", "Minari before 0.5.4 cannot read images stored raw", 'pip install "minari>=0.5.4"'),
)
"""Two packages that do not go together: requirement, requirement, why, what to type."""


def installed_versions() -> dict[str, str]:
    """Name, in lower case with hyphens, -> version of everything installed."""
    return {_normal(d.name): d.version for d in importlib.metadata.distributions() if d.name}


def check_python(requires: str, *, version: str | None = None) -> list[Check]:
    """Whether Python is one that vla_rl runs on, and the platform.

    Args:
        requires: versions that will do, such as ">=3.10".
        version: of Python; None for the running one.
    """
    from packaging.specifiers import SpecifierSet

    version = version or platform.python_version()
    text = f"{version} at {sys.executable}, {platform.platform()}"
    if SpecifierSet(requires).contains(version, prereleases=True):
        return [Check("python", "ok", text)]
    fix = "python3.11 -m venv .venv && . .venv/bin/activate   # then install vla_rl there"
    return [Check("python", "fail", f"{text}, but {requires} is needed", fix)]


def check_requirements(requires: Iterable[str], installed: Mapping[str, str]) -> list[Check]:
    """The packages that vla_rl needs, and which of its extras are complete.

    Args:
        requires: requirement strings with their extras, as `importlib.metadata.requires` gives them.
        installed: name -> version.
    """
    from packaging.requirements import Requirement

    if "vla-rl" not in installed:
        text = "vla_rl runs from a directory and is not installed, so nothing is known of what it needs"
        return [Check("packages", "note", text, "python -m pip install -c constraints.txt -e .")]
    parsed = [Requirement(text) for text in requires]
    base = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [problem for r in base if (problem := _unmet(r, installed))]
    found = ", ".join(f"{r.name} {installed[_normal(r.name)]}" for r in base if _normal(r.name) in installed)
    checks = [Check("packages", "ok", found)]
    if wrong:
        fix = "pip install " + " ".join(f'"{r.name}{r.specifier}"' for r in base if _unmet(r, installed))
        checks = [Check("packages", "fail", "; ".join(wrong), fix)]
    for extra in EXTRAS:
        mine = [r for r in parsed if r not in base and r.marker and r.marker.evaluate({"extra": extra})]
        missing = [problem for r in mine if (problem := _unmet(r, installed))]
        if mine and not missing:
            checks.append(
                Check(f"extra {extra}", "ok", ", ".join(f"{r.name} {installed[_normal(r.name)]}" for r in mine))
            )
        elif missing:
            checks.append(Check(f"extra {extra}", "note", "; ".join(missing), f'pip install "vla-rl[{extra}]"'))
    return checks


def check_pairs(installed: Mapping[str, str]) -> list[Check]:
    """Versions that are known not to go together."""
    from packaging.requirements import Requirement

    found = []
    for first, second, why, fix in KNOWN_BAD:
        both = [Requirement(first), Requirement(second)]
        if all(_normal(r.name) in installed and not _unmet(r, installed) for r in both):
            pair = " with ".join(f"{r.name} {installed[_normal(r.name)]}" for r in both)
            found.append(Check("versions", "fail", f"{pair}: {why}", fix))
    return found or [Check("versions", "ok", "no pair that is known not to work")]


def check_torch() -> list[Check]:
    """torch, the device it computes on, and whether that computes."""
    try:
        import torch

        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        square = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
        right = float((square @ square)[0, 0]) == 64
    except Exception as error:
        text = f"torch does not work: {type(error).__name__}: {_last_line(error)}"
        return [Check("torch", "fail", text, 'pip install --force-reinstall "torch>=2.4"')]
    name = "the CPU"
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, {free / GIGABYTE:.0f} of {total / GIGABYTE:.0f} GB free"
    if not right:
        text = f"torch {torch.__version__} multiplies wrongly in bfloat16 on {name}"
        return [Check("torch", "fail", text, "vla-rl train PRESET --model.dtype float32")]
    checks = [Check("torch", "ok", f"torch {torch.__version__} computes on {name}")]
    if device == "cpu" and shutil.which("nvidia-smi"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        text = f"there is an NVIDIA driver, but this torch ({built}) does not see a GPU"
        checks.append(Check("gpu", "fail", text, "nvidia-smi; pip install --force-reinstall torch"))
    return checks


_FRAME = """
import json, os, sys, time
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")
import mujoco
scene = '<mujoco><worldbody><light pos="0 0 3"/><geom type="plane" size="1 1 .1" rgba=".2 .4 .8 1"/>' \
        '<geom type="sphere" size=".3" pos="0 0 .3" rgba=".9 .3 .2 1"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(scene)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
start = time.perf_counter()
with mujoco.Renderer(model, 64, 64) as renderer:
    renderer.update_scene(data)
    picture = renderer.render()
print(json.dumps({"backend": os.environ.get("MUJOCO_GL", "the default"), "spread": float(picture.std()),
                  "seconds": time.perf_counter() - start, "mujoco": mujoco.__version__}))
"""


def check_gl(*, timeout: float = 60) -> list[Check]:
    """Whether MuJoCo draws a frame, in a process of its own, as a broken OpenGL can end one."""
    backend = os.environ.get("MUJOCO_GL")
    done, output = _python(_FRAME, timeout=timeout)
    if not done:
        if "No module named 'mujoco'" in output:
            return [
                Check("opengl", "note", "no mujoco, so no simulator but the toy", 'pip install "vla-rl[metaworld]"')
            ]
        return [Check("opengl", "fail", f"MuJoCo drew nothing with MUJOCO_GL={backend or 'unset'}: {output}", GL_FIX)]
    found = json.loads(output)
    text = f"mujoco {found['mujoco']} drew a frame with {found['backend']} in {found['seconds']:.1f} s"
    if found["spread"] < 1:
        return [Check("opengl", "fail", f"{text}, but all its pixels are alike", GL_FIX)]
    return [Check("opengl", "ok", text)]


_ENV = """
import json, sys, time
import gymnasium as gym
start = time.perf_counter()
env = gym.make("vla_rl_envs:" + sys.argv[1])
observation, info = env.reset(seed=0)
observation, *_ = env.step(env.action_space.sample())
picture = observation["image"]
env.close()
seconds = time.perf_counter() - start
print(json.dumps({"shape": list(picture.shape), "spread": float(picture.std()), "seconds": seconds}))
"""
ENVS = {
    "VLA/Toy-v0": "vla-rl",
    "VLA/MetaWorld-v0": "vla-rl[metaworld]",
    "VLA/FrankaKitchen-v0": "vla-rl[kitchen]",
}
"""Our environments, and what to install for them."""


def check_env(env_id: str, *, timeout: float = 120) -> list[Check]:
    """Whether an environment resets, steps and gives a picture."""
    name = f"env {env_id.removeprefix('VLA/').removesuffix('-v0')}"
    done, output = _python(_ENV, env_id, timeout=timeout)
    if not done and ("No module named" in output or "pip install" in output):
        return [Check(name, "note", output, f'pip install "{ENVS[env_id]}"')]
    if not done:
        draws = any(word in output for word in ("GL", "nothing within"))
        return [Check(name, "fail", output, GL_FIX if draws else f'pip install --force-reinstall "{ENVS[env_id]}"')]
    found = json.loads(output)
    text = f"{env_id} resets, steps and gives a picture {found['shape']} in {found['seconds']:.1f} s"
    if found["spread"] <= 1:
        return [Check(name, "fail", f"{text}, but all its pixels are alike", GL_FIX)]
    return [Check(name, "ok", text)]


def check_hub(url: str = "https://huggingface.co", *, timeout: float = 3) -> list[Check]:
    """Whether the Hugging Face hub answers; being offline is no error, as everything can come from directories."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        text = "HF_HUB_OFFLINE is set: models come from the cache or from directories alone"
        return [Check("hub", "note", text, "unset HF_HUB_OFFLINE")]
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            pass
    except urllib.error.HTTPError as error:  # it is there, whatever it thinks of this question
        error.close()
    except (OSError, ValueError) as error:
        text = f"{url} does not answer within {timeout:.0f} s ({_last_line(error)}): models from the cache alone"
        return [Check("hub", "note", text, "export HF_HUB_OFFLINE=1   # saves the waiting")]
    return [Check("hub", "ok", f"{url} answers in {time.perf_counter() - start:.1f} s")]


def check_disk(paths: Mapping[str, Path] | None = None, *, wanted: float = 5.0) -> list[Check]:
    """Free space where runs, models and shared memory go.

    Args:
        paths: what for -> directory; by default runs (here), the hub's cache and shared memory.
        wanted: gigabytes, below which a note is made; shared memory wants a quarter of one.
    """
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    checks = []
    for purpose, path in (paths or {"runs": Path.cwd(), "models": home, "shared memory": Path("/dev/shm")}).items():
        there = next((p for p in (path, *path.parents) if p.exists()), None)
        if there is None or (purpose == "shared memory" and not path.exists()):
            continue
        free = shutil.disk_usage(there).free / GIGABYTE
        shared = purpose == "shared memory"
        little = free < (0.25 if shared else wanted)
        fix = (
            "docker run --shm-size=2g ...   # env workers put their observations there" if shared else f"df -h {there}"
        )
        text = f"{free:.1f} GB free for {purpose} at {path}"
        checks.append(Check("disk", "note" if little else "ok", text, fix if little else None))
    return checks


def check_threads() -> list[Check]:
    """Cores that this process may use, and threads that torch would start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    usable = min(cores, quota) if quota else cores
    set_ = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    text = f"{cores} cores" + (f", of which the container may use {quota:g}" if quota and quota < cores else "")
    text += "".join(f", {name}={value}" for name, value in set_.items())
    threads = next((int(value) for value in set_.values() if value.isdigit()), cores)
    if threads > usable:
        fix = f"export OMP_NUM_THREADS={max(1, int(usable))}"
        return [Check("threads", "note", f"{text}: torch would start {threads} threads for {usable:g} cores", fix)]
    return [Check("threads", "ok", text)]


def _cgroup_cores() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def all_checks() -> list[tuple[str, Callable[[], list[Check]]]]:
    """What is looked at, in this order: a name for the waiting, and the check."""
    installed = installed_versions()
    here = "vla-rl" in installed
    requires = importlib.metadata.requires("vla-rl") or [] if here else []
    python = importlib.metadata.metadata("vla-rl")["Requires-Python"] if here else ">=3.10"
    return [
        ("python", lambda: check_python(python)),
        ("packages", lambda: check_requirements(requires, installed)),
        ("versions", lambda: check_pairs(installed)),
        ("torch", check_torch),
        ("opengl", check_gl),
        *((env_id, lambda env_id=env_id: check_env(env_id)) for env_id in ENVS),
        ("hub", check_hub),
        ("disk", check_disk),
        ("threads", check_threads),
    ]


def _unmet(requirement, installed: Mapping[str, str]) -> str | None:
    """What is wrong with an installed version, or None."""
    version = installed.get(_normal(requirement.name))
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version}, but {requirement.specifier} is needed"
    return None


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _python(code: str, *args: str, timeout: float) -> tuple[bool, str]:
    """Whether a piece of Python ran, and its last line of output, or of its error."""
    try:
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False, f"nothing within {timeout:.0f} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")]
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        return False, (errors or lines or [f"exit status {done.returncode}"])[-1]
    return True, done.stdout.strip().splitlines()[-1]


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
