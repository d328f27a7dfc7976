"""Words in an HDF5 file, checked before its library reads them: it trusts the sizes that it finds on the way to them.

Text and lists of varying length are kept in an attribute or array as pointers (length, address, number) to objects in
*global heap collections* elsewhere in the file. At some damaged bytes there, the library never comes back, or takes
gigabytes. Layouts are those of the HDF5 File Format Specification: object headers (IV.A.1), attribute messages
(IV.A.2.m) and global heaps (III.E).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import h5py

Heaps = dict[int, dict[int, int]]
"""Sizes of the objects of each collection met so far, by its address and the object's number."""

_POINTER = struct.Struct("<IQI")
_ATTRIBUTE, _CONTINUATION = 0x0C, 0x10
_MAX_BLOCKS = 10_000  # of one object header
_PIECE = 1 << 20
_NUMBERS = (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeEnumID)
_SIGNATURE = b"GCOL\1\0\0\0"


def check_words(item: h5py.Group | h5py.Dataset, heaps: Heaps) -> int:
    """Follows the pointers to all words of a group or array, those of its attributes too, and checks where they lead.

    Args:
        item: its members are not looked at.
        heaps: what is known of the file's heaps; extended here.

    Returns:
        Bytes that the words have together; 0, at almost no cost, if there are none.

    Raises:
        ValueError: if a pointer or a heap contradicts itself or the file, or words lie within structures.
    """
    array, units = 0, {}
    try:
        if isinstance(item, h5py.Dataset):
            array = _unit(item.id.get_type())
        if h5py.h5a.get_num_attrs(item.id):
            units = _attribute_units(item)
    except ValueError as error:
        raise ValueError(f"{_where(item)}: {error}") from error
    if not (units or array) or item.file.driver == "fileobj":  # which is how we write
        return 0
    header = cast("Any", h5py).h5o.get_info(item.id).addr
    creation: Any = item.file.id.get_create_plist()
    if creation.get_sizes() != (8, 8) or creation.get_userblock():
        raise ValueError(
            f"{_where(item)} holds text in a file with a user block or short addresses; repack it with h5repack"
        )
    try:
        with open(item.file.filename, "rb") as file:
            pointers = list(_attribute_pointers(file, header, units)) if units else []
            places = _places(item) if array and isinstance(item, h5py.Dataset) else []
            if {name for name, _ in pointers} != units.keys() or places is None:
                # Found neither in the header nor as they are: compressed, or under checksums that HDF5 looks at.
                _check_all(file, heaps)
            total = sum(_follow(file, pointer, units[name][0], heaps) for name, pointer in pointers)
            for start, size in places or ():
                content = _read(file, start, size)
                total += sum(_follow(file, p, array, heaps) for p in _POINTER.iter_unpack(content[: size // 16 * 16]))
            return total
    except (ValueError, struct.error, OverflowError) as error:
        raise ValueError(f"{_where(item)} holds damaged text ({error}); restore it from a copy") from error


def _where(item: h5py.Group | h5py.Dataset) -> str:
    return f"'{item.file.filename}': '{item.name}'"


def _attribute_units(item: h5py.Group | h5py.Dataset) -> dict[bytes, tuple[int, int]]:
    """Bytes per element of the words in an attribute, and their number, by name; of attributes that hold words."""
    units: dict[bytes, tuple[int, int]] = {}
    for name in (str(key).encode("utf-8", "surrogateescape") for key in item.attrs):
        attribute = h5py.h5a.open(item.id, name)
        unit = _unit(attribute.get_type())
        count = math.prod(attribute.shape or ()) if unit and attribute.shape is not None else 0
        if count:
            units[name] = unit, count
    return units


def _unit(kind: Any) -> int:
    """Bytes of one element of what varies in length, such as 1 for text; 0 for a type of fixed size.

    Raises:
        ValueError: for a type that the library crashes on, and for words and references to regions within others.
    """
    if isinstance(kind, _NUMBERS):
        return 0
    if isinstance(kind, h5py.h5t.TypeStringID):
        return int(kind.is_variable_str())
    inner = []
    if isinstance(kind, h5py.h5t.TypeVlenID):
        if kind.encode()[3] & 15:  # neither a list nor text
            raise ValueError("an unknown type; restore the file from a copy")
        inner = [kind.get_super()]
    elif isinstance(kind, h5py.h5t.TypeArrayID):
        inner = [kind.get_super()]
    elif isinstance(kind, h5py.h5t.TypeCompoundID):
        inner = [kind.get_member_type(number) for number in range(kind.get_nmembers())]
    if kind.equal(h5py.h5t.STD_REF_DSETREG) or any(map(_unit, inner)):
        raise ValueError("text or references within structures, which cannot be checked; remove them")
    return inner[0].get_size() if isinstance(kind, h5py.h5t.TypeVlenID) else 0


def _places(array: h5py.Dataset) -> list[tuple[int, int]] | None:
    """Where the pointers of an array lie, ``(start, bytes)``; None if they are compressed or within its header."""
    creation = array.id.get_create_plist()
    if array.chunks is not None:
        if creation.get_nfilters():
            return None
        chunks = [array.id.get_chunk_info(number) for number in range(array.id.get_num_chunks())]
        return [(chunk.byte_offset, chunk.size) for chunk in chunks]
    if creation.get_layout() == h5py.h5d.COMPACT:
        return None
    start = array.id.get_offset()
    return [] if start is None else [(start, array.id.get_storage_size())]


def _attribute_pointers(
    file: BinaryIO, address: int, units: dict[bytes, tuple[int, int]]
) -> Iterator[tuple[bytes, tuple[int, int, int]]]:
    """Name and pointers of those attributes of an object header that are in ``units``."""
    for start, end in _messages(file, address):
        version, _, name_bytes, type_bytes, space_bytes = _unpack(file, "<BBHHH", start)
        if version not in (1, 2, 3):
            raise ValueError(f"an attribute of version {version}")
        at = start + (9 if version == 3 else 8)
        name = _read(file, at, name_bytes).split(b"\0")[0]
        if name not in units:
            continue
        at += sum(_padded(n) if version == 1 else n for n in (name_bytes, type_bytes, space_bytes))
        if at + 16 * units[name][1] > end:
            raise ValueError("an attribute longer than its place")
        for number in range(units[name][1]):
            yield name, _unpack(file, _POINTER.format, at + 16 * number)


def _messages(file: BinaryIO, address: int) -> Iterator[tuple[int, int]]:
    """Start and end of each attribute in an object header, of version 1 or 2."""
    old = _read(file, address, 4) != b"OHDR"
    if old:
        blocks = [(address + 16, *_unpack(file, "<I", address + 8))]
        prefix, layout = 8, "<HH"
    else:
        flags = _read(file, address + 5, 1)[0]
        width = 1 << (flags & 3)
        at = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        blocks = [(at + width, int.from_bytes(_read(file, at, width), "little"))]
        prefix, layout = 6 if flags & 4 else 4, "<BH"
    for at, size in blocks:  # which grows
        end = at + size
        while at + prefix <= end:
            kind, size = _unpack(file, layout, at)
            at += prefix
            if at + size > end:
                raise ValueError("a header longer than its place")
            if kind == _ATTRIBUTE:
                yield at, at + size
            elif kind == _CONTINUATION:
                following, length = _unpack(file, "<QQ", at)
                blocks.append((following, length) if old else (following + 4, length - 8))
                if len(blocks) > _MAX_BLOCKS:
                    raise ValueError("a header in a circle")
            at += size


def _follow(file: BinaryIO, pointer: tuple[int, int, int], unit: int, heaps: Heaps) -> int:
    """Bytes of the word that a pointer leads to."""
    length, address, number = pointer
    if address == 0:  # none was written
        return 0
    if address not in heaps:
        heaps[address] = _objects(file, address)
    if length * unit > heaps[address].get(number, -1):
        raise ValueError(f"{length * unit:,} bytes expected at {address:,}, number {number}, but they are not there")
    return length * unit


def _objects(file: BinaryIO, address: int) -> dict[int, int]:
    """Sizes of the objects of a collection, by number."""
    signature, total = _unpack(file, "<8sQ", address)
    if signature != _SIGNATURE or address + total > file.seek(0, 2):
        raise ValueError(f"no whole heap at {address:,}")
    sizes: dict[int, int] = {}
    at = 16
    while at + 16 <= total:
        number, size = _unpack(file, "<H6xQ", address + at)
        place = 16 + _padded(size) if number else size  # free room, number 0, counts its own header
        if place < 16 or at + place > total or number in sizes:
            raise ValueError(f"{size:,} bytes for number {number} of the heap at {address:,}")
        sizes[number] = size
        at += place
    sizes.pop(0, None)
    return sizes


def _check_all(file: BinaryIO, heaps: Heaps) -> None:
    """Checks every collection in a file, at the cost of reading it."""
    start, kept = 0, b""
    file.seek(0)
    while piece := file.read(_PIECE):
        content = kept + piece
        at = content.find(_SIGNATURE)
        while at >= 0:
            address = start - len(kept) + at
            if address not in heaps:
                heaps[address] = _objects(file, address)
            at = content.find(_SIGNATURE, at + 1)
        start += len(piece)
        kept = content[1 - len(_SIGNATURE) :]
        file.seek(start)


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    content = file.read(size)
    if len(content) != size:
        raise ValueError(f"{size:,} bytes expected at {at:,}, where the file ends")
    return content


def _unpack(file: BinaryIO, layout: str, at: int) -> tuple[Any, ...]:
    return struct.unpack(layout, _read(file, at, struct.calcsize(layout)))
