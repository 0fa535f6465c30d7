import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.layer import (
    LayerFactors,
    LayerWeights,
    component_order,
    cut_attention,
    cut_mlp,
    propose,
)
from gradot_jax.compression.rule import gradot_rule
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.nn.linear import Dense, LowRank, dense_kernel
from gradot_jax.parallel import make_mesh, put

SITES, D, F, TOKENS = 2, 6, 8, 20
CAP = D // 2


def weights(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def dense(*shape):
        kernel, bias = rng.normal(size=shape), rng.normal(size=shape[:-2] + shape[-1:])
        return Dense(jnp.asarray(kernel, dtype), jnp.asarray(bias, dtype))

    return LayerWeights(dense(SITES, D, D), dense(D, F), dense(F, D))


def factors(seed=0):
    rng = np.random.default_rng(seed)

    def site(d_in, d_out):
        x, g = rng.normal(size=(TOKENS, d_in)), rng.normal(size=(TOKENS, d_out))
        parts = x.T @ x / TOKENS, x.mean(0), g.T @ g / TOKENS, x.T @ g / TOKENS, g.mean(0)
        a, mean, g2, dw, db = (jnp.asarray(part, jnp.float32) for part in parts)
        return KroneckerFactors(a, mean, g2, Dense(dw, db))

    attention = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(site(D, D) for _ in range(SITES)))
    return LayerFactors(attention, site(D, F), site(F, D))


@pytest.fixture(scope="module")
def candidate():
    return propose(weights(), factors(), gradot_rule())


def test_order_keeps_the_floor_of_every_site(candidate):
    order = np.asarray(component_order(candidate.terms.components.hessian, 2))
    np.testing.assert_array_equal(order[:, :2], [[0, 1]] * SITES)
    np.testing.assert_array_equal(np.sort(order), [np.arange(D)] * SITES)


@pytest.mark.parametrize("rank", [CAP, CAP + 1, D])
def test_rank_from_break_even_on_keeps_the_original(candidate, rank):
    for site in range(SITES):
        kept, indices = cut_attention(candidate, site, np.arange(D), rank, "refit", 1e-4)
        assert indices is None
        np.testing.assert_array_equal(kept.kernel, candidate.weights.attention.kernel[site])
        np.testing.assert_array_equal(kept.bias, candidate.weights.attention.bias[site])


def test_components_below_break_even_are_kept_ascending(candidate, assert_close):
    order = np.array([4, 0, 2, 1, 3, 5])
    cut, indices = cut_attention(candidate, 1, order, 2, "none", 1e-4)
    assert isinstance(cut, LowRank) and cut.rank == 2 and indices == (0, 4)
    kernel = np.asarray(candidate.weights.attention.kernel[1], np.float64)
    u, s, vt = np.linalg.svd(kernel)
    assert_close(dense_kernel(cut), (u[:, [0, 4]] * s[[0, 4]]) @ vt[[0, 4]], "float32")


@pytest.mark.parametrize("compensation", ["bias", "refit"])
def test_compensated_attention_is_nearer_to_the_original_on_its_inputs(candidate, compensation):
    site = 0
    a = np.asarray(candidate.factors.attention.input_covariance[site], np.float64)
    mean = np.asarray(candidate.factors.attention.input_mean[site], np.float64)
    original = jax.tree.map(lambda leaf: np.asarray(leaf[site]), candidate.weights.attention)

    def error(name):
        cut, _ = cut_attention(candidate, site, np.arange(D), 1, name, 1e-6)
        lost = np.asarray(dense_kernel(cut), np.float64) - original.kernel
        shift = np.asarray(cut.bias, np.float64) - original.bias
        return np.trace(lost.T @ a @ lost) + 2 * mean @ lost @ shift + shift @ shift

    assert error(compensation) < error("none")


def test_all_channels_keep_the_original(candidate):
    fc1, fc2, kept = cut_mlp(candidate, np.arange(F)[::-1], F, "refit", 1e-4)
    assert fc1 is candidate.weights.fc1 and fc2 is candidate.weights.fc2
    assert kept == tuple(range(F))


def test_refitted_mlp_is_nearer_to_the_original_on_its_activations(candidate):
    a = np.asarray(candidate.factors.fc2.input_covariance, np.float64)
    kernel = np.asarray(candidate.weights.fc2.kernel, np.float64)

    def error(name):
        _, fc2, kept = cut_mlp(candidate, np.array([5, 1, 6, 0, 2, 3, 4, 7]), 3, name, 1e-6)
        assert kept == (1, 5, 6)
        lost = kernel.copy()
        lost[list(kept)] -= np.asarray(fc2.kernel)
        return np.trace(lost.T @ a @ lost)

    assert error("refit") < error("none")


@pytest.mark.parametrize("compensation", ["none", "refit"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_half_precision(dtype, compensation):
    candidate = propose(weights(dtype=dtype), factors(), gradot_rule())
    assert {leaf.dtype for leaf in jax.tree.leaves(candidate.terms)} == {jnp.dtype("float32")}
    cuts = [cut_attention(candidate, 0, np.arange(D), rank, compensation, 1e-4) for rank in (2, D)]
    mlp = cut_mlp(candidate, np.arange(F), 3, compensation, 1e-4)
    leaves = jax.tree.leaves(([cut for cut, _ in cuts], mlp[:2]))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("whitened", [False, True])
def test_weights_in_host_memory_in_half_precision_are_scored_in_float32(whitened, assert_close):
    rule = gradot_rule(attention_basis="whitened" if whitened else "svd")
    stored = weights(dtype=jnp.float16)
    mapped = jax.tree.map(np.asarray, stored)
    candidate = propose(mapped, factors(), rule)
    exact = propose(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored), factors(), rule)
    assert_close((candidate.decomposition, candidate.terms), exact[1:3], "float32")


@pytest.mark.parametrize("whitened", [False, True])
def test_decomposing_over_devices_proposes_the_same(whitened, assert_close):
    rule = gradot_rule(attention_basis="whitened" if whitened else "svd")
    mesh = make_mesh(2, 2)
    placed = put((weights(), factors()), mesh.replicated)
    got = propose(*placed, rule, mesh)
    assert_close(got.terms, propose(weights(), factors(), rule).terms, "float32")


def test_a_cut_is_made_on_the_host(candidate):
    """Else every new rank and number of channels would be a program to compile."""
    cut, _ = cut_attention(candidate, 0, np.arange(D), 2, "none", 1e-4)
    fc1, fc2, _ = cut_mlp(candidate, np.arange(F), 3, "refit", 1e-4)
    arrays = [cut.left, cut.right, fc1.kernel, fc1.bias, fc2.kernel]
    assert all(isinstance(array, np.ndarray) for array in arrays)
