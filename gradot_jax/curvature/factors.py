"""Kronecker factors of one linear map: the KFAC approximation H = A x G of its Fisher.

For `y = x W + b` with input x_n and `g_n = d(summed loss)/dy_n` at token n of N,

    A = (1/N) sum x_n x_n^T     G = (1/N) sum g_n g_n^T     dW = (1/N) sum x_n g_n^T

and `H vec(Delta) = vec(A Delta G)` (KFAC-expand: every token is a datum; Martens and Grosse 2015,
Eschenhagen et al. 2023). A bias is a constant 1 appended to x.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.curvature.tap import InputMoments
from gradot_jax.linalg.gram import Gram, symmetric
from gradot_jax.nn.linear import Dense


class KroneckerFactors(NamedTuple):
    """Factors and gradient of one linear map, means over tokens, float32.

    Attributes:
        input_covariance: A, `[D_in, D_in]`, not centred.
        input_mean: `[D_in]`, the border of A for the bias.
        gradient_covariance: G, `[D_out, D_out]`; None where only inputs were looked at.
        gradient: dW and db of the summed loss of all tokens over N, `[D_in, D_out]` and
            `[D_out]`; None if not asked for.
        removal_fisher: M, `[D_in, D_in]`, with `M_jk = (1/N) sum_n r_nj r_nk` and
            `r_n = x_n * (W g_n)`: for a set S of inputs that are zeroed, `1_S^T M 1_S` is the
            Fisher's quadratic form with no Kronecker approximation; None if not asked for.
    """

    input_covariance: jax.Array
    input_mean: jax.Array
    gradient_covariance: jax.Array | None
    gradient: Dense | None
    removal_fisher: jax.Array | None = None


@jax.jit
def normalise(
    inputs: InputMoments,
    outputs: Gram | None,
    gradient: Dense | None,
    num_tokens: jax.Array | float,
    removals: Gram | None = None,
) -> KroneckerFactors:
    """Divides sums over tokens by their number, and fills in the half that symmetry gives.

    Args:
        inputs: summed moments of x.
        outputs: summed `g g^T`, or None.
        gradient: gradient of the summed loss, or None.
        num_tokens: N.
        removals: summed `r r^T` of the input's removals, or None.
    """

    def mean(leaf):
        return leaf.astype(jnp.float32) / num_tokens

    def whole(matrix: Gram | None) -> jax.Array | None:
        return None if matrix is None else mean(symmetric(matrix))

    return KroneckerFactors(
        input_covariance=mean(symmetric(inputs.second)),
        input_mean=mean(inputs.first),
        gradient_covariance=whole(outputs),
        gradient=jax.tree.map(mean, gradient),
        removal_fisher=whole(removals),
    )


def with_bias(factors: KroneckerFactors) -> jax.Array:
    """A of the input with a constant 1 appended, `[D_in + 1, D_in + 1]`."""
    border = factors.input_mean[:, None]
    corner = jnp.ones((1, 1), border.dtype)
    return jnp.block([[factors.input_covariance, border], [border.T, corner]])
