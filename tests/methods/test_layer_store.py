import jax
import numpy as np
import pytest

from gradot_jax.compression.score import LayerTerms, ScoreTerms
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.errors import InputError
from gradot_jax.linalg.svd import SVD
from gradot_jax.methods.layer_store import LayerStore, pack, unpack
from gradot_jax.methods.scored import Candidate

ARRAYS = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
IDENTITY = {"split": (2, 2), "method": "gradot"}
SIZES = {"query": 2, "key": 4}


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


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


def test_a_scratch_folder_is_of_no_compression_in_particular(tmp_path):
    LayerStore(tmp_path).save(0, ARRAYS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["0000"]
    assert LayerStore(tmp_path).finished == {0}


def test_named_tuples_and_dictionaries_are_packed_and_unpacked_with_what_is_absent():
    terms = LayerTerms(
        {site: ScoreTerms(np.full(size, 1.0), np.full(size, 2.0)) for site, size in SIZES.items()},
        ScoreTerms(np.full(3, 3.0), np.full(3, 4.0)),
    )
    arrays = pack("terms", terms)
    owners = ["channels", *(f"components.{site}" for site in SIZES)]
    assert sorted(arrays) == sorted(
        f"terms.{owner}.{term}" for owner in owners for term in ("gradient", "hessian")
    )
    assert_same(unpack(LayerTerms, "terms", arrays), terms)
    factors = KroneckerFactors(np.eye(2), np.ones(2), None, None)
    back = unpack(KroneckerFactors, "f", pack("f", factors))
    assert back.gradient_covariance is None and back.removal_fisher is None
    np.testing.assert_array_equal(back.input_covariance, np.eye(2))
    assert pack("nothing", None) == {}


@pytest.mark.parametrize("with_factors", [False, True])
def test_a_candidate_comes_back_with_its_factors_or_without(with_factors, tmp_path):
    parts = {site: SVD(np.eye(size), np.ones(size), np.eye(size)) for site, size in SIZES.items()}
    terms = LayerTerms(
        {site: ScoreTerms(part.values, part.values) for site, part in parts.items()},
        ScoreTerms(np.ones(3), np.zeros(3)),
    )
    factors = {s: KroneckerFactors(np.eye(n), np.ones(n), None, None) for s, n in SIZES.items()}
    candidate = Candidate(parts, terms, factors if with_factors else None)
    arrays = pack("parts", parts) | pack("terms", terms) | pack("factors", candidate.factors)
    store = LayerStore(tmp_path)
    store.save(0, arrays, {})
    assert_same(unpack(Candidate, "", store.load(0).arrays), candidate)
