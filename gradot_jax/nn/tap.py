"""Factor taps: identities whose cotangent is a Kronecker factor.

A tap is a zero array fed to an identity on a layer's input or output. By `jax.custom_vjp` the
cotangent of the zero is the second moment `x^T x` of what flows forward, or `g^T g` of what flows
back, or of their product, so one `jax.grad` yields gradients and factors together, under scan,
remat, vmap and sharding alike. No activation is kept that the gradient would not keep anyway.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class InputMoments(NamedTuple):
    """Moments of a layer's input, summed over tokens, float32.

    Attributes:
        second: `[D, D]`, sum of `x x^T`.
        first: `[D]`, sum of `x`.
    """

    second: jax.Array
    first: jax.Array


def zero_input_tap(width: int) -> InputMoments:
    """A tap for inputs of the given width."""
    return InputMoments(jnp.zeros((width, width), jnp.float32), jnp.zeros((width,), jnp.float32))


def zero_output_tap(width: int) -> jax.Array:
    """A tap `[D, D]` for outputs of the given width."""
    return jnp.zeros((width, width), jnp.float32)


def zero_removal_tap(width: int) -> jax.Array:
    """A tap `[D, D]` for the removal of inputs of the given width."""
    return jnp.zeros((width, width), jnp.float32)


def _gram(left: jax.Array, right: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
        left,
        right,
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


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
    counted = rows if mask is None else rows * mask.reshape(-1, 1).astype(rows.dtype)
    moments = InputMoments(_gram(rows, counted), counted.astype(jnp.float32).sum(0))
    return cotangent, moments, None


tap_input.defvjp(_tap_input_forward, _tap_input_backward)


@jax.custom_vjp
def tap_output(y: jax.Array, tap: jax.Array) -> jax.Array:
    """Returns `y` `[..., D]`; the cotangent of `tap` `[D, D]` is `g^T g` of y's cotangent rows."""
    del tap
    return y


def _tap_output_forward(y, tap):
    del tap
    return y, None


def _tap_output_backward(_, cotangent):
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    return cotangent, _gram(rows, rows)


tap_output.defvjp(_tap_output_forward, _tap_output_backward)


@jax.custom_vjp
def tap_removal(x: jax.Array, tap: jax.Array, mask: jax.Array | None) -> jax.Array:
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
    if mask is not None:
        rows *= mask.reshape(-1, 1).astype(jnp.float32)
    return cotangent, _gram(rows, rows), None


tap_removal.defvjp(_tap_removal_forward, _tap_removal_backward)
