import json
import math

import numpy as np
import pytest
import table_runs
from PIL import Image
from render_tables import (
    Args,
    cost_table,
    forgetting_table,
    gain_cell,
    gain_table,
    main,
    rate,
    signed,
    stage_table,
    success_table,
)
from table_runs import compact, pool, read_run, read_runs, summarize, write_run

from vla_rl.evaluation import EpisodeOutcome, EvaluationResult, TaskResult
from vla_rl.rundir import RunDirectory

DOCUMENT = "# Title\n\n<!-- benchmarks: {} -->\nold\n<!-- end benchmarks -->\n\nThe end.\n"


def result(seed, **tasks):
    """Task -> "0110": outcome of the episodes that begin with reset seed 1000 * seed."""
    return EvaluationResult(
        {
            task: TaskResult(
                tuple(EpisodeOutcome(1000 * seed + i, outcome == "1", 7 + i, 0.0) for i, outcome in enumerate(outcomes))
            )
            for task, outcomes in tasks.items()
        }
    )


def content(method, seed, phases, **changes):
    """A run's file: label -> group -> {task: outcomes}; 100 env steps in each of two stages 1."""
    evaluations = {
        label: {group: result(seed, **tasks) for group, tasks in groups.items()} for label, groups in phases.items()
    }
    stage1 = {
        f"task{i}-round0-stage1": {
            "task": task,
            "stored_successes": 3 + seed,
            "num_env_steps": 100,
            "noisy_success": [[50, None], [100, 0.5]],
        }
        for i, task in enumerate(("a", "b"))
        if method != "sft"
    }
    return {
        "preset": "p",
        "method": method,
        "seed": seed,
        "options": ["--x", "1"],
        "commit": "0123456789abcdef",
        "modified": False,
        "versions": {"python": "3.11", "platform": "Linux"},
        "cores": 2,
        "stage0_sha256": f"start{seed}",
        "minutes": 10.0 + 4 * seed,
        "env_steps": 100 * len(stage1),
        "vlm_frames": 110 * len(stage1),
        "stage1": stage1,
        "evaluations": {
            label: {group: table_runs.compact(found) for group, found in groups.items()}
            for label, groups in evaluations.items()
        },
        **changes,
    }


START = {"expert": {"e": "1111"}, "rl": {"a": "0000", "b": "0000"}}
PHASES = {
    "sft": {"after-stage0": START},
    "filtered-bc": {
        "after-stage0": START,
        "task0-round0-after-stage2": {"expert": {"e": "1110"}, "rl": {"a": "1100", "b": "0000"}},
        "task1-round0-after-stage2": {"expert": {"e": "1111"}, "rl": {"a": "1100", "b": "1100"}},
    },
    "ire-vla": {
        "after-stage0": START,
        "task0-round0-after-stage1": {"expert": {"e": "0000"}, "rl": {"a": "1111", "b": "0000"}},
        "task0-round0-after-stage2": {"expert": {"e": "1100"}, "rl": {"a": "1110", "b": "0000"}},
        "task1-round0-after-stage1": {"expert": {"e": "0000"}, "rl": {"a": "1111", "b": "1111"}},
        "task1-round0-after-stage2": {"expert": {"e": "1000"}, "rl": {"a": "1111", "b": "1111"}},
    },
}


@pytest.fixture
def directory(tmp_path):
    """Two seeds of iRe-VLA and SFT, one of filtered BC, all with the same outcomes."""
    for method, seed in (("ire-vla", 0), ("sft", 0), ("filtered-bc", 1), ("sft", 1), ("ire-vla", 1)):
        write_run(tmp_path / "results" / "p", content(method, seed, PHASES[method]))
    return tmp_path / "results" / "p"


def cells(table, method):
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_numbers_are_written_without_a_leading_zero():
    assert [rate(value) for value in (0, 0.004, 0.845, 0.994, 0.996, 1)] == [".00", ".00", ".84", ".99", "1.00", "1.00"]
    assert [signed(value) for value in (0.25, -0.03, 0.001, -0.001, 1, -1)] == [
        *("+.25", "-.03", ".00", ".00", "+1.00", "-1.00")
    ]


def test_pooled_success_by_hand():
    """6 of 8: Wilson's interval is (.75 + z^2/16 -+ z sqrt(.1875/8 + z^2/256)) / (1 + z^2/8) = [.409, .929]."""
    from render_tables import success_cell

    assert success_cell([result(0, a="0110"), result(1, a="1111")]) == ".75 [.41, .93] (.50 1.00)"
    two_tasks = pool([result(0, a="0110", b="1111"), result(1, b="1110", a="0000")])
    assert (two_tasks.tasks["a"].successes, two_tasks.tasks["b"].successes) == (2, 7)
    assert two_tasks.mean == 9 / 16


def test_an_episode_does_not_count_twice():
    with pytest.raises(ValueError, match="'a' was evaluated on the same reset seeds"):
        pool([result(0, a="01"), result(0, a="01")])
    with pytest.raises(ValueError, match="different tasks"):
        pool([result(0, a="01"), result(1, b="01")])


