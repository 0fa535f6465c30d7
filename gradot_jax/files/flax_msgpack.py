"""Where the arrays of a msgpack file of Flax lie, found without reading them.

Flax writes a tree as msgpack maps with string keys. An array is an extension of type 1 that holds
(shape, dtype name, bytes), packed; one above 2^30 bytes is a map of `shape` and `chunks` marked
`__msgpack_chunked_array__`. Anything else in the place of an array is refused. Lengths in the file
are believed only within the bounds of what encloses them.

References:
    https://github.com/msgpack/msgpack/blob/master/spec.md
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from gradot_jax.files.safetensors import TensorSpec

_CHUNKED = "__msgpack_chunked_array__"
_ARRAY_EXTENSION = 1
_MAX_DEPTH = 32


class FlaxArray(NamedTuple):
    """An array in a file.

    Attributes:
        path: its keys from the root of the tree, joined by `/`.
        spec: shape and dtype.
        pieces: offset and number of elements of each part of its data, in order.
    """

    path: str
    spec: TensorSpec
    pieces: tuple[tuple[int, int], ...]


class _Kind(NamedTuple):
    """How msgpack codes a kind of item: a number in the first byte, or in 1, 2, 4, 8 after it."""

    name: str
    first: int
    mask: int
    wide: dict[int, int]


_MAP = _Kind("a map", 0x80, 0x0F, {0xDE: 2, 0xDF: 4})
_LIST = _Kind("a list", 0x90, 0x0F, {0xDC: 2, 0xDD: 4})
_TEXT = _Kind("a string", 0xA0, 0x1F, {0xD9: 1, 0xDA: 2, 0xDB: 4})
_BYTES = _Kind("bytes", 0x100, 0, {0xC4: 1, 0xC5: 2, 0xC6: 4})
_NUMBER = _Kind("a number", 0x00, 0x7F, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})
_EXTENSION = _Kind("an array", 0x100, 0, {0xC7: 1, 0xC8: 2, 0xC9: 4})
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_TRUE = 0xC3


class _Reader:
    """A place in a buffer that moves forward and never beyond its end."""

    def __init__(self, buffer, start: int, stop: int):
        self.buffer, self.at, self.stop = buffer, start, stop

    def skip(self, count: int) -> int:
        """Moves on and returns where it was."""
        start, self.at = self.at, self.at + count
        if self.at > self.stop:
            raise ValueError(f"ends at byte {self.stop}, {self.at - self.stop} too early")
        return start

    def number(self, size: int) -> int:
        start = self.skip(size)
        return int.from_bytes(self.buffer[start : self.at], "big")

    def text(self, size: int) -> str:
        start = self.skip(size)
        return str(self.buffer[start : self.at], "utf-8")

    def expect(self, kind: _Kind) -> int:
        """The number that the next item of a kind codes: its value or its length."""
        lead = self.number(1)
        if lead & ~kind.mask == kind.first:
            return lead & kind.mask
        if lead not in kind.wide:
            raise ValueError(f"byte {self.at - 1} is {lead:#04x}, expected {kind.name}")
        return self.number(kind.wide[lead])

    def comes(self, kind: _Kind) -> bool:
        lead = self.number(1)
        self.at -= 1
        return lead & ~kind.mask == kind.first or lead in kind.wide


def find_arrays(buffer) -> list[FlaxArray]:
    """The arrays of a file, given as bytes or as a mapping of it, in its order.

    Raises:
        ValueError: when the file is damaged, truncated or overlong, or holds anything but maps
            and arrays.
    """
    reader = _Reader(buffer, 0, len(buffer))
    tree = _map(reader, 0)
    if reader.at != reader.stop:
        raise ValueError(f"{reader.stop - reader.at} bytes beyond its end")
    return list(_flatten(tree, ""))


def _map(reader: _Reader, depth: int) -> dict[str, object]:
    if depth == _MAX_DEPTH:
        raise ValueError(f"maps nested more than {_MAX_DEPTH} deep")
    node: dict[str, object] = {}
    for _ in range(reader.expect(_MAP)):
        key = reader.text(reader.expect(_TEXT))
        if key in node:
            raise ValueError(f"the key {key!r} twice in one map")
        node[key] = _value(reader, depth)
    return node


def _value(reader: _Reader, depth: int) -> object:
    if reader.comes(_MAP):
        return _map(reader, depth + 1)
    if reader.comes(_NUMBER):
        return reader.expect(_NUMBER)
    if reader.number(1) == _TRUE:
        return True
    reader.at -= 1
    return _array(reader)


def _array(reader: _Reader) -> FlaxArray:
    size = _FIXED_EXTENSIONS.get(reader.number(1))
    if size is None:
        reader.at -= 1
        size = reader.expect(_EXTENSION)
    if (code := reader.number(1)) != _ARRAY_EXTENSION:
        raise ValueError(f"an extension of type {code} at byte {reader.at - 1}, expected an array")
    start = reader.skip(size)
    inner = _Reader(reader.buffer, start, reader.at)
    if inner.expect(_LIST) != 3:
        raise ValueError(f"an array at byte {start} that is not (shape, dtype, bytes)")
    shape = tuple(inner.expect(_NUMBER) for _ in range(inner.expect(_LIST)))
    dtype = inner.text(inner.expect(_TEXT if inner.comes(_TEXT) else _BYTES))
    size = inner.expect(_BYTES)
    count, offset = math.prod(shape), inner.skip(size)
    if inner.at != inner.stop or count * _item_bytes(dtype) != size:
        raise ValueError(f"an array of {dtype} {shape} in {size} bytes at byte {offset}")
    return FlaxArray("", TensorSpec(shape, dtype), ((offset, count),))


def _item_bytes(dtype: str) -> int:
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.name != dtype or known.hasobject:
        raise ValueError(f"an array of an unknown dtype {dtype!r}")
    return known.itemsize


def _flatten(node: object, path: str) -> Iterator[FlaxArray]:
    if isinstance(node, FlaxArray):
        yield node._replace(path=path)
    elif isinstance(node, dict) and _CHUNKED in node:
        yield _joined(node, path)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _flatten(value, f"{path}/{key}" if path else key)
    else:
        raise ValueError(f"{path} is {node!r}, expected an array")


def _joined(node: dict, path: str) -> FlaxArray:
    shape = _items(node.get("shape"), int, path)
    chunks = _items(node.get("chunks"), FlaxArray, path)
    dtypes = {chunk.spec.dtype for chunk in chunks}
    pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    if len(dtypes) != 1 or sum(count for _, count in pieces) != math.prod(shape):
        raise ValueError(f"{path}: chunks that do not make up an array of shape {shape}")
    return FlaxArray(path, TensorSpec(shape, dtypes.pop()), pieces)


def _items(node: object, kind: type, path: str) -> tuple:
    """A tuple, which Flax writes as a map from "0", "1", ... to its items."""
    items = node if isinstance(node, dict) else {}
    values = [items.get(str(index)) for index in range(len(items))]
    if not items or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{path}: an array in chunks without shape or chunks")
    return tuple(values)
