"""What docs/release.md asks for: one version in all places, and a citation file that a reader of YAML understands."""

import os
import re
import shutil
import subprocess

import pytest
from pages import ROOT

import vla_rl


def test_the_version_is_the_same_everywhere():
    found = {
        name: re.search(pattern, (ROOT / name).read_text(), flags=re.MULTILINE)[1]
        for name, pattern in {
            "pyproject.toml": r'^version = "(.+)"',
            "CITATION.cff": r"^version: (.+)",
            "docs/cite.md": r"version = \{(.+)\}",
            "CHANGELOG.md": r"^## \[(.+)\]",
        }.items()
    }
    assert set(found.values()) == {vla_rl.__version__}, found


def test_the_citation_file_names_the_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    families = [author["family-names"] for author in paper["authors"]]
    bibtex = (ROOT / "docs" / "cite.md").read_text()
    assert paper["title"] in bibtex and citation["title"] in bibtex
    assert [name.split(",")[0] for name in re.search(r"author\s+= \{(.+)\}", bibtex)[1].split(" and ")] == families


def test_the_makefile_names_only_what_exists():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", text, flags=re.MULTILINE))
    declared = set(re.search(r"^\.PHONY: (.+)", text, flags=re.MULTILINE)[1].split())
    assert declared == targets
    scripts = set(re.findall(r"(?:python|cp) (\w+/[\w/]+\.py)", text))
    assert scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_ci_runs_every_test_once():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    makes = {word for step in steps for word in re.findall(r"make (\w+)", step)}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"lint", "types", "tables", "test", "slow", "docs", "wheel"} <= makes <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert 'pytest -m "not slow and not simulator"' in makefile and 'pytest -m "slow or simulator"' in makefile


def test_the_hooks_run_what_ci_runs():
    yaml = pytest.importorskip("yaml")
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local" and all(hook["language"] == "system" for hook in local["hooks"])
    script, makefile = (ROOT / ".ci" / "run").read_text(), (ROOT / "Makefile").read_text()
    hooks = {hook["id"]: hook["entry"].removesuffix(" --force-exclude") for hook in local["hooks"]}
    tests = hooks.pop("imports").removeprefix("python -m pytest ")
    assert (ROOT / tests).is_file(), "the whole of pytest runs this one too"
    assert set(hooks) == {"ruff-check", "ruff-format", "pyright", "tables"}
    for command in hooks.values():
        assert re.search(rf'^(step "[^"]+" )?{command}( |$)', script, flags=re.MULTILINE), command
        assert re.search(rf"^\t{command}( |$)", makefile, flags=re.MULTILINE), command
    stages = {hook["id"]: hook.get("stages") for hook in local["hooks"]}
    assert [name for name, stage in stages.items() if stage is None] == ["ruff-check", "ruff-format"]


@pytest.mark.parametrize(("tag", "drafted"), [("v{}", True), ("v{}.dev0", False), ("v9{}", False)])
def test_the_release_job_drafts_the_wheel_of_its_tag_and_of_no_other(tmp_path, tag, drafted):
    """The steps of the last job in bash as GitHub starts it, with a `gh` that writes down what it is asked."""
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    job = jobs["release"]
    assert job["if"] == "startsWith(github.ref, 'refs/tags/v')" and set(job["needs"]) == {
        "fast",
        "slow",
        "docs",
        "wheel",
    }
    uploads, downloads = (
        [step["with"] for step in jobs[name]["steps"] if f"actions/{kind}-artifact" in step.get("uses", "")]
        for name, kind in (("wheel", "upload"), ("release", "download"))
    )
    assert uploads == downloads == [{"name": "wheel", "path": "dist/"}]

    tag = tag.format(vla_rl.__version__)
    wheel = f"dist/vla_rl-{vla_rl.__version__}-py3-none-any.whl"
    asked, gh = tmp_path / "asked", tmp_path / "bin" / "gh"
    for folder in ("bin", "dist"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / wheel).touch()
    gh.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {asked}\n")
    gh.chmod(0o755)
    env = {**os.environ, "PATH": f"{gh.parent}:{os.environ['PATH']}", "GITHUB_REF_NAME": tag}
    for step in job["steps"]:
        bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step.get("run", "true")]
        if subprocess.run(bash, cwd=tmp_path, env=env, check=False).returncode:
            break
    assert asked.exists() == drafted
    if drafted:
        assert asked.read_text().splitlines()[:5] == ["release", "create", tag, wheel, "--draft"]
