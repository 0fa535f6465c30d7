"""The exact Hessian of a layer's kernels, and what its maps read and what flows back, by token.

The loss is the mean next-token loss of one batch without padding, as a function of the kernels of
one layer. Its Hessian times a tangent is `jax.jvp` of `jax.grad`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from gradot_jax.models.params import Params, get_block
from gradot_jax.nn.layout import Block, maps
from gradot_jax.nn.linear import linear

Arrays = dict[str, jax.Array]
_AT_ONCE = 3
"""Tangents that go through the model together: each keeps the activations of all its layers."""


class ShiftedMaps:
    """Stands in for `TappedMaps`: keeps what the maps read, and adds to what they put out."""

    def __init__(self, block: Block, shifts: Arrays | None = None):
        self.block, self.shifts, self.inputs = block, shifts, {}

    def read(self, name: str, x: jax.Array) -> jax.Array:
        """Returns `x`, and keeps it."""
        self.inputs[name] = x
        return x

    def apply(self, site: str, x: jax.Array) -> jax.Array:
        """The output of a site."""
        y = linear(getattr(self.block, site), x)
        return y if self.shifts is None else y + self.shifts[site]

    def remove(self, x: jax.Array) -> jax.Array:
        """Returns `x`."""
        return x


def apply_layer(config, own: ShiftedMaps, hidden: jax.Array) -> jax.Array:
    """As the package's, without padding or window; its attention has no forward mode."""
    projected = config.family.project(config, own, hidden, None)
    batch, length, width = projected.query.shape
    size = width // config.num_attention_heads
    query, key, value = (x.reshape(batch, length, -1, size) for x in projected)
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("BTHK,BSHK->BHTS", query, key) * size**-0.5
    seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    mixed = jnp.einsum("BHTS,BSHK->BTHK", weights, value).reshape(batch, length, width)
    return config.family.finish(config, own, hidden, mixed)


def mean_loss(config, params: Params, number, own: ShiftedMaps, hidden, targets) -> jax.Array:
    """Mean next-token loss in nats, from the input `[B, T, D]` of layer `number` on."""
    (blocks,) = params.segments

    def step(x, layer):
        weights, runs = layer
        run = partial(apply_layer, config, ShiftedMaps(weights))
        # One program for all depths.
        return jax.lax.cond(runs, run, lambda x: x, x), None

    def sequence(rows):
        logits = jnp.dot(*config.family.head_operands(config, params.shell, rows[0][None]))[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[1]).mean()

    hidden = apply_layer(config, own, hidden)
    hidden, _ = jax.lax.scan(step, hidden, (blocks, jnp.arange(params.num_layers) > number))
    return jax.lax.map(sequence, (hidden, targets)).mean()


def hessian_action(config, params: Params, number, hidden, targets) -> Callable[[Arrays], Arrays]:
    """The Hessian of `mean_loss` in the kernels of layer `number`, as a function of a tangent."""
    block = get_block(params.segments[0], number)

    def loss(kernels: Arrays) -> jax.Array:
        changed = {s: getattr(block, s).replace(kernel=k) for s, k in kernels.items()}
        own = ShiftedMaps(block.replace(**changed))
        return mean_loss(config, params, number, own, hidden, targets)

    # The jvp of the gradient at many tangents.
    return jax.linearize(jax.grad(loss), {s: w.kernel for s, w in maps(block).items()})[1]


@partial(jax.jit, static_argnames=("config",))
def hessian_norms(config, params: Params, number, hidden, targets, tangents: Arrays) -> Arrays:
    """`||H vec(Delta)||_1` `[K]` by site for tangents `[K, D_in, D_out]`, zero in all but one."""
    action = hessian_action(config, params, number, hidden, targets)
    norms = lambda t: jax.tree.map(lambda h: jnp.abs(h).sum(), action(t))  # noqa: E731
    return jax.lax.map(norms, tangents, batch_size=_AT_ONCE)


@partial(jax.jit, static_argnames=("config",))
def token_rows(config, params: Params, number, hidden, targets) -> dict[str, tuple]:
    """By site inputs `[N, D_in]` and `d(summed loss)/dy` `[N, D_out]`, token by token."""
    block = get_block(params.segments[0], number)

    def loss(shifts: Arrays):
        own = ShiftedMaps(block, shifts)
        return mean_loss(config, params, number, own, hidden, targets) * targets.size, own.inputs

    zeros = {s: jnp.zeros((*targets.shape, w.shape[1])) for s, w in maps(block).items()}
    g, x = jax.grad(loss, has_aux=True)(zeros)
    rows = {site.name: (x[site.reads], g[site.name]) for site in block.layout.sites}
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), rows)
