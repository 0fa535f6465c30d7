"""Factor taps: identities whose cotangent is a Kronecker factor.

A tap is a zero array fed to an identity on a layer's input or output. By `jax.custom_vjp` the
cotangent of the zero is the second moment `x^T x` of what flows forward, or `g^T g` of what flows
back, or of their product, so one `jax.grad` yields gradients and factors together, under scan,
remat, vmap and sharding alike. No activation is kept that the gradient would not keep anyway.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.linalg.gram import Gram, gram, zero_gram


class InputMoments(NamedTuple):
    """Moments of a layer's input, summed over tokens, float32.

    Attributes:
        second: sum of `x x^T`, `[D, D]`.
        first: `[D]`, sum of `x`.
    """

    second: Gram
    first: jax.Array


def zero_input_tap(width: int) -> InputMoments:
    """A tap for inputs of the given width."""
    return InputMoments(zero_gram(width), jnp.zeros((width,), jnp.float32))


def zero_output_tap(width: int) -> Gram:
    """A tap for outputs of the given width."""
    return zero_gram(width)


def zero_removal_tap(width: int) -> Gram:
    """A tap for the removal of inputs of the given width."""
    return zero_gram(width)


@jax.custom_vjp
def tap_input(x: jax.Array, tap: InputMoments, mask: jax.Array | None) -> jax.Array:
    """Returns `x` `[..., D]`; the cotangent of `tap` is the moments of its rows.

    Args:
        x: `[..., D]`, input of one or several linear maps.
        tap: zeros, see `zero_input_tap`.
        mask: `[...]`, 1 at the tokens that count and 0 elsewhere; None when all count.
    """
    del tap, mask
    return x


def _tap_input_forward(x, tap, mask):
    del tap
    return x, (x, mask)


def _tap_input_backward(residual, cotangent):
    x, mask = residual
    rows = x.reshape(-1, x.shape[-1])
    counted = None if mask is None else mask.reshape(-1)
    first = rows if counted is None else rows * counted[:, None].astype(rows.dtype)
    moments = InputMoments(gram(rows, counted), first.astype(jnp.float32).sum(0))
    return cotangent, moments, None


tap_input.defvjp(_tap_input_forward, _tap_input_backward)


@jax.custom_vjp
def tap_output(y: jax.Array, tap: Gram) -> jax.Array:
    """Returns `y` `[..., D]`; the cotangent of `tap` is `g^T g` of y's cotangent rows."""
    del tap
    return y


def _tap_output_forward(y, tap):
    del tap
    return y, None


def _tap_output_backward(_, cotangent):
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    return cotangent, gram(rows)


tap_output.defvjp(_tap_output_forward, _tap_output_backward)


@jax.custom_vjp
def tap_removal(x: jax.Array, tap: Gram, mask: jax.Array | None) -> jax.Array:
    """Returns `x` `[..., D]`; the cotangent of `tap` is `r^T r` of the rows `r = x * g`.

    With g the cotangent of x, `-r_j` is the first-order change of the loss when feature j of a
    token is set to zero.

    Args:
        x: `[..., D]`.
        tap: zeros, see `zero_removal_tap`.
        mask: `[...]`, 1 at the tokens that count and 0 elsewhere; None when all count.
    """
    del tap, mask
    return x


def _tap_removal_forward(x, tap, mask):
    del tap
    return x, (x, mask)


def _tap_removal_backward(residual, cotangent):
    x, mask = residual
    # Half precision would round a product of small gradients to zero.
    rows = x.astype(jnp.float32) * cotangent.astype(jnp.float32)
    rows = rows.reshape(-1, x.shape[-1])
    return cotangent, gram(rows, None if mask is None else mask.reshape(-1)), None


tap_removal.defvjp(_tap_removal_forward, _tap_removal_backward)
