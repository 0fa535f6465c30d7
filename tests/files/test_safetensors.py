import errno
import json
import os
import resource
import stat

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gradot_jax.errors import InputError
from gradot_jax.files.safetensors import (
    TensorSpec,
    copy_finite,
    iterate_tensors,
    read_specs,
    read_tensors,
    stream_tensors,
    write_tensors,
)

MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape, end, dtype="F32", start=0):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_layout_of_memory_is_written_as_it_reads(path, dtype):
    base = np.arange(24).reshape(4, 6).astype(jnp.dtype(dtype))
    views = {
        "plain": base,
        "transposed": base.T,
        "sliced": base[1:, ::2],
        "reversed": base[::-1],
        "scalar": base[0, 0].reshape(()),
        "empty": base[:0],
        "jax": jnp.asarray(base).T,
    }
    write_tensors(path, views)
    read = read_tensors(path, {name: view.shape for name, view in views.items()})
    for name, view in views.items():
        assert read[name].dtype == view.dtype
        np.testing.assert_array_equal(read[name], np.asarray(view))


def test_files_are_those_that_the_library_writes(path, tmp_path):
    kinds = "bool uint8 int8 int16 uint16 float16 bfloat16 int32 uint32 float32 float64 int64"
    arrays = {f"of {kind}": MATRIX.astype(jnp.dtype(kind)) for kind in kinds.split()}
    arrays |= {"b": MATRIX, "a\u00e4": MATRIX}
    write_tensors(path, arrays, {"format": "pt"})
    safetensors.numpy.save_file(arrays, tmp_path / "expected", {"format": "pt"})
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()


def test_tensors_are_written_in_whatever_order_they_come(path, tmp_path):
    arrays = {name: MATRIX.astype(name) for name in ("float64", "float32", "int8")}
    specs = {name: TensorSpec((2, 3), name) for name in arrays}
    write_tensors(path, arrays)
    stream_tensors(tmp_path / "other", specs, reversed(arrays.items()))
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


def test_what_was_not_announced_is_not_written(path):
    specs = {"a": TensorSpec((2, 3), "float32"), "b": TensorSpec((1,), "int8")}
    for name, array in (("c", MATRIX), ("a", MATRIX.T), ("b", MATRIX[0, :1])):
        with pytest.raises(ValueError, match=f"tensor {name}: got float32"):
            stream_tensors(path, specs, [(name, array)])
    with pytest.raises(ValueError, match="not written: b"):
        stream_tensors(path, specs, [("a", MATRIX)])


def test_permissions_follow_the_umask(path):
    before = os.umask(0o022)
    try:
        write_tensors(path, {"a": MATRIX})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_no_room_for_a_file_is_a_system_error_with_its_code(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_tensors(path, {"a": np.zeros(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


def test_specs_are_read_without_data(path):
    write_tensors(path, {"a": MATRIX, "b": np.zeros(3, np.int8)}, {"format": "pt"})
    assert read_specs(path) == {
        "a": TensorSpec((2, 3), "float32"),
        "b": TensorSpec((3,), "int8"),
    }


def test_all_differences_are_reported_in_one_error(path):
    write_tensors(path, {"a": MATRIX, "b": MATRIX, "c": MATRIX, "d": np.zeros(2, np.int32)})
    shapes = {"a": (2, 3), "b": (3, 2), "d": (2,), "e": (1,), "f": (1,)}
    with pytest.raises(InputError) as caught:
        read_tensors(path, shapes)
    message = str(caught.value)
    assert str(path) in message
    assert "missing: e, f" in message
    assert "unexpected: c" in message
    assert "b (got (2, 3), expected (3, 2))" in message
    assert "d (got int32)" in message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_not_finite_is_refused_with_its_tensor(path, bad, dtype):
    array = MATRIX.astype(jnp.dtype(dtype))
    array[-1, -1] = bad
    write_tensors(path, {"a": MATRIX, "b": array})
    with pytest.raises(InputError, match=r"tensor b holds NaN or Inf at 1 of 6"):
        read_tensors(path, {"a": (2, 3), "b": (2, 3)})


def test_every_truncation_and_extension_is_refused(path):
    write_tensors(path, {"a": MATRIX})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"x\.safetensors"):
            read_specs(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="damaged or truncated"):
        read_specs(path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            + b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
        ({"a": entry([1], 4), "b": entry([1], 4)}, b"\0" * 4),
        ({"a": entry([1], 4), "b": entry([1], 12, start=8)}, b"\0" * 12),
        ({"a": entry([2], 4)}, b"\0" * 4),
        ({"a": entry([2**62, 4], 0)}, b""),
        ({"a": entry([1], 1, dtype="F8_E4M3")}, b"\0"),
        ({"a": 3}, b""),
        (b"[]", b""),
        (b"{", b""),
    ],
    ids="duplicate overlap hole short overflow dtype entry list broken".split(),
)
def test_inconsistent_headers_are_refused(path, header, data):
    raw(path, header, data)
    with pytest.raises(InputError, match=r"x\.safetensors"):
        read_specs(path)


def test_a_huge_header_is_refused_unread(path):
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="header"):
        read_specs(path)


def test_an_impossible_empty_shape_is_refused(path):
    raw(path, {"a": entry([0, 2**62], 0)})
    with pytest.raises(InputError, match="wrong shape"):
        read_tensors(path, {"a": (0,)})
    with pytest.raises(InputError, match="tensor a cannot be read"):
        list(iterate_tensors(path))


def test_an_absent_file_is_refused(path):
    with pytest.raises(InputError, match="cannot be read"):
        read_specs(path)


@pytest.mark.parametrize("shape", [(), (0,), (3 * 2**20,), (3, 2**20), (2**20 + 1, 2)])
def test_arrays_of_any_size_are_checked_and_copied_to_their_end(shape):
    source = np.ones(shape, np.float16)
    target = np.zeros(shape, np.float32)
    copy_finite("here", "a", source, target)
    np.testing.assert_array_equal(target, 1)
    if source.size:
        source[(-1,) * len(shape)] = np.nan
        with pytest.raises(InputError, match=rf"holds NaN or Inf at 1 of {source.size}"):
            copy_finite("here", "a", source, target)


def test_a_cast_out_of_range_is_refused_and_told_from_infinity():
    target = np.empty(2, np.float16)
    with pytest.raises(InputError, match="out of the range of float16"):
        copy_finite("here", "a", np.array([1.0, 1e6], np.float32), target)
    with pytest.raises(InputError, match="holds NaN or Inf"):
        copy_finite("here", "a", np.array([1.0, np.inf], np.float32), target)
