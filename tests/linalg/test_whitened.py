import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.linalg.svd import reconstruct, svd
from gradot_jax.linalg.whitened import whitened_svd
from gradot_jax.parallel import make_mesh

DAMPING = 1e-4
SHAPES = [(5, 4), (3, 6), (4, 1), (1, 1)]


def moment(size, rank=None, seed=0):
    x = np.random.default_rng(seed).normal(size=(rank or 3 * size, size))
    return (x.T @ x / len(x)).astype(np.float32)


def damped(matrix):
    mean = np.trace(matrix) / len(matrix)
    return matrix.astype(np.float64) + DAMPING * (mean if mean > 0 else 1) * np.eye(len(matrix))


def case(shape, sides, rank=None):
    """One kernel and its moments, float32."""
    w = np.random.default_rng(9).normal(size=shape).astype(np.float32)
    a = moment(shape[0], rank)
    return w, a, moment(shape[1], rank, seed=1) if sides == 2 else None


def decompose(w, a, g):
    single = [None if part is None else jnp.asarray(part)[None] for part in (w, a, g)]
    return whitened_svd(*single, damping=DAMPING)


def norm(a, g):
    """`X -> tr(X^T A X G)`, damped, in float64."""
    a, g = damped(a), None if g is None else damped(g)

    def squared(x):
        x = np.asarray(x, np.float64)
        return np.trace(x.T @ a @ x @ (np.eye(x.shape[1]) if g is None else g))

    return squared


def truncated(decomposition, rank):
    u, s, v = (np.asarray(part[0], np.float64) for part in decomposition)
    return (u[:, :rank] * s[:rank]) @ v[:, :rank].T


def symmetric_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


def least_errors(w, a, g):
    """The minimum of the norm at each rank: squared singular values of `A^1/2 W G^1/2` left out."""
    right = np.eye(w.shape[1]) if g is None else symmetric_root(damped(g))
    values = np.linalg.svd(symmetric_root(damped(a)) @ w @ right, compute_uv=False)
    return values, np.append(np.cumsum(values[::-1] ** 2)[::-1], 0)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_attains_the_analytic_minimum_at_every_rank(shape, sides, assert_close):
    w, a, g = case(shape, sides)
    got = decompose(w, a, g)
    values, least = least_errors(w, a, g)
    assert_close(got.values[0], values, "float32")
    errors = [norm(a, g)(w - truncated(got, rank)) for rank in range(len(values) + 1)]
    assert_close(np.array(errors), least, "float32")


@pytest.mark.parametrize("sides", [1, 2])
def test_no_other_matrix_of_the_rank_is_nearer(sides):
    w, a, g = case((5, 4), sides)
    error, rank = norm(a, g), 2
    best = truncated(decompose(w, a, g), rank)
    plain = truncated(svd(jnp.asarray(w)[None]), rank)
    assert error(w - best) < 0.99 * error(w - plain)
    u, s, vt = np.linalg.svd(best)
    left, right = u[:, :rank] * s[:rank], vt[:rank]
    rng = np.random.default_rng(2)
    for _ in range(50):
        steps = (1e-2 * rng.normal(size=part.shape) for part in (left, right))
        assert error(w - best) < error(w - (left + next(steps)) @ (right + next(steps)))


def test_columns_are_orthonormal_in_their_moments(assert_close):
    w, a, g = case((5, 4), 2)
    left, _, right = (np.asarray(part[0], np.float64) for part in decompose(w, a, g))
    assert_close(left.T @ damped(a) @ left, np.eye(4), "float32_model")
    assert_close(right.T @ damped(g) @ right, np.eye(4), "float32_model")


def test_identity_moments_give_the_plain_decomposition(assert_close):
    w = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    eyes = [jnp.broadcast_to(jnp.eye(size), (2, size, size)) for size in (4, 6)]
    got, plain = whitened_svd(jnp.asarray(w), *eyes, damping=1e-7), svd(jnp.asarray(w))
    assert_close(got.values, plain.values, "float32")
    assert_close(reconstruct(got), w, "float32")


@pytest.mark.parametrize("sides", [1, 2])
def test_permuting_inputs_permutes_rows(sides, assert_close):
    w, a, g = case((5, 4), sides)
    p = np.array([3, 0, 4, 1, 2])
    got, permuted = decompose(w, a, g), decompose(w[p], a[p][:, p], g)
    assert_close(permuted.values, got.values, "float32")
    assert_close(truncated(permuted, 2), truncated(got, 2)[p], "float32")


@pytest.mark.parametrize("sides", [1, 2])
def test_moments_of_one_token_still_determine_every_component(sides, assert_close):
    w, a, g = case((5, 4), sides, rank=1)
    got = decompose(w, a, g)
    values, least = least_errors(w, a, g)
    assert_close(got.values[0], values, "float32_model")
    assert_close(norm(a, g)(w - truncated(got, 2)), least[2], "float32_model")


def test_ill_conditioned_moments_do_not_spoil_the_approximation():
    # As measured at the input of attention: one direction holds nearly everything.
    size, rank = 24, 8
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    a = ((basis * np.logspace(0, -9, size)) @ basis.T).astype(np.float32)
    w = rng.normal(size=(size, size)).astype(np.float32)
    least = least_errors(w, a, a)[1][rank]
    assert norm(a, a)(w - truncated(decompose(w, a, a), rank)) <= 1.001 * least


def test_vanishing_components_are_zero_and_dead_moments_are_finite():
    w = np.outer(np.arange(1.0, 5), np.arange(1.0, 4)).astype(np.float32)
    dead = np.zeros((4, 4), np.float32)
    left, _, right = map(np.asarray, decompose(w, dead, moment(3)))
    assert np.isfinite(left).all() and np.isfinite(right).all()
    assert not left[0, :, 1:].any() and not right[0, :, 1:].any()
    np.testing.assert_allclose(truncated(decompose(w, dead, moment(3)), 1), w, rtol=1e-5)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_non_finite_input_is_refused(position):
    parts = [np.stack([part] * 2) for part in case((4, 4), 2)]
    parts[position][1, 2, 0] = np.nan
    message = "matrix 1 of 2" if position == 0 else "second moment 1 of 2"
    with pytest.raises(ValueError, match=message):
        whitened_svd(*map(jnp.asarray, parts), damping=DAMPING)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_kernels_are_decomposed_in_float32(dtype, assert_close):
    w, a, g = case((5, 4), 2)
    half = jnp.asarray(w, dtype)
    got = decompose(half, a, g)
    assert {part.dtype for part in got} == {jnp.dtype("float32")}
    assert_close(got, decompose(half.astype(jnp.float32), a, g), "float32")


@pytest.mark.parametrize("sides", [1, 2])
def test_over_devices_equals_on_one(sides, assert_close):
    kernels, a, g = (None if part is None else np.stack([part] * 3) for part in case((5, 4), sides))
    kernels = np.random.default_rng(3).normal(size=kernels.shape).astype(np.float16)
    expected = whitened_svd(jnp.asarray(kernels), a, g, damping=DAMPING)
    got = whitened_svd(kernels, a, g, damping=DAMPING, mesh=make_mesh(2, 2))
    assert all(part.sharding.is_fully_replicated for part in got)
    assert_close(got, expected, "float32")
