import json

import h5py
import numpy as np
import pytest
from episode_maker import make_episode

from vla_rl.data import BalancedSampler, EpisodeStore

# Task -> steps: in the experts' store "a" has 4 + 6, "b" has 30; in the other one "a" has 10 and "c" has 5.
EXPERT = [("a", 4), ("b", 30), ("a", 6)]
FOUND = [("c", 5), ("a", 10)]


@pytest.fixture
def stores(tmp_path):
    made = []
    for number, table in enumerate((EXPERT, FOUND)):
        with EpisodeStore(tmp_path / f"store_{number}") as store:
            for index, (task, steps) in enumerate(table):
                task_id = "abc".index(task)
                store.append(
                    make_episode(10 * number + index, steps=steps, task=task, task_id=task_id, instruction=f"do {task}")
                )
        made.append(store)
    return made


def frequencies(sampler, batches=100):
    """Share of draws per (task id, store)."""
    drawn = [sampler.sample() for _ in range(batches)]
    codes = np.concatenate([batch.task_id * 2 + batch.store_index for batch in drawn])
    return np.bincount(codes, minlength=6).reshape(3, 2) / len(codes)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # Without weights, "a" has 10 steps in either store.
        (None, [[1 / 6, 1 / 6], [1 / 3, 0], [0, 1 / 3]]),
        ([0.5, 0.5], [[1 / 6, 1 / 6], [1 / 3, 0], [0, 1 / 3]]),
        ([3.0, 1.0], [[1 / 4, 1 / 12], [1 / 3, 0], [0, 1 / 3]]),
        ([0.0, 1.0], [[0, 1 / 2], [0, 0], [0, 1 / 2]]),
    ],
)
def test_tasks_are_balanced_and_stores_weighted_within_them(stores, weights, expected):
    sampler = BalancedSampler(stores, batch_size=256, seed=0, weights=weights)
    found, expected = frequencies(sampler), np.array(expected)
    assert ((found == 0) == (expected == 0)).all()
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / np.sqrt(25600))  # five standard errors
    assert sampler.tasks == (("a", "c") if weights == [0.0, 1.0] else ("a", "b", "c"))


def test_steps_of_a_task_are_uniform(stores):
    sampler = BalancedSampler(stores, batch_size=1000, seed=1)
    counts = np.bincount(np.concatenate([sampler.sample().row_id for _ in range(60)]), minlength=55)
    of_a = np.concatenate([counts[0:4], counts[34:40], counts[45:55]])
    chi_square = ((of_a - of_a.mean()) ** 2 / of_a.mean()).sum()
    assert chi_square < 43.8  # 99.9 % quantile for 19 degrees of freedom


