"""TFRecord files of ``tf.train.Example`` messages, read without TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.data.packages import needed
from vla_rl.data.safety import MAX_EPISODE_BYTES, UnsafeFileError


def read_records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file, both of their checksums compared.

    Raises:
        ImportError: if google-crc32c is not installed.
        UnsafeFileError: if a record claims more bytes than the file has, or than an episode may have.
        ValueError: if the file is cut off or damaged.
    """
    crc32c = needed("google_crc32c")

    def check(data: bytes, stored: bytes, what: str) -> None:
        crc = crc32c.value(data)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        if len(stored) != 4 or masked != struct.unpack("<I", stored)[0]:
            raise ValueError(f"'{path}': the checksum of {what} of record {number} does not fit; the file is damaged")

    size, number = path.stat().st_size, 0
    with open(path, "rb") as file:
        while header := file.read(8):
            if len(header) < 8:
                raise ValueError(f"'{path}' is cut off in record {number}; fetch it again")
            check(header, file.read(4), "the length")
            (length,) = struct.unpack("<Q", header)
            if length > min(size - file.tell(), MAX_EPISODE_BYTES):
                raise UnsafeFileError(
                    f"'{path}': record {number} claims {length:,} bytes, the file has {size:,}; refused"
                )
            data = file.read(length)
            check(data, file.read(4), "the data")
            yield data
            number += 1


def parse_example(data: bytes, name: str) -> dict[str, np.ndarray | list[bytes]]:
    """The features of a ``tf.train.Example``: float32 or int64 arrays ``[N]``, or lists of ``bytes``.

    Raises:
        ValueError: if the bytes are no such message.
    """
    from google.protobuf.message import DecodeError

    example = _message_class()()
    try:
        example.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"{name} is no tf.train.Example ({error})") from error
    found: dict[str, np.ndarray | list[bytes]] = {}
    for key, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        if kind == "bytes_list":
            found[key] = list(feature.bytes_list.value)
        elif kind is not None:
            values = getattr(feature, kind).value
            found[key] = np.array(values, dtype=np.float32 if kind == "float_list" else np.int64)
    return found


@cache
def _message_class() -> Any:
    """``tf.train.Example`` (tensorflow/core/example/example.proto and feature.proto), built here as it is short."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="vla_rl.tfrecord", syntax="proto3")
    types = descriptor_pb2.FieldDescriptorProto

    def add(parent: Any, name: str, number: int, kind: int, type_name: str = "", *, repeated: bool = False) -> Any:
        label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
        return parent.field.add(name=name, number=number, type=kind, type_name=type_name or None, label=label)

    prefix = ".vla_rl.tfrecord."
    kinds = (("BytesList", types.TYPE_BYTES), ("FloatList", types.TYPE_FLOAT), ("Int64List", types.TYPE_INT64))
    for name, kind in kinds:
        add(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (field, (name, _)) in enumerate(zip(("bytes_list", "float_list", "int64_list"), kinds, strict=True), 1):
        add(feature, field, number, types.TYPE_MESSAGE, prefix + name).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, types.TYPE_STRING)
    add(entry, "value", 2, types.TYPE_MESSAGE, prefix + "Feature")
    add(features, "feature", 1, types.TYPE_MESSAGE, prefix + "Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, types.TYPE_MESSAGE, prefix + "Features")
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("vla_rl.tfrecord.Example"))
