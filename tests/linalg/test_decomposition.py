import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.linalg.decomposition import decompose, default_algorithm

SIZE = 48
RNG = np.random.default_rng(0)
ALGORITHMS = ["svd", "polar", "gram"]
DECOMPOSE = jax.jit(decompose, static_argnames="algorithm")


def with_values(values):
    left, right = (np.linalg.qr(RNG.normal(size=(SIZE, SIZE)))[0] for _ in range(2))
    return (left * values) @ right.T


def decomposed(matrix, algorithm):
    parts = DECOMPOSE(jnp.asarray(matrix)[None], algorithm)
    return (np.asarray(part[0], np.float64) for part in parts)


MATRICES = {
    "random": RNG.normal(size=(SIZE, SIZE)),
    "tall": RNG.normal(size=(3 * SIZE, SIZE)),
    "wide": RNG.normal(size=(SIZE, SIZE + 1)),
    "row": RNG.normal(size=(1, SIZE)),
    "condition 1e6": with_values(np.logspace(0, -6, SIZE)),
    "condition 1e15": with_values(np.logspace(0, -15, SIZE)),
    "steps": with_values(np.repeat([1, 3e-3, 1e-5, 1e-8], SIZE // 4)),
    "rank one": with_values(np.eye(SIZE)[0]),
    "half rank": with_values(np.arange(SIZE) % 2),
    "equal columns": np.repeat(RNG.normal(size=(SIZE, SIZE // 2)), 2, axis=1),
    "orthogonal": with_values(np.ones(SIZE)),
    "pairs": with_values(np.repeat(np.arange(SIZE // 2), 2)),
    "permuted identity": np.eye(SIZE)[RNG.permutation(SIZE)],
    "zero": np.zeros((SIZE, SIZE)),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MATRICES)
def test_factors_are_orthonormal_and_rebuild_the_matrix(name, algorithm):
    w = MATRICES[name].astype(np.float32)
    u, s, v = decomposed(w, algorithm)
    scale = np.linalg.norm(w)
    assert np.linalg.norm(w - (u * s) @ v.T) <= 1e-5 * scale
    for vectors in (u, v):
        assert np.abs(vectors.T @ vectors - np.eye(min(w.shape))).max() <= 4e-6
    expected = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    assert np.abs(s - expected).max() <= 4e-6 * expected[0]
    assert (s >= 0).all() and (np.diff(s) <= 0).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_small_components_are_told_apart(algorithm):
    """What one `eigh` of the Gram matrix cannot: values below sqrt(eps) of the largest."""
    values = np.logspace(0, -4.5, SIZE)
    w = with_values(values).astype(np.float32)
    u, s, v = decomposed(w, algorithm)
    assert np.abs(s / np.linalg.svd(w.astype(np.float64), compute_uv=False) - 1).max() < 0.1
    image = u.T @ w @ v
    assert np.abs(image - np.diag(np.diag(image))).max() < 1e-5


def test_every_platform_has_a_default():
    assert [default_algorithm(p) for p in ("cpu", "gpu", "tpu", "other")] == [
        "svd",
        "gram",
        "polar",
        "gram",
    ]
