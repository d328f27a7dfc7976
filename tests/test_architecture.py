"""The import rules of docs/architecture.md; `test_imports.py` covers what importing loads."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest
import vla_rl_envs

import vla_rl

ROOT = Path(__file__).parents[1]
LIBRARY, PLUGIN = Path(vla_rl.__file__).parent, Path(vla_rl_envs.__file__).parent

LAYERS = [
    {
        "importing",
        "saved_files",
        "saved_modules",
        "seeding",
        "settings",
        "intervals",
        "timing",
        "rundir",
        "preemption",
        "file_lock",
    },
    {"_cameras", "_observation", "_vector_checks", "_vector_worker", "_vector_chunks"},
    {"data", "encoders"},
    {"vector", "heads", "chunks", "curriculum", "fitting"},
    {"policy", "envs"},
    {"sharing", "collect", "evaluation", "sl"},
    {"guards", "runs"},
    {"rl", "watch"},
    {"config"},
    {"resuming"},
    {"trainer"},
]
"""The core of the library, lowest first. What is not here (experiments, reports, commands) lies above it."""

UPWARD = {("policy", "sharing"), ("envs", "policy")}
"""Imports inside a function that lead upwards: a method that hands on to a function, and one that is run later."""

TOP = {"integrations", "cli", "commands", "__main__"}
COMMAND_LINE = re.compile(r"cli|commands|\w+_cli|\w+_commands|__main__")
PROJECT = (ROOT / "pyproject.toml").read_text()
DEPENDENCIES = set(re.findall(r'"([a-z0-9]+)', PROJECT.split("\ndependencies = [")[1].split("]")[0]))
PICKLES = {"vla_rl/_vector_chunks.py", "vla_rl/_vector_worker.py", "vla_rl/collect.py"}
"""Functions sent to worker processes of our own; nothing that comes out of a file."""


def unit(path):
    """Layer entry that a file of the library belongs to."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def nodes(tree, *, lazy=False):
    """Import statements with whether they run only when a function is called; those for type checkers are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, lazy
        elif isinstance(node, ast.expr):
            continue
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from nodes(node, lazy=lazy or inside)


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@functools.cache
def imports(path):
    """(module, line, lazy) of all imports of a file; `from package import name` counts as package.name."""
    found = []
    for node, lazy in nodes(parsed(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, lazy) for alias in node.names]
        else:
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            found += [(f"{node.module}.{alias.name}", node.lineno, lazy) for alias in node.names]
    return found


def own_imports(path):
    """Units of the library that a file imports."""
    for module, line, lazy in imports(path):
        parts = module.split(".")
        if parts[0] == "vla_rl" and len(parts) > 1 and parts[1] != unit(path):
            yield parts[1], line, lazy


FILES = sorted(path for path in LIBRARY.rglob("*.py") if path != LIBRARY / "__init__.py")
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def test_the_core_is_what_the_layers_say():
    units = {unit(path) for path in FILES}
    assert set(RANK) <= units, "a layer names something that is not there"
    assert len(FILES) > 50


def test_a_layer_imports_only_layers_below_it():
    wrong = []
    for path in FILES:
        mine = unit(path)
        if mine not in RANK:
            continue
        for name, line, lazy in own_imports(path):
            allowed = name in RANK and RANK[name] <= RANK[mine]
            if not (allowed or (lazy and (mine, name) in UPWARD)):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports vla_rl.{name}")
    assert wrong == []


def test_units_do_not_import_each_other_in_circles():
    graph = {}
    for path in FILES:
        found = {name for name, _, lazy in own_imports(path) if not lazy}
        graph[unit(path)] = graph.get(unit(path), set()) | found
    done, trail = set(), []

    def visit(name):
        assert name not in trail, f"a circle of imports: {' -> '.join([*trail, name])}"
        if name not in done:
            trail.append(name)
            for other in sorted(graph.get(name, ())):
                visit(other)
            trail.pop()
            done.add(name)

    for name in sorted(graph):
        visit(name)


def test_nothing_imports_integrations_or_the_command_line():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports vla_rl.{name}"
        for path in FILES
        for name, line, _ in own_imports(path)
        if name in TOP and not COMMAND_LINE.fullmatch(unit(path))
    ]
    assert wrong == []


def test_optional_packages_are_imported_where_they_are_used():
    standard = sys.stdlib_module_names | {"vla_rl", "__future__"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        if unit(path) != "integrations"
        for module, line, lazy in imports(path)
        if not lazy and module.split(".")[0] not in standard | DEPENDENCIES
    ]
    assert wrong == []
    assert {"numpy", "torch", "gymnasium"} <= DEPENDENCIES


def test_every_extra_that_an_error_names_exists():
    lines = PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) =", lines, flags=re.MULTILINE))
    named = {
        extra
        for root in (LIBRARY, PLUGIN, ROOT / "docs")
        for path in (*root.rglob("*.py"), *root.rglob("*.md"))
        for group in re.findall(r"vla-rl\[([\w,]+)\]", path.read_text())
        for extra in group.split(",")
    }
    assert len(named) > 4
    assert named - extras == set()


def test_files_are_small():
    sizes = {path: len(path.read_text().splitlines()) for root in (LIBRARY, PLUGIN) for path in root.rglob("*.py")}
    assert {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > 500} == {}


@pytest.mark.parametrize("root", ["vla_rl", "envs", "examples", "benchmarks"])
def test_no_pickles_and_no_unsafe_loads(root):
    for path in sorted((ROOT / root).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for module, line, _ in imports(path):
            assert module.split(".")[0] not in {"pickle", "dill", "joblib"} or name in PICKLES, f"{name}:{line}"
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if call == "torch.load":
                    assert safe.get("weights_only") == "True", f"{name}:{node.lineno}"
                if call == "np.load":
                    assert safe.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}"


def code_words(path):
    """Identifiers and strings of a file, lower case and without separators; docstrings and comments are prose."""
    nodes = list(ast.walk(parsed(path)))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        found = [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "module", "value")]
        if isinstance(node, ast.Constant) and id(node) in prose:
            continue
        yield from (re.sub("[^a-z0-9]", "", text.lower()) for text in found if isinstance(text, str))


def test_families_of_models_are_named_only_where_the_guide_says():
    """transformers' own list of image-text-to-text models, its short names left out, and what our guides name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    families = {re.sub("[^a-z0-9]", "", name) for name in KNOWN} | {"gemma", "siglip", "openvla", "pi0"}
    families = {name for name in families if len(name) > 4 or name == "pi0"}
    assert len(families) > 50
    naming = {
        path.relative_to(LIBRARY).as_posix()
        for path in FILES
        if any(family in word for word in code_words(path) for family in families)
    }
    section = (
        (ROOT / "docs/guides/vlm.md").read_text().split("## Where the library names a family")[1].split("\n## ")[0]
    )
    assert naming == set(re.findall(r"^\| `([\w/.]+)`", section, flags=re.MULTILINE))
