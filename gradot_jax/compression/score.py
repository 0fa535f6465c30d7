"""GCS, the gradient-preserving compression score (GradOT, section 3).

    GCS(delta) = || H delta ||_1 - lambda <g, delta>

A change delta that compresses should shift the adapter's gradient little (first term) and raise
the loss (second term). With `H vec(Delta) = vec(A Delta G)` and every removal of rank one, both
terms are closed forms. What scores least is removed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.curvature.factors import KroneckerFactors, with_bias
from gradot_jax.linalg.svd import SVD
from gradot_jax.nn.layout import Channels
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


class LayerTerms(NamedTuple):
    """Score terms of a layer: of the components `[K]` of each site, of the channels `[F]`."""

    components: dict[str, ScoreTerms]
    channels: ScoreTerms


def without_gradient(components: Mapping[str, jax.Array], channels: jax.Array) -> LayerTerms:
    """The terms of a rule that scores by one number, `[K]` by site and `[F]`."""
    zero = {site: ScoreTerms(s, jnp.zeros_like(s)) for site, s in components.items()}
    return LayerTerms(zero, ScoreTerms(channels, jnp.zeros_like(channels)))


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


def by_shape(shapes: Mapping[Any, Any]) -> list[tuple[Any, ...]]:
    """Keys whose shapes are equal, group by group, in their order."""
    groups: dict[Any, list[Any]] = {}
    for key, shape in shapes.items():
        groups.setdefault(shape, []).append(key)
    return list(map(tuple, groups.values()))


def component_scores(
    score: Callable[[SVD, KroneckerFactors], ScoreTerms],
    parts: Mapping[str, SVD],
    factors: Mapping[str, KroneckerFactors],
) -> dict[str, ScoreTerms]:
    """Scores the components of all sites, those of equal shape in one `vmap`; inside `jit`."""
    terms = {}
    for sites in by_shape({site: (p.left.shape, p.right.shape) for site, p in parts.items()}):
        terms |= unstack(jax.vmap(score)(stack(parts, sites), stack(factors, sites)), sites)
    return terms


def stack(trees: Mapping[Any, Any], keys: Sequence[Any]) -> Any:
    """Trees of equal shapes along a new leading axis; on the host where all are numpy."""
    leaves = [trees[key] for key in keys]
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(leaves))
    return jax.tree.map(lambda *rows: (np if on_host else jnp).stack(rows), *leaves)


def unstack(stacked: Any, keys: Sequence[Any]) -> dict[Any, Any]:
    """What `stack` put together, by key."""
    return {k: jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i, k in enumerate(keys)}


def channel_terms(
    channels: Channels, layer: Mapping[str, Dense], factors: Mapping[str, KroneckerFactors]
) -> ScoreTerms:
    """Terms for removing each hidden channel of an MLP (SCP).

    Removing channel j zeroes column j of each map m into the channels (with its bias) and row j of
    the map out of them:

        sum_m ||A w_j||_1 ||G_m[:, j]||_1 + ||A_out[:, j]||_1 ||G_out w_out,j||_1
        sum_m <dW_m[:, j], w_j> + db_j b_j + <dW_out[j, :], w_out,j>

    Args:
        channels: which maps those are.
        layer: kernels `[D, F]`, biases `[F]` or None; of the map out `[F, D]`.
        factors: of the same maps; `gradient` may be None.

    Returns:
        `[F]` each.
    """
    out, of_out = layer[channels.out], factors[channels.out]
    hessian = jnp.zeros((out.shape[0],))
    for site in channels.into:
        chex.assert_shape(layer[site].kernel, (None, out.shape[0]))
        columns = jnp.abs(moved_columns(layer[site], factors[site])).sum(0)
        columns = columns * jnp.abs(factors[site].gradient_covariance).sum(0)
        hessian = hessian + columns
    rows = jnp.abs(of_out.input_covariance).sum(0)
    kernel = out.kernel.astype(jnp.float32)
    rows *= jnp.abs(jnp.dot(of_out.gradient_covariance, kernel.T, precision=_EXACT)).sum(0)
    return ScoreTerms(hessian + rows, channel_gradient(channels, layer, factors))


def moved_columns(weights: Dense, factors: KroneckerFactors) -> jax.Array:
    """`A W` of a map into the channels, `[D, F]`; with a bias, of both together, `[D + 1, F]`."""
    kernel, moment = weights.kernel.astype(jnp.float32), factors.input_covariance
    if weights.bias is not None:
        kernel = jnp.concatenate([kernel, weights.bias.astype(jnp.float32)[None]])
        moment = with_bias(factors)
    return jnp.dot(moment, kernel, precision=_EXACT)


def channel_gradient(
    channels: Channels, layer: Mapping[str, Dense], factors: Mapping[str, KroneckerFactors]
) -> jax.Array:
    """The first-order term of `channel_terms`, `[F]`; zero where no gradient was taken."""
    out = layer[channels.out]
    slopes = {site: factors[site].gradient for site in (*channels.into, channels.out)}
    if any(slope is None for slope in slopes.values()):
        return jnp.zeros((out.shape[0],), jnp.float32)
    parts = [(slopes[site].kernel * layer[site].kernel).sum(0) for site in channels.into]
    parts.append((slopes[channels.out].kernel * out.kernel).sum(1))
    biased = [site for site in channels.into if layer[site].bias is not None]
    parts += [slopes[site].bias * layer[site].bias for site in biased]
    return functools.reduce(jnp.add, parts)


def channel_norms(channels: Channels, layer: Mapping[str, Dense]) -> jax.Array:
    """Euclidean norm of each channel's weights in all its maps, biases included; `[F]`."""
    layer = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), dict(layer))
    parts = [jnp.square(layer[site].kernel).sum(0) for site in channels.into]
    parts.append(jnp.square(layer[channels.out].kernel).sum(1))
    biases = (layer[site].bias for site in channels.into)
    parts += [jnp.square(bias) for bias in biases if bias is not None]
    return jnp.sqrt(functools.reduce(jnp.add, parts))


def channel_energy(out: Dense, factors: KroneckerFactors) -> jax.Array:
    """Root mean square of what each channel adds to the output, `sqrt(E[a_j^2]) ||w_j||`; `[F]`.

    Args:
        out: the map out of the channels, kernel `[F, D]`.
        factors: of it.
    """
    kernel = out.kernel.astype(jnp.float32)
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
