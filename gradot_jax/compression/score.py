"""GCS, the gradient-preserving compression score (GradOT, section 3).

    GCS(delta) = || H delta ||_1 - lambda <g, delta>

A change delta that compresses should shift the adapter's gradient little (first term) and raise
the loss (second term). With `H vec(Delta) = vec(A Delta G)` and every removal of rank one, both
terms are closed forms. What scores least is removed.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gradot_jax.curvature.factors import KroneckerFactors, with_bias
from gradot_jax.linalg.svd import SVD
from gradot_jax.nn.linear import Dense

_EXACT = jax.lax.Precision.HIGHEST


class ScoreTerms(NamedTuple):
    """The two terms of the score for each candidate of removal, before lambda.

    Attributes:
        hessian: `|| H delta ||_1`, `[..., K]`.
        gradient: `- <g, delta>`, `[..., K]`; zero where no gradient was taken.
    """

    hessian: jax.Array
    gradient: jax.Array


def component_terms(decomposition: SVD, factors: KroneckerFactors) -> ScoreTerms:
    """Terms for dropping each singular component of one matrix (DRD).

    Dropping component k is `Delta = - s_k u_k v_k^T`, so

        || A Delta G ||_1 = s_k ||A u_k||_1 ||G v_k||_1     - <dW, Delta> = s_k u_k^T dW v_k

    Args:
        decomposition: of the kernel, `left [D_in, K]`, `right [D_out, K]`.
        factors: of the same map; `gradient` may be None.

    Returns:
        `[K]` each.
    """
    u, s, v = decomposition
    chex.assert_shape(factors.input_covariance, (u.shape[0], u.shape[0]))
    chex.assert_shape(factors.gradient_covariance, (v.shape[0], v.shape[0]))
    left = jnp.abs(jnp.dot(factors.input_covariance, u, precision=_EXACT)).sum(0)
    right = jnp.abs(jnp.dot(factors.gradient_covariance, v, precision=_EXACT)).sum(0)
    return ScoreTerms(s * left * right, _component_gradient(decomposition, factors))


def quadratic_terms(decomposition: SVD, factors: KroneckerFactors) -> ScoreTerms:
    """As `component_terms`, with the KFAC quadratic form in place of the L1 norm.

    <Delta, A Delta G> = s_k^2 (u_k^T A u_k) (v_k^T G v_k)
    """
    u, s, v = decomposition
    chex.assert_shape(factors.input_covariance, (u.shape[0], u.shape[0]))
    chex.assert_shape(factors.gradient_covariance, (v.shape[0], v.shape[0]))
    left = (u * jnp.dot(factors.input_covariance, u, precision=_EXACT)).sum(0)
    right = (v * jnp.dot(factors.gradient_covariance, v, precision=_EXACT)).sum(0)
    # Rounding can take the form of a null vector below zero.
    form = jnp.maximum(left, 0) * jnp.maximum(right, 0)
    return ScoreTerms(jnp.square(s) * form, _component_gradient(decomposition, factors))


def whitened_terms(decomposition: SVD, factors: KroneckerFactors) -> ScoreTerms:
    """As `quadratic_terms`, of a decomposition in the norm of A and G: there it is `s_k^2`."""
    hessian = jnp.square(decomposition.values)
    return ScoreTerms(hessian, _component_gradient(decomposition, factors))


def _component_gradient(decomposition: SVD, factors: KroneckerFactors) -> jax.Array:
    u, s, v = decomposition
    if factors.gradient is None:
        return jnp.zeros_like(s)
    return s * (u * jnp.dot(factors.gradient.kernel, v, precision=_EXACT)).sum(0)


def channel_terms(
    fc1: Dense, fc2: Dense, fc1_factors: KroneckerFactors, fc2_factors: KroneckerFactors
) -> ScoreTerms:
    """Terms for removing each hidden channel of an MLP (SCP).

    Removing channel j zeroes column j of W1 (with its bias) and row j of W2:

        ||A1 w1_j||_1 ||G1[:, j]||_1 + ||A2[:, j]||_1 ||G2 w2_j||_1
        <dW1[:, j], w1_j> + db1_j b1_j + <dW2[j, :], w2_j>

    Args:
        fc1: kernel `[D, F]`, bias `[F]` or None.
        fc2: kernel `[F, D]`.
        fc1_factors: of fc1; `gradient` may be None.
        fc2_factors: of fc2, likewise.

    Returns:
        `[F]` each.
    """
    width, ffn = fc1.shape
    chex.assert_shape(fc2.kernel, (ffn, width))
    w1, w2 = fc1.kernel.astype(jnp.float32), fc2.kernel.astype(jnp.float32)
    a1 = fc1_factors.input_covariance
    if fc1.bias is not None:
        w1 = jnp.concatenate([w1, fc1.bias.astype(jnp.float32)[None]])
        a1 = with_bias(fc1_factors)
    first = jnp.abs(jnp.dot(a1, w1, precision=_EXACT)).sum(0)
    first *= jnp.abs(fc1_factors.gradient_covariance).sum(0)
    second = jnp.abs(fc2_factors.input_covariance).sum(0)
    second *= jnp.abs(jnp.dot(fc2_factors.gradient_covariance, w2.T, precision=_EXACT)).sum(0)
    return ScoreTerms(first + second, channel_gradient(fc1, fc2, fc1_factors, fc2_factors))


def channel_gradient(
    fc1: Dense, fc2: Dense, fc1_factors: KroneckerFactors, fc2_factors: KroneckerFactors
) -> jax.Array:
    """The first-order term of `channel_terms`, `[F]`; zero where no gradient was taken."""
    d1, d2 = fc1_factors.gradient, fc2_factors.gradient
    if d1 is None or d2 is None:
        return jnp.zeros((fc1.shape[1],), jnp.float32)
    gradient = (d1.kernel * fc1.kernel).sum(0) + (d2.kernel * fc2.kernel).sum(1)
    return gradient if fc1.bias is None else gradient + d1.bias * fc1.bias


def channel_norms(fc1: Dense, fc2: Dense) -> jax.Array:
    """Euclidean norm of each channel's weights in fc1, with its bias, and in fc2; `[F]`."""
    fc1, fc2 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (fc1, fc2))
    squares = jnp.square(fc1.kernel).sum(0) + jnp.square(fc2.kernel).sum(1)
    return jnp.sqrt(squares if fc1.bias is None else squares + jnp.square(fc1.bias))


def channel_energy(fc2: Dense, factors: KroneckerFactors) -> jax.Array:
    """Root mean square of what each channel adds to the output, `sqrt(E[a_j^2]) ||w2_j||`; `[F]`.

    Args:
        fc2: kernel `[F, D]`.
        factors: of fc2.
    """
    kernel = fc2.kernel.astype(jnp.float32)
    energy = jnp.diagonal(factors.input_covariance)
    return jnp.sqrt(energy) * jnp.linalg.norm(kernel, axis=1)


def combine(terms: ScoreTerms, weight: float) -> jax.Array:
    """The score `[...]` with a dimensionless lambda.

    The terms differ by orders of magnitude that change with layer and loss reduction, so each is
    divided by its mean absolute value over everything that is ranked together.

    Args:
        terms: of all candidates ranked together.
        weight: lambda; 0 leaves the Hessian term alone.
    """

    def scaled(term: jax.Array) -> jax.Array:
        mean = jnp.abs(term).mean()
        return term / jnp.where(mean > 0, mean, 1)

    if weight == 0:
        return scaled(terms.hessian)
    return scaled(terms.hessian) + weight * scaled(terms.gradient)
