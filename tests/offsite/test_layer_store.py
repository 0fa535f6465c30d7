import numpy as np
import pytest

from gradot_jax.compression.layer import LayerTerms
from gradot_jax.compression.score import ScoreTerms
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.errors import InputError
from gradot_jax.offsite.layer_store import LayerStore, pack, unpack

ARRAYS = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
IDENTITY = {"split": (2, 2), "method": "gradot"}


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_layer_comes_back_as_it_was_saved(in_folder, tmp_path):
    store = LayerStore(tmp_path / "layers" if in_folder else None, IDENTITY)
    assert store.finished == set()
    store.save(3, ARRAYS, {"kept": [1, 2]})
    assert store.finished == {3}
    arrays, values = store.load(3)
    assert values == {"kept": [1, 2]} and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_a_folder_is_found_again_by_a_compression_of_equal_identity(tmp_path):
    LayerStore(tmp_path, IDENTITY).save(0, ARRAYS, {})
    assert LayerStore(tmp_path, dict(reversed(IDENTITY.items()))).finished == {0}


def test_a_folder_of_another_compression_is_refused_by_what_differs(tmp_path):
    LayerStore(tmp_path, IDENTITY).save(0, ARRAYS, {})
    with pytest.raises(InputError, match="with other dtype, method"):
        LayerStore(tmp_path, {"split": (2, 2), "method": "random", "dtype": "float32"})
    assert LayerStore(tmp_path, IDENTITY).finished == {0}


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="expected the finished layers"):
        LayerStore(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_layer_is_refused(tmp_path):
    store = LayerStore(tmp_path, IDENTITY)
    store.save(0, ARRAYS, {})
    file = tmp_path / "0000" / "arrays.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"arrays\.safetensors"):
        store.load(0)


def test_named_tuples_are_packed_and_unpacked_with_what_is_absent():
    terms = LayerTerms(*(ScoreTerms(np.full(2, i), np.full(3, -i)) for i in (1.0, 2.0)))
    arrays = pack("terms", terms)
    assert sorted(arrays) == [
        f"terms.{kind}.{term}"
        for kind in ("channels", "components")
        for term in ("gradient", "hessian")
    ]
    back = unpack(LayerTerms, "terms", arrays)
    np.testing.assert_array_equal(back.channels.gradient, np.full(3, -2.0))
    factors = KroneckerFactors(np.eye(2), np.ones(2), None, None)
    back = unpack(KroneckerFactors, "f", pack("f", factors))
    assert back.gradient_covariance is None and back.removal_fisher is None
    np.testing.assert_array_equal(back.input_covariance, np.eye(2))
    assert pack("nothing", None) == {}
