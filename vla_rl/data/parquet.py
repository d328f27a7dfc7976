"""Parquet tables that may come from anywhere: their claims are checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.packages import needed
from vla_rl.data.safety import MAX_COMPRESSION, MAX_EPISODE_BYTES, SLACK_BYTES, UnsafeFileError, check_inside

_BATCH_BYTES = 1 << 28


def open_table(path: Path, root: Path, *, row_bytes: int) -> Table:
    """Opens a table of a data set, whose rows will take ``row_bytes`` each in memory beside their texts and pictures.

    Raises:
        ImportError: if pyarrow is not installed.
        FileNotFoundError: if there is no such file.
        UnsafeFileError: if it lies outside ``root``, or claims more rows or bytes than its size can hold.
        ValueError: if it is no parquet file.
    """
    pa, pq = needed("pyarrow"), needed("pyarrow.parquet")
    check_inside(path, root)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' of the data set is missing; fetch it again")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"'{path}' is no parquet file that can be read ({str(error)[:200]}); fetch it again"
        ) from error
    limit = MAX_COMPRESSION * path.stat().st_size + SLACK_BYTES
    groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    claims = [max(group.num_rows * row_bytes, group.total_byte_size) for group in groups]
    if any(min(group.num_rows, group.total_byte_size) < 0 for group in groups) or sum(claims) > limit:
        raise UnsafeFileError(
            f"'{path}' claims {sum(claims):,} bytes, far more than its size; the file is cut or forged"
        )
    if max(claims, default=0) > MAX_EPISODE_BYTES:
        raise UnsafeFileError(
            f"'{path}' has a block of {max(claims):,} bytes, more than {MAX_EPISODE_BYTES:,}; refused"
        )
    return Table(path, file, limit)


class Table:
    """An open parquet file, of which no more than ``limit`` bytes are read at once."""

    def __init__(self, path: Path, file: Any, limit: int) -> None:
        self.path = path
        self._file, self._limit = file, limit
        self.names: list[str] = file.schema_arrow.names
        self._starts = np.cumsum([0] + [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)])
        self._episodes: np.ndarray | None = None
        self._block: tuple[tuple[int, int, tuple[str, ...]], Any] | None = None

    def read_all(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns as lists.

        Raises:
            ValueError: if one is missing or damaged.
        """
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(f"'{self.path}' has no column '{missing[0]}', so it is not of LeRobot v3")
        table = self._read(range(self._file.num_row_groups), names)
        return {name: table.column(name).to_pylist() for name in names}

    def read_columns(self, names: Sequence[str]) -> Any:
        """Columns of all rows, as an Arrow table; raises ValueError if one is damaged."""
        return self._read(range(self._file.num_row_groups), names)

    def read_episode(self, number: int, names: Sequence[str]) -> Any:
        """The rows of one episode, as an Arrow table.

        Raises:
            ValueError: if they do not lie together, or a column is damaged.
        """
        if self._episodes is None:
            table = self._read(range(self._file.num_row_groups), ["episode_index"])
            self._episodes = column_values(table, "episode_index", (1,)).reshape(-1)
        rows = np.flatnonzero(self._episodes == number)
        if not len(rows) or rows[-1] - rows[0] + 1 != len(rows):
            raise ValueError(f"'{self.path}' has no rows of episode {number}, or not one after the other")
        first, last = np.searchsorted(self._starts, [rows[0], rows[-1]], side="right") - 1
        key = (int(first), int(last), tuple(names))
        if self._block is None or self._block[0] != key:
            self._block = (key, self._read(range(first, last + 1), names))
        return self._block[1].slice(int(rows[0] - self._starts[first]), len(rows))

    def _read(self, groups: range, names: Sequence[str]) -> Any:
        pa: Any = needed("pyarrow")
        # Any number of rows may refer to one long text or picture, which no claim of the file tells; so in parts.
        largest = max((self._file.metadata.row_group(k).total_byte_size for k in groups), default=0)
        rows = min(max(1, _BATCH_BYTES // max(1, largest)), 1 << 16)
        batches: list[Any] = []
        total = 0
        try:
            found = self._file.iter_batches(rows, row_groups=list(groups), columns=list(names), use_threads=False)
            for batch in found:
                batches.append(batch)
                total += batch.nbytes
                if total > self._limit:
                    raise UnsafeFileError(f"'{self.path}' holds far more than its size once it is read; refused")
            if batches:
                return pa.Table.from_batches(batches)
            return self._file.read_row_groups(list(groups), columns=list(names), use_threads=False)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"cannot read '{self.path}' ({str(error)[:200]}); fetch it again") from error


def column_values(table: Any, name: str, shape: tuple[int, ...] | None) -> Any:
    """A column of numbers as an array ``[T, *shape]``, or for ``shape`` None one of encoded pictures as their bytes.

    Raises:
        ValueError: if its cells are empty, of another kind or of another shape.
    """
    pa: Any = needed("pyarrow")
    column = table.column(name).combine_chunks()
    while isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if shape is None:
        cells = column.to_pylist()
        pictures = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
        if not all(isinstance(picture, bytes) for picture in pictures):
            raise ValueError(f"'{name}' has pictures that lie elsewhere; only ones inside the tables can be imported")
        return pictures
    while pa.types.is_nested(column.type) and not pa.types.is_struct(column.type):
        column = column.flatten()
    expected = (table.num_rows, *shape)
    if column.null_count or len(column) != np.prod(expected, dtype=np.int64):
        raise ValueError(f"'{name}' has {len(column)} numbers or empty cells, expected {list(expected)}")
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"'{name}' holds {values.dtype}, expected numbers")
    return values.reshape(expected)
