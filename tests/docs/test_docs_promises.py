"""The page of promises: its commands select tests, its files exist, and its figures are those of the files."""

import json
import re
import shlex
import sys

import pytest
from pages import DOCS, ROOT

sys.path.append(str(ROOT / "tests" / "hostile"))

import corpus
import corpus_settings

PAGE = (DOCS / "promises.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = [shlex.split(command) for command in re.findall(r"^\|.*?\| `((?:pytest|python) .*?)` ", PAGE, re.MULTILINE)]
TESTS = [words for words in COMMANDS if words[0] == "pytest"]


def read(name):
    return json.loads((RESULTS / name).read_text())


def row_of(word):
    """What the table says was measured, of the one row with a word in its other columns."""
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and word in line.rsplit("|", 2)[0]]
    assert len(rows) == 1, (word, rows)
    return rows[0].rsplit("|", 2)[1]


def test_the_table_has_its_commands():
    assert len(COMMANDS) > 12 and len(TESTS) > 7


@pytest.mark.parametrize("words", TESTS, ids=" ".join)
def test_a_command_selects_tests_from_each_of_its_files(words):
    """Selected by name as pytest does it, for expressions of words and `or`."""
    paths, wanted = words[1:], [""]
    if "-k" in paths:
        wanted = paths[paths.index("-k") + 1].split(" or ")
        paths = paths[: paths.index("-k")]
    assert paths and all(re.fullmatch(r"\w*", word) for word in wanted)
    found = set()
    for path in paths:
        target = ROOT / path
        files = sorted(target.rglob("test_*.py")) if target.is_dir() else [target]
        names = [f"{file.name} {name}" for file in files for name in re.findall(r"def (test_\w+)", file.read_text())]
        chosen = {word for word in wanted for name in names if word in name}
        assert chosen, f"`pytest {' '.join(words[1:])}` selects nothing of {path}"
        found |= chosen
    assert found == set(wanted), f"nothing is named {sorted(set(wanted) - found)}"


def test_scripts_and_results_exist():
    scripts = [words[1] for words in COMMANDS if words[0] == "python"]
    named = re.findall(r"`results/([\w.-]+\.json)`", PAGE)
    assert len(scripts) > 4 and len(named) > 4
    assert [path for path in scripts if not (ROOT / path).is_file()] == []
    assert [name for name in named if not (RESULTS / name).is_file()] == []


def test_kills():
    found, told = read("kill_resume.json"), row_of("kill_resume.py")
    assert f"{found['kills']} kills and {found['flipped_checkpoints']} flipped bits" in told
    assert f"{found['bit_equal_runs']} of {found['runs']} runs of the toy env bit-equal" in told
    assert "Kills: " + ", ".join(f"{place} {n}" for place, n in sorted(found["kills_while"].items())) in told
    assert found["kills"] == sum(found["kills_while"].values())


def test_preempted_memory():
    found, told = read("preempted_memory.json"), row_of("preempted_memory.py")
    for row in found["rows"]:
        figures = rf"{row['gb']:g} GB in {row['seconds']} s with {row['share_of_frames']:.0%}"
        assert figures.replace("%", " %") in told and row["seconds"] < found["limit_s"]


def test_determinism():
    for seed, equal in read("determinism.json")["bit_equal_runs_by_seed"].items():
        assert f"seed {seed} {equal} bit-equal" in row_of("determinism.py")


def test_soak():
    found, told = read("soak.json"), row_of("soak.py")
    assert f"{found['env_steps']:,}" in told
    assert f"memory {found['rss_growth_percent']:+.1f} %" in told
    assert f"workers' {found['workers_rss_growth_percent']:+.1f} %" in told
    first, last = (found[f"steps_per_second_{which}_tenth"] for which in ("first", "last"))
    assert f"{first:.0f} steps/s in the first tenth, {last:.0f} in the last" in told
    assert f"turns with fresh processes at {found['steps_per_second_of_fresh_processes']:.0f}" in told
    assert f"({found['speed_change_percent']:+.1f} %)" in told and all(found["kept"].values())
    assert found["kept"]["threads and files (none more)"] == ("no more threads or files" in told)


def test_fuzzing():
    found, told = read("fuzz_store.json"), row_of("fuzz_store.py")
    expected = f"{found['rounds']:,} rounds: {found['read']:,} read, {found['errors_in_words']:,} errors in words"
    assert expected in told
    assert f"{found['other']} other" in told


def test_scaling():
    found, told = read("ray_scaling.json")["measured"], row_of("ray_scaling.py")
    speeds = [found["local"], found["workers"]["1"], found["workers"]["2"]]
    local, one, two = (f"{measured['env_steps_per_second']:.0f}" for measured in speeds)
    assert f"{local} with the local collector, {one} with one worker, {two} with two" in told


def test_malformed_input():
    told = row_of("**Malformed input")
    for made, what in (
        (corpus.stores(), "stores"),
        (corpus.runs(), "run directories"),
        (corpus.damaged_checkpoints(), "checkpoints"),
        (corpus.policies(), "policies"),
        (corpus.adapted_policies(), "policies with tokenizer"),
        (corpus.env_outputs(), "env outputs"),
        (corpus_settings.experiments(), "experiments"),
        (corpus_settings.jobs(), "jobs"),
        (corpus_settings.snapshots(), "snapshots"),
    ):
        assert f"{len(list(made))} {what}" in told


def test_properties():
    count = sum(len(re.findall(r"^@given", path.read_text(), re.MULTILINE)) for path in (ROOT / "tests").rglob("*.py"))
    assert f"{count} properties" in row_of("tests/properties")
