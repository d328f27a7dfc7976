"""Expressions, samples and splits, against plain Python."""

from collections import Counter

import pytest

from vla_rl.data import EpisodeInfo, select
from vla_rl.data.selection import balanced_sample, split_by_fraction


def info(number, *, task="drawer-open", **changes):
    fields = {
        "task": task, "success": number % 3 == 0, "source": "expert", "total_steps": 10 * number, "iteration": 0,
        "seed": None if number % 5 == 4 else number, "instruction": "open it", "policy_version": "", "return_": 0.5,
        "max_task_id": 0, "num_bytes": 100,
    }  # fmt: skip
    return EpisodeInfo(**{**fields, **changes})


INFOS = [info(i, task=("drawer-open", "door-open")[i % 2]) for i in range(20)]


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("success", lambda i, e: e.success),
        (
            "success and task == 'drawer-open' and total_steps < 120",
            lambda i, e: e.success and e.task == "drawer-open" and e.total_steps < 120,
        ),
        ("not success or index in (1, 2)", lambda i, e: not e.success or i in (1, 2)),
        ("'drawer' in task", lambda i, e: "drawer" in e.task),
        ("30 <= total_steps < 90", lambda i, e: 30 <= e.total_steps < 90),
        ("index % 7 == 0", lambda i, e: i % 7 == 0),
        ("total_steps / 10 + 1 > -index * 2 + 30", lambda i, e: e.total_steps / 10 + 1 > -i * 2 + 30),
        ("seed is None", lambda i, e: e.seed is None),
        ("seed < 9", lambda i, e: e.seed is not None and e.seed < 9),
        ("seed + 1 < 9", lambda i, e: e.seed is not None and e.seed + 1 < 9),
        ("return_ == 0.5", lambda i, e: True),
        (None, lambda i, e: True),
    ],
)
def test_an_expression_means_what_python_means(where, holds):
    expected = [i for i, entry in enumerate(INFOS) if holds(i, entry)]
    assert select(INFOS, where) == expected
    assert expected


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="no attribute 'sucess'; did you mean 'success'"):
        select(INFOS, "sucess and total_steps < 3")


@pytest.mark.parametrize(
    "where",
    [
        "__import__('os').system('touch /tmp/owned')", "(lambda: 1)()", "task.upper() == 'A'", "[x for x in (1,)]",
        "2 ** 99999999", "'a' * 10**9 == task", "f'{task}'", "task[0] == 'd'", "(x := 3)", "True if success else False",
        "b'a' == task", "...", "{1: 2}", "-" * 1500 + "index > 0", "(" * 900 + "index" + ")" * 900, "success and",
        "", "index > 0 " + "or index > 0 " * 500, "task < 3", "1 / index > 0", "index & 1", "~index", "await task",
        "'\0' in task",
    ],
)  # fmt: skip
def test_everything_else_is_refused_in_one_sentence(where):
    with pytest.raises(ValueError) as caught:
        select(INFOS, where)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value) and len(str(caught.value)) < 2500


def test_a_sample_is_balanced_over_the_tasks_and_repeats_with_its_seed():
    infos = [info(i, task=task) for i, task in enumerate("a" * 30 + "b" * 3 + "c" * 30)]
    chosen = balanced_sample(infos, 21, seed=1)
    assert Counter(infos[i].task for i in chosen) == {"a": 9, "b": 3, "c": 9}
    assert chosen == sorted(set(chosen)) == balanced_sample(infos, 21, seed=1) != balanced_sample(infos, 21, seed=2)
    assert balanced_sample(infos, 63, seed=0) == list(range(63))
    for number in (0, 64):
        with pytest.raises(ValueError, match="ask for 1 to 63"):
            balanced_sample(infos, number, seed=0)


def test_a_split_keeps_the_share_of_every_task():
    infos = [info(i, task=task) for i, task in enumerate("ab" * 10 + "c" * 5)]
    first, second = split_by_fraction(infos, 0.8, seed=3)
    assert sorted(first + second) == list(range(25))
    assert Counter(infos[i].task for i in first) == {"a": 8, "b": 8, "c": 4}
    assert (first, second) == split_by_fraction(infos, 0.8, seed=3) != split_by_fraction(infos, 0.8, seed=4)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_fraction(infos, 1.0, seed=0)