def test_gain_by_hand():
    """Twelve of sixteen pairs improve: the bootstrap mean is Binomial(16, .75) / 16, with quantiles 8 and 15 of 16."""
    pairs = [(result(0, a="0" * 8), result(0, a="1" * 8)), (result(1, a="0" * 8), result(1, a="1" * 4 + "0" * 4))]
    below = lambda k: sum(math.comb(16, i) * 0.75**i * 0.25 ** (16 - i) for i in range(k + 1))  # noqa: E731
    assert below(7) < 0.02 and below(8) > 0.026 and below(14) < 0.965 and below(15) > 0.98
    assert gain_cell(pairs) == "+.75 [+.50, +.94] (+1.00 +.50)"
    assert gain_cell([(pairs[0][1], pairs[0][0])]) == "-1.00 [-1.00, -1.00] (-1.00)"
    assert gain_cell([(None, pairs[0][0])]) == gain_cell([]) == ""


def test_tables_by_hand(directory):
    runs = read_runs(directory)
    assert {method: [run.seed for run in row] for method, row in runs.items()} == {
        "filtered-bc": [1],
        "ire-vla": [0, 1],
        "sft": [0, 1],
    }
    # Wilson: 0 of 16 is [0, .194], 8 of 8 [.676, 1], 4 of 8 [.215, .785], 2 of 8 [.071, .591], 16 of 16 [.806, 1].
    success = success_table(runs)
    assert cells(success, "sft") == ["1.00 [.68, 1.00] (1.00 1.00)", ".00 [.00, .19] (.00 .00)", "8 / 16"]
    assert cells(success, "ire-vla") == [".25 [.07, .59] (.25 .25)", "1.00 [.81, 1.00] (1.00 1.00)", "8 / 16"]
    assert cells(success, "filtered-bc")[1:] == [".50 [.22, .78] (.50)", "4 / 8"]
    stages = stage_table(runs["ire-vla"])
    assert cells(stages, "stage 0") == ["1.00 [.68, 1.00] (1.00 1.00)", ".00 [.00, .19] (.00 .00)", "8 / 16"]
    assert cells(stages, "stage 2 of task0-round0")[0] == ".50 [.22, .78] (.50 .50)"
    assert cells(stages, "stage 1 of task1-round0")[1] == "1.00 [.81, 1.00] (1.00 1.00)"
    gain = gain_table(runs)
    assert "| sft |" not in gain
    assert cells(gain, "ire-vla")[1:] == ["+1.00 [+1.00, +1.00] (+1.00 +1.00)", "", ""]
    assert cells(gain, "filtered-bc")[0] == ".00 [.00, .00] (.00)"
    assert cells(gain, "filtered-bc")[3].startswith("+.50 [") and cells(gain, "filtered-bc")[3].endswith("] (+.50)")
    assert cells(forgetting_table(runs), "ire-vla") == ["1.00", ".50", ".25"]
    assert cells(forgetting_table(runs), "filtered-bc") == ["1.00", ".75", "1.00"]
    assert cells(cost_table(runs), "ire-vla") == ["0, 1", "200", "220", "7", "12 (10 to 14)"]
    assert cells(cost_table(runs), "filtered-bc") == ["1", "200", "220", "8", "14"]


def test_runs_that_cannot_be_compared_are_refused(directory):
    write_run(directory, content("ppo", 1, PHASES["sft"], stage0_sha256="start0"))
    with pytest.raises(ValueError, match="another stage 0"):
        read_runs(directory)
    write_run(directory, content("ppo", 1, PHASES["sft"], options=["--x", "2"]))
    with pytest.raises(ValueError, match=r"ppo-s1.json was made with the options \['--x', '2'\]"):
        read_runs(directory)
    (directory / "ppo-s1.json").rename(directory / "ppo-s3.json")
    with pytest.raises(ValueError, match="holds ppo of seed 1"):
        read_runs(directory)


def test_a_run_s_file_holds_what_its_work_directory_said(tmp_path):
    run = RunDirectory(tmp_path / "work")
    before, after = result(0, a="0010"), result(0, a="1011")
    run.add_result("after-stage0", {"rl": before.to_dict()})
    stage1 = {"task": "a", "num_env_steps": 70, "num_vlm_frames": 75, "stored_successes": 2}
    run.add_result("task0-round0-stage1", stage1)
    run.add_result("task0-round0-after-stage2", {"rl": after.to_dict()})
    run.add_result("seconds", {"stage0": 61.04, "total": 120.0})
    for step, success in ((40, float("nan")), (70, 0.25)):
        run.log({"charts/success_rate": success, "losses/x": 1.0}, phase="task0-round0-stage1", step=step)
    run.log({"losses/bc_loss": 1.0}, phase="stage0", step=0)
    run.close()
    head = {"method": "ire-vla", "seed": 0, "options": [], "stage0_sha256": None}
    path = write_run(tmp_path, summarize(tmp_path / "work", **head))
    read = read_run(path)
    assert path.name == "ire-vla-s0.json"
    assert read.data["minutes"] == 2 and read.data["env_steps"] == 70 and read.data["vlm_frames"] == 75
    assert read.data["stage1"] == {"task0-round0-stage1": {**stage1, "noisy_success": [[40, None], [70, 0.25]]}}
    assert read.data["success"]["task0-round0-after-stage2"] == {"rl": 0.75}
    assert list(read.phases) == ["after-stage0", "task0-round0-after-stage2"]
    outcomes = lambda found: [(e.seed, e.success, e.length) for e in found.tasks["a"].episodes]  # noqa: E731
    assert outcomes(read.first("rl")) == outcomes(before) and outcomes(read.last("rl")) == outcomes(after)


