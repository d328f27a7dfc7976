"""What docs/release.md asks for: one version in all places, and a citation file that a reader of YAML understands."""

import re

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
