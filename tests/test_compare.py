import pytest
from hand_made_runs import evaluation, write_run

from vla_rl.cli import main
from vla_rl.compare import _stage_charts, compare, markdown, read_runs, write_comparison
from vla_rl.evaluation import EvaluationResult, TaskResult
from vla_rl.runs import read_run


@pytest.fixture
def runs(tmp_path):
    """A baseline, a better run, and one that was evaluated on fewer and on other episodes."""
    start = {"rl": evaluation(door="--------")}
    ends = {
        "sft": {"rl": evaluation(door="s-------"), "unseen": evaluation(wall="ssss----")},
        "ire": {"rl": evaluation(door="sssssss-"), "unseen": evaluation(wall="ssss----")},
        "short": {"rl": evaluation(door="ssss"), "unseen": evaluation(other="ssss")},
    }
    seconds = {"seconds": {"total": 90.0}}
    stage1 = {"task0-round0-stage1": {"num_env_steps": 5_000}}
    return [
        write_run(tmp_path / name, {"after-stage0": start} | stage1 | {"task0-round0-after-stage2": end} | seconds)
        for name, end in ends.items()
    ]


def rows(runs, **options):
    return {(row.group, row.task, row.run): row for row in compare(read_runs(runs), **options)}


def test_differences_are_on_the_pairs(runs):
    found = rows(runs)
    assert found["rl", None, "sft"].difference is None
    better = found["rl", None, "ire"]
    assert better.result.mean == 7 / 8 and better.pairs == 8
    assert better.difference[0] == pytest.approx(6 / 8) and better.difference[1] > 0
    assert better.p == pytest.approx(2 / 2**6) and better.words == "a gain"  # six pairs changed, all one way
    same = found["unseen", None, "ire"]
    assert same.difference == (0, 0, 0) and same.p == 1 and same.words.startswith("no difference")


def test_what_does_not_pair_is_left_out_or_said(runs):
    found = rows(runs)
    short = found["rl", None, "short"]
    assert short.pairs == 4 and short.difference[0] == pytest.approx(3 / 4), "the first four seeds"
    assert found["unseen", None, "short"].difference is None
    assert "no task and reset seed in common" in found["unseen", None, "short"].words


def test_by_task(runs):
    found = rows(runs, by_task=True)
    assert set(found) == {
        ("rl", "door", "sft"), ("rl", "door", "ire"), ("rl", "door", "short"),
        ("unseen", "wall", "sft"), ("unseen", "wall", "ire"), ("unseen", "other", "short"),
    }  # fmt: skip


