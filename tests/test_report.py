import imageio.v3 as imageio
import numpy as np
import pytest
from rich.console import Console

from vla_rl.evaluation import EpisodeOutcome, EvaluationResult, TaskResult
from vla_rl.report import (
    evaluations,
    first_and_last,
    rows,
    sign_test,
    summary_table,
    verdict,
    versions,
    write_report,
)
from vla_rl.rundir import RunDirectory
from vla_rl.runs import frames_file

N = 40


def result(**successes):
    """Task -> number of successes among N episodes, the first ones."""
    return EvaluationResult(
        {
            task.replace("_", "-"): TaskResult(
                tuple(EpisodeOutcome(10_000 + i, i < wins, 12, float(i < wins)) for i in range(N))
            )
            for task, wins in successes.items()
        }
    )


STAGE1 = {
    "task": "drawer-open:new",
    "stored_successes": 7,
    "num_env_steps": 20_000,
    "num_episodes": 321,
    "num_vlm_frames": 20_500,
    "converged": False,
    "first_success_rate": 0.25,
    "last_success_rate": 0.75,
}
RESULTS = {
    "after-stage0": {
        "expert": result(drawer_open=38, door_open=30).to_dict(),
        "rl": result(drawer_new=10).to_dict(),
        "unseen": result(window=20).to_dict(),
    },
    "task0-round0-stage1": STAGE1,
    "task0-round0-after-stage1": {"rl": result(drawer_new=36).to_dict()},
    "task0-round0-after-stage2": {
        "expert": result(drawer_open=38, door_open=29).to_dict(),
        "rl": result(drawer_new=35).to_dict(),
        "unseen": result(window=4).to_dict(),
    },
    "seconds": {"collect": 10.4, "stage0": 99.6},
}


def test_rows_are_the_evaluations_in_order():
    assert list(evaluations(RESULTS)) == ["after-stage0", "task0-round0-after-stage1", "task0-round0-after-stage2"]
    table = rows(RESULTS)
    # Wilson's interval of 10 of 40 is [.1419, .4019], of 68 of 80 (the two expert tasks) [.7558, .9121].
    assert table[0][1:3] == ("0.85 [0.76, 0.91] n=80", "0.25 [0.14, 0.40] n=40")
    assert table[1][1] == "" and table[1][2].startswith("0.90 [") and table[1][3] == ""
    assert len(table) == 3 and all(len(row) == 4 for row in table)


def test_the_comparison_is_between_the_first_and_the_last_evaluation_of_a_group():
    before, after = first_and_last(RESULTS, "rl")
    assert (before.mean, after.mean) == (10 / 40, 35 / 40)
    assert first_and_last({"after-stage0": RESULTS["after-stage0"]}, "rl") is None
    assert first_and_last(RESULTS, "nothing") is None


def test_sign_test_by_hand():
    """k of n changed episodes the rarer way: p = 2 * sum_{i <= k} C(n, i) / 2^n."""
    before = result(a=10, b=20)
    assert sign_test(before, result(a=13, b=20)) == pytest.approx(2 / 2**3)
    assert sign_test(before, result(a=18, b=19)) == pytest.approx(2 * (1 + 9) / 2**9)
    assert sign_test(result(a=18, b=19), before) == pytest.approx(2 * (1 + 9) / 2**9)
    assert sign_test(before, before) == 1.0
    assert sign_test(before, result(a=12, b=18)) == 1.0


def test_verdict_calls_a_gain_a_loss_and_neither_by_their_names():
    expert, rl, unseen = verdict(RESULTS)
    assert expert.startswith("Expert tasks: -0.01 [") and "no difference" in expert
    assert rl.startswith("RL tasks: +0.62 [+0.") and rl.endswith(": a gain.")
    assert unseen.startswith("Unseen tasks: -0.40 [-0.") and unseen.endswith(": a loss.")
    assert verdict({"after-stage0": RESULTS["after-stage0"]}) == []


def test_the_terminal_shows_the_intervals():
    """Square brackets are markup to rich."""
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(RESULTS))
    text = console.export_text()
    assert "0.25 [0.14, 0.40] n=40" in text and "RL tasks" in text


