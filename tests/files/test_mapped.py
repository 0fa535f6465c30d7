import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.mapped import map_flax, map_safetensors
from gradot_jax.files.pages import release_pages
from gradot_jax.files.safetensors import write_tensors

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(5).astype(ml_dtypes.bfloat16),
    "odd": np.arange(3, dtype=np.int8),
    "scalar": np.array(3, np.float16),
}


@pytest.fixture(params=["safetensors", "flax", "chunks"])
def mapped(request, tmp_path, monkeypatch):
    """Stored tensors by name, in each format."""
    path = tmp_path / "file"
    if request.param == "safetensors":
        write_tensors(path, ARRAYS)
        return {tensor.name: tensor for tensor in map_safetensors(path)}
    if request.param == "chunks":
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 8)
    path.write_bytes(flax.serialization.msgpack_serialize(ARRAYS))
    return {tensor.name: tensor for tensor in map_flax(path)}


def test_tensors_are_read_only_views_of_what_was_written(mapped):
    assert mapped.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        view = mapped[name].array
        assert (mapped[name].spec, view.dtype) == ((array.shape, array.dtype.name), array.dtype)
        assert not view.flags.writeable
        np.testing.assert_array_equal(view, array)
        np.testing.assert_array_equal(jnp.asarray(view), array)


def test_transposing_reads_nothing_and_is_its_own_inverse(mapped):
    turned = mapped["matrix"].T
    assert turned.shape == (4, 3)
    np.testing.assert_array_equal(turned.array, ARRAYS["matrix"].T)
    np.testing.assert_array_equal(jax.device_put(turned.array), ARRAYS["matrix"].T)
    np.testing.assert_array_equal(turned.T.array, ARRAYS["matrix"])


def test_a_part_is_copied_and_cast(mapped):
    target = np.empty((2, 3), np.float16)
    mapped["matrix"].T.read_into(target, (slice(1, 3), slice(None)))
    np.testing.assert_array_equal(target, ARRAYS["matrix"].T[1:3])


def test_what_was_released_can_be_read_again(mapped):
    view = mapped["matrix"].array
    release_pages(mapped["matrix"].pieces)
    np.testing.assert_array_equal(view, ARRAYS["matrix"])


def test_numbers_not_finite_are_refused_with_file_and_name(tmp_path):
    bad = np.ones((3, 2**20), np.float16)
    bad[2, 7] = np.inf
    write_tensors(tmp_path / "file", {"a": ARRAYS["matrix"], "b": bad})
    good, broken = sorted(map_safetensors(tmp_path / "file"), key=lambda t: t.name)
    good.check_finite()
    with pytest.raises(InputError, match=r"file: tensor b holds NaN or Inf at 1 of 3145728"):
        broken.check_finite()
    with pytest.raises(InputError, match="tensor b holds NaN or Inf at 1 of"):
        broken.read_into(np.empty(bad.shape, np.float32))


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x81\xa1a\xc0"])
def test_files_without_tensors_are_read_as_such_or_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    if content == b"\x80":
        assert map_flax(tmp_path / "file") == []
    else:
        with pytest.raises(InputError, match="file: damaged or truncated Flax msgpack"):
            map_flax(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be read"):
        map_flax(tmp_path / "absent")
