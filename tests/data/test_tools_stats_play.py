"""Statistics against NumPy on all steps at once, kept or counted, and pictures against their frames."""

import json

import numpy as np
import pytest
from episode_maker import make_episode

from vla_rl.data import EpisodeStore, compute_statistics, merge, play, stats, verify
from vla_rl.data.moments import pack_moments


@pytest.fixture
def store(tmp_path):
    with EpisodeStore(tmp_path / "demos") as store:
        for number in range(7):
            store.append(make_episode(number, steps=3 + number, task="ab"[number % 2]))
    return EpisodeStore(tmp_path / "demos", "r")


def check_task(task, episodes):
    lengths = [episode.total_steps for episode in episodes]
    returns = [episode.rewards.sum() for episode in episodes]
    assert (task.episodes, task.steps) == (len(episodes), sum(lengths))
    assert task.lengths == (min(lengths), np.median(lengths), max(lengths))
    np.testing.assert_allclose(task.returns, (min(returns), np.mean(returns), max(returns)))
    assert task.success_rate == np.mean([episode.success for episode in episodes])
    for array, blocks in (
        (task.actions, [episode.actions for episode in episodes]),
        (task.state, [episode.observations["state"][:-1] for episode in episodes]),
    ):
        steps = np.concatenate(blocks).astype(np.float64)
        np.testing.assert_allclose(array.mean, steps.mean(axis=0))
        np.testing.assert_allclose(array.std, steps.std(axis=0))
        np.testing.assert_array_equal(array.minimum, steps.min(axis=0))
        np.testing.assert_array_equal(array.maximum, steps.max(axis=0))


def test_stats_are_those_of_all_steps_of_a_task(store):
    episodes = list(store)
    first, second = stats(store)
    assert (first.task, second.task) == ("a", "b")
    check_task(first, episodes[::2])
    check_task(second, episodes[1::2])
    check_task(stats(store, where="task == 'b' and index > 1")[0], episodes[3::2])
    with pytest.raises(ValueError, match="fits 'index > 99'"):
        stats(store, where="index > 99")


def test_stats_of_one_task_agree_with_the_normalisation(tmp_path, store):
    (task,) = stats(store, where="task == 'a'")
    with EpisodeStore(tmp_path / "one") as one:
        for index in range(0, 7, 2):
            one.append(store[index])
        reference = compute_statistics([one])
    np.testing.assert_allclose(task.actions.std, reference.action_std, rtol=1e-6)
    np.testing.assert_allclose(task.state.mean, reference.state_mean, rtol=1e-6)


def opened(store, monkeypatch, **options):
    """Numbers of the episodes that stats opened, and what it returned."""
    numbers = []
    original = EpisodeStore.open_episode
    with monkeypatch.context() as patch:
        patch.setattr(EpisodeStore, "open_episode", lambda self, i: (numbers.append(i), original(self, i))[1])
        return numbers, stats(store, **options)