def test_documents_are_written_from_the_files_alone_and_checked(tmp_path, directory, capsys):
    documents = (tmp_path / "docs" / "all.md", tmp_path / "README.md")
    documents[0].parent.mkdir()
    for document, name in zip(documents, ("all", "p"), strict=True):
        document.write_text(DOCUMENT.format(name))
    args = dict(results=directory.parent, documents=documents, pictures=tmp_path / "docs" / "pictures")
    assert main(Args(check=True, **args)) == 1
    assert documents[0].read_text() == DOCUMENT.format("all") and not (tmp_path / "docs" / "pictures").exists()
    assert main(Args(**args)) == 0 and main(Args(check=True, **args)) == 0
    text = documents[0].read_text()
    assert text.startswith("# Title\n\n") and text.endswith("\n\nThe end.\n") and "old" not in text
    assert "--preset p --seeds 0 1 --x 1\n" in text and "`0123456789`" in text
    assert "](pictures/p.png)" in text and "ppo" not in text
    assert documents[1].read_text().count("| ire-vla |") == 1
    picture = np.asarray(Image.open(tmp_path / "docs" / "pictures" / "p.png").convert("RGB"))
    colours = {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0)}
    red, blue, orange = (214, 39, 40), (31, 119, 180), (255, 127, 14)
    assert red in colours and blue in colours and orange not in colours  # iRe-VLA, filtered BC, no PPO

    documents[1].write_text(DOCUMENT.format("p/stages"))
    assert main(Args(**args)) == 0 and main(Args(check=True, **args)) == 0
    assert "| stage 1 of task1-round0 |" in documents[1].read_text()
    entries = [
        {
            "table": table,
            "run": f"{row}-s1",
            "learning_rate": 0.0001,
            "encoder_learning_rate": 0.0002,
            "evaluation": found,
        }
        for table, row, found in (
            ("p", "ire-vla", {group: compact(result(1, a="1110")) for group in ("expert", "rl", "unseen")}),
            ("p", "filtered-bc", {group: compact(result(1, a="1000")) for group in ("expert", "rl", "unseen")}),
            ("q", "ire-vla", {}),
        )
    ]
    (directory.parent.parent / "stage2_rates.json").write_text(json.dumps(entries))
    documents[1].write_text(DOCUMENT.format("p/rates"))
    assert main(Args(check=True, **args)) == 1 and main(Args(**args)) == 0 and main(Args(check=True, **args)) == 0
    lines = [line for line in documents[1].read_text().splitlines() if "0.0001, 0.0002" in line]
    assert len(lines) == 2 and "| .75 [" in lines[1] + lines[0] and "| .25 [" in lines[0] + lines[1]
    assert "+.50 [" in next(line for line in lines if "filtered-bc" in line)
    documents[1].write_text(DOCUMENT.format("p"))
    assert main(Args(**args)) == 0

    documents[1].write_text(documents[1].read_text().replace("| ire-vla | .25", "| ire-vla | .95"))
    assert main(Args(check=True, **args)) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert main(Args(**args)) == 0
    write_run(directory, content("ppo", 0, PHASES["sft"]))
    assert main(Args(check=True, **args)) == 1
    assert "p.png is out of date" in capsys.readouterr().out


def test_a_table_of_another_name_than_its_preset_says_so(tmp_path, directory):
    directory.rename(directory.parent / "skill")
    document = tmp_path / "all.md"
    document.write_text(DOCUMENT.format("all"))
    args = Args(results=directory.parent, documents=(document,), pictures=tmp_path / "pictures")
    assert main(args) == 0
    assert "## skill\n" in document.read_text()
    assert "--preset p --name skill --seeds 0 1 --x 1\n" in document.read_text()


def test_a_marker_for_a_preset_without_runs_is_an_error(tmp_path, directory):
    document = tmp_path / "README.md"
    document.write_text(DOCUMENT.format("kitchen"))
    args = Args(results=directory.parent, documents=(document,), pictures=tmp_path)
    with pytest.raises(ValueError, match="'kitchen', which has no runs; there are p"):
        main(args)
    document.write_text("<!-- benchmarks: p -->\n" + DOCUMENT.format("all"))
    with pytest.raises(ValueError, match="is not followed by"):
        main(args)
    document.write_text(DOCUMENT.format("all"))
    assert main(Args(results=tmp_path / "none", documents=(document,), pictures=tmp_path)) == 0
    assert "No run has been published yet." in document.read_text()