def test_versions_are_those_installed():
    import gymnasium
    import torch

    found = versions()
    assert found["torch"] == torch.__version__ and found["gymnasium"] == gymnasium.__version__
    assert "python" in found and "vla-rl" in found


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    for key, value in RESULTS.items():
        run.add_result(key, value)
    for step in (0, 20, 40):
        run.log({"losses/bc_loss": 1.0 / (1 + step)}, phase="stage0", step=step)
    times = {"time/rollout_s": 30.0, "time/simulate_s": 12.0, "time/encode_s": 8.0, "time/update_s": 5.0}
    for step, rate in ((10_000, float("nan")), (20_000, 0.75)):
        run.log({"charts/success_rate": rate, **times}, phase="task0-round0-stage1", step=step)
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    (run.path / "frames").mkdir()
    np.savez_compressed(frames_file(run.path, "after-stage0", "desk/open:new"), frames[:4], frames[4:])
    run.close()
    return run.path, frames


def test_report_holds_every_number_and_picture(run):
    path, frames = run
    report = write_report(path, command="vla-rl train something", wall_clock_s=150.0, notes=["A note."])
    text = report.read_text()
    assert report == path / "report.md"
    for expected in ("    vla-rl train something", "Wall-clock: 2.5 minutes", "A note.", "0.25 [0.14, 0.40] n=40"):
        assert expected in text
    assert all(sentence in text for sentence in verdict(RESULTS))
    (stage1,) = (line for line in text.splitlines() if "20,000" in line)
    assert "drawer-open:new" in stage1 and "321" in stage1 and "1.025" in stage1 and "0.25 -> 0.75" in stage1
    for expected in ("simulate and render | 12 |", "encode | 8 |", "rest of the rollout | 10 |", "update | 5 |"):
        assert expected in text
    assert "| stage0 | 100 |" in text
    tasks = [line for line in text.splitlines() if "| drawer-new |" in line]
    assert len(tasks) == 3 and "| 0.88 | [" in tasks[-1] and "| 40 | 12 |" in tasks[-1]
    assert "![curves](curves.png)" in text and "](videos/after-stage0-desk%252Fopen+new.gif)" in text
    curves = imageio.imread(path / "curves.png")
    assert curves.ndim == 3 and len(np.unique(curves.reshape(-1, curves.shape[-1]), axis=0)) > 50
    video = imageio.imread(path / "videos" / "after-stage0-desk%2Fopen+new.gif")
    assert video.shape == (6, 256, 256, 3)
    enlarged = frames.repeat(8, axis=1).repeat(8, axis=2).astype(int)
    assert np.abs(video.astype(int) - enlarged).mean() < 20  # a gif has 256 colours


def test_a_report_can_be_written_again(run):
    path, _ = run
    first = write_report(path, command="c", wall_clock_s=1.0, notes=[]).read_text()
    assert write_report(path, command="c", wall_clock_s=1.0, notes=[]).read_text() == first


def test_a_run_of_stage_0_alone_has_a_report(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.add_result("after-stage0", RESULTS["after-stage0"])
    text = write_report(run.path, command="c", wall_clock_s=1.0, notes=[]).read_text()
    assert "0.25 [0.14, 0.40] n=40" in text and "## Stage 1" not in text


def test_a_bar_in_the_name_of_a_task_does_not_end_its_cell(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.add_result("after-stage0", {"rl": result(**{"push|pull": 10}).to_dict()})
    text = write_report(run.path, command="c", wall_clock_s=1.0, notes=[]).read_text()
    assert "| after stage 0 | push\\|pull | 0.25 | [0.14, 0.40] | 40 | 12 |" in text


def test_a_report_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        write_report(tmp_path, command="c", wall_clock_s=1.0, notes=[])


def test_a_run_that_ends_in_a_rollback_is_judged_by_the_weights_that_it_kept():
    back = {"guard": "rollback", "phase": "task0-round0-after-stage2", "evaluation": "after-stage0", "message": ""}
    worse = {"rl": result(drawer_new=0).to_dict()}
    results = RESULTS | {"task0-round0-after-stage1": worse, "task0-round0-after-stage2": worse}
    (lost,) = (sentence for sentence in verdict(results) if sentence.startswith("RL"))
    assert "-0.25" in lost and "a loss" in lost
    rolled, said = verdict(results | {"guards": [back]})
    assert "+0.00" in rolled and "a loss" not in rolled
    assert said == "The end is after stage 0: what came later was given up (rollback)."
    earlier = back | {"phase": "task0-round0-after-stage1"}
    assert verdict(results | {"guards": [earlier]}) == verdict(results), "training went on from there"
