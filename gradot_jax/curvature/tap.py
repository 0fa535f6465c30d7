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
from gradot_jax.nn.layout import Block, maps
from gradot_jax.nn.linear import linear


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


def _masked_forward(x, tap, mask):
    del tap
    return x, (x, mask)


def _tap_input_backward(residual, cotangent):
    x, mask = residual
    rows = x.reshape(-1, x.shape[-1])
    counted = None if mask is None else mask.reshape(-1)
    first = rows if counted is None else rows * counted[:, None].astype(rows.dtype)
    moments = InputMoments(gram(rows, counted), first.astype(jnp.float32).sum(0))
    return cotangent, moments, None


tap_input.defvjp(_masked_forward, _tap_input_backward)


@jax.custom_vjp
def tap_output(y: jax.Array, tap: Gram, mask: jax.Array | None) -> jax.Array:
    """Returns `y` `[..., D]`; the cotangent of `tap` is `g^T g` of y's cotangent rows.

    Args:
        y: `[..., D]`, output of a linear map.
        tap: zeros, see `zero_gram`.
        mask: `[...]`, 1 at the tokens that count and 0 elsewhere; None when all count.
    """
    del tap, mask
    return y


def _tap_output_forward(y, tap, mask):
    del tap
    return y, mask


def _tap_output_backward(mask, cotangent):
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    return cotangent, gram(rows, None if mask is None else mask.reshape(-1)), None


tap_output.defvjp(_tap_output_forward, _tap_output_backward)


@jax.custom_vjp
def tap_removal(x: jax.Array, tap: Gram, mask: jax.Array | None) -> jax.Array:
    """Returns `x` `[..., D]`; the cotangent of `tap` is `r^T r` of the rows `r = x * g`.

    With g the cotangent of x, `-r_j` is the first-order change of the loss when feature j of a
    token is set to zero.

    Args:
        x: `[..., D]`.
        tap: zeros, see `zero_gram`.
        mask: `[...]`, 1 at the tokens that count and 0 elsewhere; None when all count.
    """
    del tap, mask
    return x


def _tap_removal_backward(residual, cotangent):
    x, mask = residual
    # Half precision would round a product of small gradients to zero.
    rows = x.astype(jnp.float32) * cotangent.astype(jnp.float32)
    rows = rows.reshape(-1, x.shape[-1])
    return cotangent, gram(rows, None if mask is None else mask.reshape(-1)), None


tap_removal.defvjp(_masked_forward, _tap_removal_backward)


class BlockTaps(NamedTuple):
    """Factor taps of one block.

    Attributes:
        inputs: per tapped input, see `Site.reads`.
        outputs: per site; None where only inputs are looked at.
        removals: of the hidden channels, at the input of `Channels.out`; None where not asked for.
    """

    inputs: dict[str, InputMoments]
    outputs: dict[str, Gram] | None
    removals: Gram | None = None


def zero_taps(block: Block, *, with_outputs: bool = True, with_removals: bool = False) -> BlockTaps:
    """Taps that fit a single dense block; those of removals only when asked for."""
    sites, layout = maps(block), block.layout
    inputs = {site.reads: zero_input_tap(sites[site.name].shape[0]) for site in layout.sites}
    outputs = None
    if with_outputs:
        outputs = {name: zero_gram(weights.shape[1]) for name, weights in sites.items()}
    removals = zero_gram(sites[layout.channels.out].shape[0]) if with_removals else None
    return BlockTaps(inputs, outputs, removals)


class TappedMaps(NamedTuple):
    """The linear maps of a block as its function applies them, with or without taps.

    Attributes:
        block: one block.
        mask: `[B, T]`, 1 at the tokens that count; None when all do.
        taps: of the block, or None.
    """

    block: Block
    mask: jax.Array | None
    taps: BlockTaps | None

    def read(self, name: str, x: jax.Array) -> jax.Array:
        """Returns `x` `[B, T, D_in]`, the input of this name, tapped."""
        return x if self.taps is None else tap_input(x, self.taps.inputs[name], self.mask)

    def apply(self, site: str, x: jax.Array) -> jax.Array:
        """The output of a site `[B, T, D_out]`, tapped."""
        y = linear(getattr(self.block, site), x)
        if self.taps is None or self.taps.outputs is None:
            return y
        return tap_output(y, self.taps.outputs[site], self.mask)

    def remove(self, x: jax.Array) -> jax.Array:
        """Returns the hidden channels `x` `[B, T, F]`, tapped for their removal."""
        if self.taps is None or self.taps.removals is None:
            return x
        return tap_removal(x, self.taps.removals, self.mask)