def test_weights_do_not_depend_on_how_much_a_store_holds(tmp_path):
    small, large = (EpisodeStore(tmp_path / name) for name in ("small", "large"))
    small.append(make_episode(0, steps=2))
    large.append(make_episode(1, steps=98))
    shares = {}
    for weights in (None, [0.5, 0.5]):
        sampler = BalancedSampler([small, large], batch_size=20000, seed=0, weights=weights)
        shares[str(weights)] = (sampler.sample().store_index == 0).mean()
    assert shares["None"] == pytest.approx(0.02, abs=0.006)
    assert shares["[0.5, 0.5]"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("max_ram_bytes", [10**9, 0])
def test_a_batch_holds_what_the_episodes_hold(stores, max_ram_bytes):
    sampler = BalancedSampler(stores, batch_size=64, seed=0, max_ram_bytes=max_ram_bytes)
    assert sampler.images_in_ram == (max_ram_bytes > 0)
    batch = sampler.sample()
    assert len(batch) == 64
    assert (batch.images.dtype, batch.images.shape) == (np.uint8, (64, 8, 8, 3))
    assert (batch.state.dtype, batch.state.shape) == (np.float32, (64, 3))
    assert (batch.actions.dtype, batch.actions.shape) == (np.float32, (64, 4))
    assert batch.task_id.dtype == batch.row_id.dtype == np.int64
    for k in range(64):
        episode = stores[batch.store_index[k]][batch.episode_index[k]]
        step = batch.step_index[k]
        np.testing.assert_array_equal(batch.images[k], episode.observations["image"][step])
        np.testing.assert_array_equal(batch.state[k], episode.observations["state"][step])
        np.testing.assert_array_equal(batch.actions[k], episode.actions[step])
        assert batch.task_id[k] == episode.observations["task_id"][step]
        assert batch.instructions[k] == episode.instruction


@pytest.mark.parametrize("max_ram_bytes", [10**9, 0])
def test_rows_are_numbered_by_store_episode_and_step_and_stay_so(stores, max_ram_bytes):
    sampler = BalancedSampler(stores, batch_size=4, seed=0, max_ram_bytes=max_ram_bytes)
    assert sampler.num_rows == 55
    everything = sampler.rows(np.arange(55))
    expected = [(0, 0, 4), (0, 1, 30), (0, 2, 6), (1, 0, 5), (1, 1, 10)]
    triples = [(store, episode, step) for store, episode, steps in expected for step in range(steps)]
    found = zip(everything.store_index, everything.episode_index, everything.step_index, strict=True)
    assert [tuple(map(int, triple)) for triple in found] == triples

    with EpisodeStore(stores[0].path) as store:
        store.append(make_episode(99, steps=3))
    assert sampler.num_rows == 55
    batch = sampler.sample()
    again = sampler.rows(batch.row_id)
    for name in ("images", "state", "actions", "task_id", "row_id"):
        np.testing.assert_array_equal(getattr(again, name), getattr(batch, name))
        np.testing.assert_array_equal(getattr(batch, name), getattr(everything, name)[batch.row_id])
    assert len(sampler.rows([])) == 0
    for wrong in ([55], [-1]):
        with pytest.raises(IndexError, match=r"numbers in \[0, 55\)"):
            sampler.rows(wrong)


def test_draws_follow_the_seed_and_resume(stores):
    def draw(sampler, count=3):
        return np.concatenate([sampler.sample().row_id for _ in range(count)])

    first, second, other = (BalancedSampler(stores, batch_size=16, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(draw(first), draw(second))
    assert (draw(first) != draw(other)).any()
    saved = json.loads(json.dumps(first.state_dict()))
    continued = draw(first)
    resumed = BalancedSampler(stores, batch_size=16, seed=0)
    resumed.load_state_dict(saved)
    np.testing.assert_array_equal(draw(resumed), continued)
    with pytest.raises(ValueError, match="55 steps, but the stores hold 15"):
        BalancedSampler(stores[1:], batch_size=16, seed=0).load_state_dict(saved)


def test_several_cameras_are_stacked_by_name(tmp_path):
    def cameras(size):
        return {
            "image_wrist": np.full((6, size, size, 3), 1, np.uint8),
            "image_front": np.full((6, 8, 8, 3), 2, np.uint8),
            "task_id": np.zeros(6, np.int64),
        }

    stores = [EpisodeStore(tmp_path / f"{size}") for size in (8, 4)]
    for store, size in zip(stores, (8, 4), strict=True):
        store.append(make_episode(observations=cameras(size)))
    for max_ram_bytes in (10**9, 0):
        batch = BalancedSampler(stores[:1], batch_size=3, seed=0, max_ram_bytes=max_ram_bytes).sample()
        assert batch.images.shape == (3, 2, 8, 8, 3) and batch.state is None
        assert (batch.images[:, 0] == 2).all() and (batch.images[:, 1] == 1).all()
    with pytest.raises(ValueError, match="cameras must share one size"):
        BalancedSampler(stores[1:], batch_size=3, seed=0)


def rewrite_images(store, **options):
    for index in range(len(store)):
        path = store.episode_path(index)
        with h5py.File(path, "r+") as file:
            group = file[f"episode_{index}/observations"]
            images = group["image"][()]
            del group["image"]
            group.create_dataset("image", data=images, **options)
        lines = [json.loads(line) for line in (store.path / "data" / "episodes.jsonl").read_text().splitlines()]
        lines[index]["num_bytes"] = path.stat().st_size
        (store.path / "data" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return EpisodeStore(store.path, "r")


def test_stores_with_one_chunk_per_frame_are_read_from_disk_too_and_larger_chunks_are_refused(stores):
    expected = BalancedSampler(stores[:1], batch_size=50, seed=0).sample()
    steps = stores[0].read_steps(1, [29, 0, 7])[0]["image"]
    older = rewrite_images(stores[0], chunks=(1, 8, 8, 3))
    found = BalancedSampler([older], batch_size=50, seed=0, max_ram_bytes=0).sample()
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(older.read_steps(1, [29, 0, 7])[0]["image"], steps)
    compressed = rewrite_images(older, chunks=(1, 8, 8, 3), compression="lzf")
    np.testing.assert_array_equal(compressed.read_steps(1, [29, 0, 7])[0]["image"], steps)
    np.testing.assert_array_equal(BalancedSampler([compressed], batch_size=50, seed=0).sample().images, expected.images)
    found = BalancedSampler([compressed], batch_size=50, seed=0, max_ram_bytes=0).sample()
    np.testing.assert_array_equal(found.images, expected.images)
    larger = rewrite_images(older, chunks=(2, 8, 8, 3))
    np.testing.assert_array_equal(BalancedSampler([larger], batch_size=50, seed=0).sample().images, expected.images)
    with pytest.raises(ValueError, match="several frames per chunk, so single frames cannot be read by position"):
        BalancedSampler([larger], batch_size=50, seed=0, max_ram_bytes=0).sample()


def test_mistakes_are_named(stores, tmp_path):
    empty = EpisodeStore(tmp_path / "empty")
    with pytest.raises(ValueError, match="hold no episodes; append some first"):
        BalancedSampler([empty], batch_size=1, seed=0)
    with pytest.raises(ValueError, match="weights must be 2 numbers >= 0"):
        BalancedSampler(stores, batch_size=1, seed=0, weights=[1.0])
    with pytest.raises(ValueError, match="weights must be 2 numbers >= 0"):
        BalancedSampler(stores, batch_size=1, seed=0, weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="weight 0"):
        BalancedSampler([*stores, empty], batch_size=1, seed=0, weights=[0, 0, 1])
    first = stores[0].index[0].task
    for wrong in ({first: -1.0}, {first: float("nan")}, {"nobody's": 1.0}, {info.task: 0 for info in stores[0].index}):
        with pytest.raises(ValueError, match="task_weights must be numbers >= 0, not all 0, for tasks among"):
            BalancedSampler(stores[:1], batch_size=1, seed=0, task_weights=wrong)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        BalancedSampler(stores, batch_size=0, seed=0)
    empty.append(make_episode(size=16))
    with pytest.raises(ValueError, match="draw from them separately"):
        BalancedSampler([*stores, empty], batch_size=1, seed=0)


def test_an_empty_store_among_others_changes_nothing(stores, tmp_path):
    with_empty = [stores[0], EpisodeStore(tmp_path / "empty"), stores[1]]
    batch = BalancedSampler(with_empty, batch_size=200, seed=0, weights=[1, 1, 1]).sample()
    same = BalancedSampler(stores, batch_size=200, seed=0, weights=[1, 1]).sample()
    np.testing.assert_array_equal(batch.row_id, same.row_id)
    assert set(batch.store_index) == {0, 2}
