"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import vla_rl_envs

import vla_rl

ROOTS = {module.__name__: Path(module.__file__).parent for module in (vla_rl, vla_rl_envs)}
FILES = {name: sorted(root.rglob("*.py")) for name, root in ROOTS.items()}


def imported(path):
    """Top-level names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("package", "forbidden"), [("vla_rl", {"vla_rl_envs", "metaworld", "mujoco"}), ("vla_rl_envs", {"vla_rl", "torch"})]
)
def test_the_packages_do_not_know_each_other(package, forbidden):
    assert len(FILES[package]) > 5
    found = {str(path): names for path in FILES[package] if (names := forbidden & set(imported(path)))}
    assert found == {}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import vla_rl", ("transformers", "mujoco", "metaworld", "gymnasium_robotics", "torch", "peft", "matplotlib")),
        (
            "from vla_rl import IterativeTrainer, VLAPolicy, EpisodeStore, evaluate",
            ("mujoco", "metaworld", "matplotlib"),
        ),
        ("from vla_rl import GaussianHead, EpisodeStore, Features, evaluate", ("transformers", "mujoco", "metaworld")),
        ("import vla_rl_envs", ("torch", "mujoco", "metaworld", "transformers", "vla_rl")),
        ("import gymnasium; gymnasium.make('vla_rl_envs:VLA/Toy-v0')", ("torch", "mujoco", "metaworld", "vla_rl")),
        ("import vla_rl.vector, vla_rl._vector_worker", ("torch", "transformers", "mujoco")),
    ],
)
def test_what_an_import_leaves_out(statement, absent):
    code = f"{statement}\nimport sys\nprint([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_promised_name_is_there():
    for name in vla_rl.__all__:
        assert getattr(vla_rl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        vla_rl.Nothing  # noqa: B018
