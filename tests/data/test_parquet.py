"""Parquet tables that hold more than their size shows, and ordinary ones."""

import numpy as np
import pytest

from vla_rl.data import UnsafeFileError
from vla_rl.data.parquet import open_table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def test_rows_that_all_refer_to_one_long_value_are_refused(tmp_path):
    """A file of some hundred bytes, of which plain reading makes 3 GB."""
    resource = pytest.importorskip("resource")
    value = b"\xff\xd8\xff" + b"a" * 300_000
    column = pa.DictionaryArray.from_arrays(np.zeros(10_000, np.int32), pa.array([value]))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": column}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1000
    table = open_table(path, tmp_path, row_bytes=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnsafeFileError, match="far more than its size"):
        table.read_columns(["x"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # in KiB


def test_what_is_read_in_parts_is_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_rl.data.parquet._BATCH_BYTES", 1000)
    rng = np.random.default_rng(0)
    texts = [f"{number}" * (number % 7) for number in range(500)]
    written = pa.table({"a": rng.normal(size=500), "b": texts, "c": [[k, k + 1] for k in range(500)]})
    pq.write_table(written, tmp_path / "a.parquet", row_group_size=120)
    table = open_table(tmp_path / "a.parquet", tmp_path, row_bytes=24)
    assert table.read_columns(["a", "b", "c"]).combine_chunks().equals(written)
    pq.write_table(written.slice(0, 0), tmp_path / "empty.parquet")
    assert open_table(tmp_path / "empty.parquet", tmp_path, row_bytes=24).read_all(["a", "b"]) == {"a": [], "b": []}