def without_moments(store, damage=""):
    """The store as if an older version had written it, or with damaged entries."""
    path = store.path / "data" / "episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["moments"] = damage
        if not damage:
            del line["moments"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return EpisodeStore(store.path, "r")


def test_no_episode_is_opened_not_even_in_copies_or_after_an_index_was_lost(tmp_path, store, monkeypatch):
    expected = repr(stats(store))
    (store.path / "data" / "episodes.jsonl").unlink()
    EpisodeStore(store.path).close()
    copied = merge([store.path], tmp_path / "copied")
    for same in (store, EpisodeStore(store.path, "r"), copied):
        numbers, found = opened(same, monkeypatch)
        assert (numbers, repr(found)) == ([], expected)


@pytest.mark.parametrize("damage", ["", "AAAA", "no base64"])
def test_where_the_index_has_no_moments_episodes_are_opened(store, monkeypatch, damage):
    expected = stats(store), compute_statistics([store])
    older = without_moments(store, damage)
    numbers, found = opened(older, monkeypatch)
    assert numbers == list(range(7)) and repr((found, compute_statistics([older]))) == repr(expected)
    with EpisodeStore(store.path) as writer:
        writer.append(make_episode(7, task="b"))
    numbers, (_, second) = opened(EpisodeStore(store.path, "r"), monkeypatch)
    assert numbers == list(range(7))
    check_task(second, list(EpisodeStore(store.path, "r"))[1::2])


def test_verify_compares_the_moments_with_the_episodes(store):
    def found(store):
        return [finding.message for finding in verify(store.path).errors if finding.file == "data/episodes.jsonl"]

    assert found(store) == found(without_moments(store)) == []
    wrong = found(without_moments(store, pack_moments(np.zeros((4, 7)))))
    assert len(wrong) == 7 and "line 1 holds other moments" in wrong[0]


def test_a_sheet_shows_frames_of_the_episodes_and_their_outcome(tmp_path, store):
    image = pytest.importorskip("PIL.Image")
    out = play(store, tmp_path / "sheet.png", [0, 3], height=64, columns=4)
    sheet = np.asarray(image.open(out))
    first, last = (np.kron(store[3].observations["image"][k], np.ones((8, 8, 1), np.uint8)) for k in (0, -1))
    height = sheet.shape[0] // 2
    row = sheet[height:]
    top = next(y for y in range(height - 64) if np.array_equal(row[y : y + 64, :64], first))
    right = row[top : top + 64, 3 * 66 : 3 * 66 + 64]
    np.testing.assert_array_equal(right[3:-3, 3:-3], last[3:-3, 3:-3])
    green, red = np.array([70, 190, 100]), np.array([215, 80, 70])
    np.testing.assert_array_equal(right[0, 0], green)  # episode 3 succeeded, episode 0 did not
    np.testing.assert_array_equal(sheet[top, 3 * 66], red)


def test_a_sheet_shows_the_instruction(tmp_path):
    image = pytest.importorskip("PIL.Image")
    sheets = []
    for name, words in (("a", "open the drawer"), ("b", "open the drawer"), ("c", "close the window")):
        with EpisodeStore(tmp_path / name) as store:
            store.append(make_episode(0, instruction=words))
        sheets.append(np.asarray(image.open(play(store, tmp_path / f"{name}.png", [0], height=64, columns=4))))
    differ = np.flatnonzero((sheets[0] != sheets[2]).any((1, 2)))
    assert np.array_equal(sheets[0], sheets[1]) and 4 <= len(differ) <= 20  # rows of pixels: one line of words
    assert (sheets[2][differ] > 200).all(-1).any()  # in letters that stand out


def test_bars_show_the_action(store):
    pytest.importorskip("PIL")
    from vla_rl.data.pictures import _bars

    episode = make_episode(0)
    episode.actions[2] = [1, -1, 0.5, 0]
    picture = _bars(episode, 2, 208)
    blue = (picture == (95, 160, 240)).all(axis=2)
    upper, lower = (part[:, 4:204].reshape(22, 4, 50).any(axis=2).sum(axis=0) for part in (blue[:22], blue[22:]))
    assert upper.tolist()[0] >= 17 and upper[1] <= 1 and 8 <= upper[2] <= 10 and upper[3] <= 1
    assert lower[1] >= 17 and lower[0] <= 1 and lower[3] <= 1
    assert not (_bars(episode, 5, 208) == (95, 160, 240)).all(axis=2).any()


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_shows_every_step(tmp_path, store, suffix):
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    out = play(store, tmp_path / f"video{suffix}", [1, 2], height=64, fps=10)
    frames = imageio.imread(out)
    shown = [make_episode(n, steps=3 + n).observations["image"] for n in (1, 2)]
    assert len(frames) == sum(map(len, shown)) + 2 * 8 or suffix == ".gif"  # a gif joins equal frames
    expected = np.kron(shown[0][0], np.ones((8, 8, 1), np.uint8)).astype(float)
    assert np.abs(frames[0][:64, :64, :3] - expected).mean() < 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos", f"video{suffix}"]


def test_play_refuses_what_it_cannot_draw(tmp_path, store):
    pytest.importorskip("PIL")
    with pytest.raises(ValueError, match=r"should end in \.mp4"):
        play(store, tmp_path / "video.avi", [0])
    with pytest.raises(ValueError, match="no episodes"):
        play(store, tmp_path / "video.gif", [])
    with pytest.raises(IndexError):
        play(store, tmp_path / "video.png", [7])
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        play(store, tmp_path / "mine.png", [0])
    assert (tmp_path / "mine.png").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos", "mine.png"]
