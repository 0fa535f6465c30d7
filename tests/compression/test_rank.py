import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.rank import factorise, keep_order
from gradot_jax.linalg.svd import svd

SCORES = jnp.array([1.0, 5.0, 3.0, 5.0, 0.0, 3.0, -1.0])


@pytest.mark.parametrize("floor", [0, 1, 3, 7])
def test_floor_comes_first_then_falling_score_with_ties_to_the_lower_index(floor):
    rest = sorted(range(floor, 7), key=lambda k: (-float(SCORES[k]), k))
    order = np.asarray(keep_order(SCORES, floor))
    np.testing.assert_array_equal(order[floor:], rest)
    np.testing.assert_array_equal(order[:floor], np.arange(floor))


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (6, 3)])
def test_factors_multiply_to_the_kept_components(shape, assert_close):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    decomposition = svd(jnp.asarray(w)[None])
    single = type(decomposition)(*(part[0] for part in decomposition))
    u, s, v = (np.asarray(part, np.float64) for part in single)
    every = np.arange(min(shape))
    for kept in (every, every[::2], every[-1:]):
        left, right = factorise(single, kept)
        assert left.shape == (shape[0], len(kept)) and right.shape == (len(kept), shape[1])
        expected = sum(s[k] * np.outer(u[:, k], v[:, k]) for k in kept)
        assert_close(np.asarray(left, np.float64) @ np.asarray(right), expected, "float32")
        norms = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
        assert_close(norms[0], norms[1], "float32")
    assert_close(
        np.asarray(factorise(single, every)[0] @ factorise(single, every)[1]), w, "float32"
    )
