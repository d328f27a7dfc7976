import sys

import curves
import launch
import numpy as np
import pytest
from curves import CurvesError, find_runs, interval, iqm, on_grid, stack, table
from scipy.stats import bootstrap, trim_mean
from torch.utils.tensorboard import SummaryWriter


def log(root, *, exp_name, task, seed, values, tag="charts/success_rate"):
    """A log as the scripts write it: the value of every 100th env step."""
    writer = SummaryWriter(str(root / "VLA" / f"Toy-v0__{exp_name}__{task}__{seed}"))
    options = {"exp_name": exp_name, "env_id": "VLA/Toy-v0", "task": task, "seed": seed, "note": "a|b"}
    lines = "\n".join(f"|{name}|{value}|" for name, value in options.items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{lines}")
    for i, value in enumerate(values):
        writer.add_scalar(tag, value, 100 * (i + 1))
    writer.close()


def test_runs_are_read_with_their_task_and_seed(tmp_path):
    log(tmp_path, exp_name="ppo", task="reach:new", seed=2, values=[0.25, 0.5])
    log(tmp_path, exp_name="ppo", task="reach:new", seed=1, values=[0.0, 1.0])
    log(tmp_path, exp_name="ppo", task="reach:new", seed=3, values=[7.0], tag="losses/entropy")
    runs = find_runs([tmp_path], tag="charts/success_rate", by=["exp_name"])
    assert [(run.algorithm, run.task, run.seed) for run in runs] == [
        ("ppo", "VLA/Toy-v0 reach:new", 1),
        ("ppo", "VLA/Toy-v0 reach:new", 2),
    ]
    assert runs[1].steps.tolist() == [100, 200] and runs[1].values.tolist() == [0.25, 0.5]
    assert on_grid(runs[1], np.array([0, 150, 900])).tolist() == [0.25, 0.375, 0.5]
    text = table(runs, tag="charts/success_rate", resamples=50)
    assert "| ppo | VLA/Toy-v0 reach:new | 2 | 1.00 0.50 | 0.75 | 200 |" in text


def test_logs_that_make_no_comparison_are_refused(tmp_path):
    with pytest.raises(CurvesError, match="no log below"):
        find_runs([tmp_path], tag="charts/success_rate", by=["exp_name"])
    log(tmp_path / "first", exp_name="ppo", task="a", seed=1, values=[0.1])
    log(tmp_path / "first", exp_name="ppo", task="a", seed=2, values=[0.1])
    log(tmp_path / "first", exp_name="ppo", task="b", seed=1, values=[0.1])
    runs = find_runs([tmp_path], tag="charts/success_rate", by=["exp_name"])
    with pytest.raises(CurvesError, match="different numbers of seeds"):
        stack(runs, np.array([0.0]))
    log(tmp_path / "second", exp_name="ppo", task="a", seed=1, values=[0.1])
    with pytest.raises(CurvesError, match="second run"):
        find_runs([tmp_path], tag="charts/success_rate", by=["exp_name"])


def test_interquartile_mean_by_hand():
    scores = np.array([[0.0, 1.0, 2.0, 100.0], [3.0, 4.0, 5.0, -50.0]])[..., None]
    assert iqm(scores).tolist() == [(1 + 2 + 3 + 4) / 4]


def test_interval_is_the_percentile_bootstrap_over_seeds():
    scores = np.random.default_rng(0).normal(size=(1, 12, 1))
    low, high = interval(scores, resamples=20_000)
    theirs = bootstrap(
        (scores[0, :, 0],),
        lambda x, axis: trim_mean(x, 0.25, axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert low[0] == pytest.approx(theirs.low, abs=0.02) and high[0] == pytest.approx(theirs.high, abs=0.02)


def test_the_bootstrap_is_stratified_by_task():
    """With seeds that agree and tasks that do not, there is nothing to draw: the interval is a point."""
    low, high = interval(np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])[..., None], resamples=200)
    assert low[0] == high[0] == 0.5


def test_curves_are_written(tmp_path):
    for seed in (1, 2):
        for task in ("a", "b"):
            log(tmp_path / "runs", exp_name="ppo", task=task, seed=seed, values=[0.1 * seed, 0.5])
    curves.main(curves.Args(runs=(tmp_path / "runs",), out=tmp_path / "out" / "curves", resamples=20))
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    assert "interquartile mean | 4 | | 0.50 [0.50, 0.50]" in (tmp_path / "out" / "curves.md").read_text()


def test_launch_runs_every_task_and_seed_once_and_repeats_what_failed(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pathlib\n"
        f"ran = pathlib.Path({str(tmp_path)!r}, 'ran'); ran.mkdir(exist_ok=True)\n"
        "name = '_'.join(sys.argv[1:])\n"
        "with (ran / name).open('a') as file: file.write('x')\n"
        f"sys.exit(3 if sys.argv[-1] == '2' and not pathlib.Path({str(tmp_path)!r}, 'mended').exists() else 0)\n"
    )
    args = launch.Args(
        command=f"{sys.executable} {script} --flag", tasks=("a", "b"), num_seeds=2, workers=2, logs=tmp_path / "logs"
    )
    assert launch.main(args) == 1
    assert "exit code 3" in capsys.readouterr().out
    (tmp_path / "mended").touch()
    assert launch.main(args) == 0
    times = {path.name: len(path.read_text()) for path in (tmp_path / "ran").iterdir()}
    assert times == {
        "--flag_--task_a_--seed_1": 1,
        "--flag_--task_a_--seed_2": 2,
        "--flag_--task_b_--seed_1": 1,
        "--flag_--task_b_--seed_2": 2,
    }
    assert launch.main(args) == 0
    assert capsys.readouterr().out.count("done before") == 2 + 4
