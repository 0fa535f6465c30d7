"""The index of a msgpack file agrees with the reader of Flax, and believes nothing in a file."""

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize

from gradot_jax.files.flax_msgpack import find_arrays

TREE = {
    "params": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.ones(3, np.int8)}},
    "scalar": np.array(2, np.float32),
    "empty": np.zeros((0, 4), np.float16),
    "half": np.arange(70000).astype(ml_dtypes.bfloat16),
    "x" * 40: np.arange(3, dtype=np.float64),
    "wide": {str(i): np.full((1, i), i, np.uint8) for i in range(20)},
}


def flat(tree, prefix=""):
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        yield from flat(value, path) if isinstance(value, dict) else [(path, value)]


def read(content: bytes) -> dict[str, np.ndarray]:
    arrays = {}
    for path, (shape, dtype), pieces in find_arrays(content):
        parts = [np.frombuffer(content, dtype, count, offset) for offset, count in pieces]
        arrays[path] = np.concatenate(parts).reshape(shape)
    return arrays


def assert_reads_as_flax_does(content: bytes):
    expected = dict(flat(msgpack_restore(content)))
    got = read(content)
    assert got.keys() == expected.keys()
    for path, array in got.items():
        assert array.dtype == expected[path].dtype
        np.testing.assert_array_equal(array, expected[path])


def test_arrays_are_found_where_flax_reads_them():
    assert_reads_as_flax_does(msgpack_serialize(TREE))


def test_arrays_in_chunks_are_found_in_their_order(monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 16)
    content = msgpack_serialize({"a": {"b": np.arange(66.0).reshape(11, 6)}, "c": np.ones(2)})
    assert_reads_as_flax_does(content)
    ((path, spec, pieces), _) = find_arrays(content)
    assert (path, spec) == ("a/b", ((11, 6), "float64")) and len(pieces) == 33


def test_a_file_cut_or_extended_anywhere_is_refused():
    whole = msgpack_serialize({"a": {"b": np.ones((2, 2), np.float32)}, "c": np.ones(1)})
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"early|expected"):
            find_arrays(whole[:length])
    with pytest.raises(ValueError, match="1 bytes beyond its end"):
        find_arrays(whole + b"\0")


def test_no_altered_byte_leads_out_of_the_file():
    whole = msgpack_serialize({"a": {"b": np.ones((2, 2), np.float32)}, "c": np.ones(1)})
    for place in range(len(whole)):
        for value in (0, 0x81, 0xC1, 0xC6, 0xDB, 0xDF, 0xFF, whole[place] ^ 1):
            content = bytearray(whole)
            content[place] = value
            try:
                arrays = read(bytes(content))
            except ValueError:
                continue
            assert sum(array.nbytes for array in arrays.values()) <= len(whole)


def packed(shape, dtype, data, kind=1) -> bytes:
    inner = msgpack.packb((shape, dtype, data))
    return msgpack.packb({"a": msgpack.ExtType(kind, inner)})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (packed([2], "float32", b"\0" * 4), r"float32 \(2,\) in 4 bytes"),
        (packed([2**40, 2**40], "float32", b""), "in 0 bytes"),
        (packed([-1], "float32", b"\0" * 4), "expected a number"),
        (packed([1], "object", b"\0" * 8), "unknown dtype 'object'"),
        (packed([1], "f4,f4", b"\0" * 8), "unknown dtype"),
        (packed([1], "float33", b"\0" * 4), "unknown dtype"),
        (packed([1], "float32", b"\0" * 4, kind=3), "extension of type 3"),
        (msgpack.packb({"a": "text"}), "expected an array"),
        (msgpack.packb({"a": 3}), "a is 3, expected an array"),
        (msgpack.packb({"a": True}), "a is True, expected an array"),
        (msgpack.packb({1: {}}), "expected a string"),
        (msgpack.packb([1]), "expected a map"),
        (b"\x82\xa1a\x80\xa1a\x80", "the key 'a' twice"),
        (b"\x81\xa1a" * 40, "nested more than"),
        (b"\x81\xa1\xff\x80", "utf-8"),
        (b"\xdf\xff\xff\xff\xff", "too early"),
        (msgpack.packb({"__msgpack_chunked_array__": True}), "without shape or chunks"),
        (
            msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {"1": 2}}}),
            "without shape or chunks",
        ),
    ],
)
def test_what_is_no_tree_of_arrays_is_refused(content, reason):
    with pytest.raises(ValueError, match=reason):
        find_arrays(content)


def test_chunks_that_do_not_fill_their_shape_are_refused(monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 16)
    whole = msgpack_serialize({"a": np.arange(6.0)})
    broken = whole.replace(msgpack.packb({"0": 6}), msgpack.packb({"0": 5}))
    with pytest.raises(ValueError, match=r"a: chunks that do not make up"):
        find_arrays(broken)
