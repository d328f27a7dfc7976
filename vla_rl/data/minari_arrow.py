"""Minari data sets whose episodes lie in Arrow or Parquet files, one folder each, read with pyarrow alone."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.encoded_frames import decode_frames
from vla_rl.data.foreign import MAX_TEXT, Arrays, join_path, read_attributes, read_json
from vla_rl.data.minari_spaces import read_space, row_shapes
from vla_rl.data.packages import needed
from vla_rl.data.parquet import open_table
from vla_rl.data.safety import MAX_EPISODE_BYTES, UnsafeFileError, check_inside

FORMATS = ("arrow", "parquet")
COLUMNS = ("observations", "actions", "rewards", "terminations", "truncations", "infos")


def read_episodes(root: Path, metadata: Mapping[str, Any]) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    """Arrays of every episode by path, as of ``flatten``, and what its own metadata say.

    Args:
        root: folder of ``metadata.json``.
        metadata: its content.

    Raises:
        ImportError: if pyarrow is not installed.
        UnsafeFileError: if a file lies elsewhere, or could take more memory than its bytes can hold.
        ValueError: if the spaces are not in the metadata, or a file is missing or damaged.
    """
    rows: dict[str, tuple[tuple[int, ...], int]] = {}
    for name in ("observation", "action"):
        space = read_space(metadata, f"{name}_space")
        if space is None:
            raise ValueError(f"'{root / 'metadata.json'}' notes no {name}_space, which Arrow and Parquet files need")
        rows |= row_shapes(space, f"{name}s")
    shapes = {path: shape for path, (shape, _) in rows.items()}
    row_bytes = 8 + sum(math.prod(shape) * size for shape, size in rows.values())  # 8 for the reward
    for number in range(metadata["total_episodes"]):
        folder = root / str(number)
        table = _read_table(folder, root, metadata["data_format"], row_bytes)
        arrays: Arrays = {}
        for name in COLUMNS:
            if name in table.column_names:
                # Observations and infos have one row more than the others, which are padded.
                last = table.num_rows if name in ("observations", "infos") else max(table.num_rows - 1, 0)
                column = table.column(name).slice(0, last).combine_chunks()
                arrays |= _arrays(column, name, shapes, f"'{folder}': '{name}'")
        yield arrays, read_attributes(read_json(folder / "metadata.json", root), f"episode {number}")


def _read_table(folder: Path, root: Path, form: str, row_bytes: int) -> Any:
    pa = needed("pyarrow")
    files = sorted(folder.glob(f"*.{form}"))
    if len(files) != 1:
        raise ValueError(f"'{folder}' holds {len(files)} .{form} files, expected one; fetch the data set again")
    path = files[0]
    check_inside(path, root)
    if path.stat().st_size > MAX_EPISODE_BYTES:
        raise UnsafeFileError(f"'{path}' has more than {MAX_EPISODE_BYTES:,} bytes; refused")
    if form == "parquet":
        table = open_table(path, root, row_bytes=row_bytes)
        return table.read_columns([name for name in COLUMNS if name in table.names])
    try:
        with pa.memory_map(str(path)) as source:
            content = source.read_buffer().slice(8)  # after the magic number; the footer is not used
        for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(content)):
            if message.type not in ("schema", "record batch") or (
                message.type == "record batch" and _is_compressed(message.metadata.to_pybytes())
            ):
                raise UnsafeFileError(f"'{path}' is compressed, so its size is not known; write it anew without")
        table = pa.ipc.open_stream(pa.BufferReader(content)).read_all()
        table.validate(full=True)  # pyarrow follows offsets without looking where they lead
        return table
    except UnsafeFileError:
        raise
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise ValueError(f"'{path}' cannot be read ({' '.join(str(error).split())[:200]}); fetch it again") from error


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch says so, in the flatbuffer ahead of it (Message.fbs: header, then its compression)."""

    def field(table: int, number: int) -> int:
        entries = table - struct.unpack_from("<i", metadata, table)[0]
        at = 4 + 2 * number
        there = at < struct.unpack_from("<H", metadata, entries)[0]
        offset = struct.unpack_from("<H", metadata, entries + at)[0] if there else 0
        return table + offset if offset else 0

    def follow(at: int) -> int:
        return at + struct.unpack_from("<I", metadata, at)[0]

    header = field(follow(0), 2)
    return not header or bool(field(follow(header), 3))


def _arrays(column: Any, name: str, shapes: Mapping[str, tuple[int, ...]], where: str, field: Any = None) -> Arrays:
    """A column, or all below it, as arrays by path."""
    pa = needed("pyarrow")
    kind, rows = column.type, len(column)
    if pa.types.is_struct(kind):
        found: Arrays = {}
        for k in range(kind.num_fields):
            found |= _arrays(column.field(k), join_path(name, kind.field(k).name), shapes, where, kind.field(k))
        return found
    if column.null_count:
        raise ValueError(f"{where} has empty cells in '{name}'")
    if pa.types.is_binary(kind):
        return {name: decode_frames(column.to_pylist(), f"{where}: '{name}'", formats=("JPEG",))}
    if pa.types.is_string(kind):
        if name.split("/")[0] == "actions":
            return {name: np.array([*column.to_pylist(), None], object)[:-1]}
        return {name: np.array(str(column[0])[:MAX_TEXT])} if rows else {}
    noted = (field.metadata or {}).get(b"shape") if field is not None else None
    shape = tuple(map(int, noted.split(b","))) if noted else shapes.get(name, ())
    while pa.types.is_nested(column.type) and not pa.types.is_struct(column.type):
        column = column.flatten()
    values = np.empty(0, object) if pa.types.is_struct(column.type) else column.to_numpy(zero_copy_only=False)
    if not shape and rows and len(values) % rows == 0 and len(values) != rows:
        shape = (len(values) // rows,)
    if values.dtype.kind not in "biuf" or len(values) != rows * math.prod(shape):
        raise ValueError(f"{where} has {len(values)} values in '{name}', expected {rows} times {list(shape)} numbers")
    return {name: values.reshape(rows, *shape)}