def test_markdown(runs):
    text = markdown(read_runs(runs))
    (line,) = [line for line in text.splitlines() if line.startswith("| RL tasks | ire ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "0.88 [0.53, 0.98]" and cells[3] == "8" and cells[4].startswith("+0.75 [+0.")
    assert "| sft | stage 1: unknown | 0 | 5,000 | 90 s |" in text.replace("1.5 min", "90 s")


def test_a_bar_in_a_name_does_not_end_its_cell(tmp_path):
    for name in ("a", "b|2"):
        write_run(tmp_path / name, {"after-stage0": {"rl": evaluation(**{"push|pull": "s---"})}})
    text = markdown(read_runs([tmp_path / "a", tmp_path / "b|2"]), by_task=True)
    lines = [line for line in text.splitlines() if "b\\|2" in line]
    assert [line.count(" | ") for line in lines] == [4, 6] and lines[1].startswith("| push\\|pull | b\\|2 | 0.25 ")


def test_a_loss_in_pairs_is_one_even_where_intervals_overlap(tmp_path):
    """Every tenth episode lost, none won: Wilson's intervals overlap, the paired one does not reach zero."""
    for name, letters in (("a", "s" * 100), ("b", ("s" * 9 + "-") * 10)):
        write_run(tmp_path / name, {"after-stage0": {"rl": evaluation(door=letters)}})
    _, loss = compare(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert loss.words == "a loss" and loss.difference[0] == pytest.approx(-0.1) and loss.difference[2] < 0


def test_runs_of_one_name_are_told_apart_and_other_starts_are_named(tmp_path):
    for folder, letters in (("x", "s---"), ("y", "ss--")):
        write_run(tmp_path / folder / "run", {"after-stage0": {"rl": evaluation(door=letters)}})
    text = markdown(read_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"]))
    assert str(tmp_path / "x" / "run") in text and str(tmp_path / "y" / "run") in text
    assert "do not start from the same success on the RL tasks: 0.2500, 0.5000" in text
    assert "Not finished" in text


def test_other_environments_are_named(tmp_path):
    for name, horizon in (("a", 150), ("b", 500), ("c", 150)):
        experiment = {"config": {"method": "sft", "env": {"env_id": "E-v0", "horizon": horizon}}}
        write_run(tmp_path / name, {"after-stage0": {"rl": evaluation(door="s---")}}, experiment=experiment)
    said = "The environments differ in horizon, so that episodes of the same task and seed are not the same"
    assert said in markdown(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert "environments differ" not in markdown(read_runs([tmp_path / "a", tmp_path / "c"]))


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "c.html"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    assert "a gain" in capsys.readouterr().out
    page = out.read_text()
    assert "a gain" in page and page.count('<svg class="bar') >= 6 and "http" not in page.replace("http-equiv", "")
    assert main(["compare", str(runs[0])]) == 1
    assert "give two or more" in capsys.readouterr().err
    assert main(["compare", str(runs[0]), str(tmp_path / "irr")]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_a_run_whose_name_is_markup_is_no_markup_on_the_page(tmp_path):
    ends = {"task0-round0-after-stage2": {"rl": evaluation(door="ss--")}}
    runs = [write_run(tmp_path / name, ends) for name in ("<img src=x onerror=alert(1)>", "other")]
    page = write_comparison(read_runs(runs), tmp_path / "c.html").read_text()
    assert "<img" not in page and "compared with &lt;img" in page


def test_results_read_back_are_those_written(runs):
    result = read_run(runs[1]).evaluations["after-stage0"]["rl"]
    assert isinstance(result, EvaluationResult) and isinstance(result.tasks["door"], TaskResult)
    assert [e.seed for e in result.tasks["door"].episodes] == list(range(10_000, 10_008))


def test_what_a_rollback_gave_up_is_not_compared(runs, tmp_path):
    back = {"guard": "rollback", "phase": "task0-round0-after-stage2", "evaluation": "after-stage0", "message": ""}
    results = {
        "after-stage0": {"rl": evaluation(door="sss-----")},
        "task0-round0-after-stage2": {"rl": evaluation(door="--------")},
    }
    rolled = write_run(tmp_path / "rolled", results | {"guards": [back]})
    assert rows([runs[0], rolled])["rl", None, "rolled"].result.mean == 3 / 8
    kept = write_run(tmp_path / "kept", {"after-stage0": results["after-stage0"]})
    assert _stage_charts([read_run(rolled)]).replace("rolled", "kept") == _stage_charts([read_run(kept)])


def test_a_run_without_an_evaluation_is_named_as_one(runs, tmp_path):
    said = markdown(read_runs([runs[0], write_run(tmp_path / "early", {})]))
    assert "No evaluation has finished: early; not in the table." in said and "Not finished" not in said


@pytest.mark.parametrize(("steps", "last"), [(5, "task0-round0-eval2"), (0, "task0-round0-eval1")])
def test_a_run_is_finished_after_its_last_phase(tmp_path, steps, last):
    """Also where it was started from Python and leaves stage 2 out."""
    files = {"start": {"rl_tasks": ["a"]}, "config": {"stage1_mode": "ppo", "stage2": {"steps": steps}}}
    for name, done in (("ended", ["stage0", last]), ("broken-off", ["stage0"])):
        write_run(tmp_path / name, {}, state={"done": done, "checkpoint": None, "files": {}}, **files)
    assert read_run(tmp_path / "ended").finished and not read_run(tmp_path / "broken-off").finished


def test_the_time_of_a_run_that_was_started_from_python_is_that_of_its_phases(runs, tmp_path):
    state = {"done": ["eval-stage0"], "checkpoint": None, "files": {}, "seconds": {"stage0": 60.0, "eval-stage0": 30.0}}
    start = {"rl_tasks": []}
    own = write_run(tmp_path / "own", {"after-stage0": {"rl": evaluation(door="ss------")}}, state=state, start=start)
    (facts,) = (line for line in markdown(read_runs([runs[0], own])).splitlines() if line.startswith("| own | stage 1"))
    assert facts.endswith("| 1.5 min |")
