"""SCP as a search: the set of channels whose removal scores least as a set.

GradOT, section 3.3, looks for the optimal subset of channels. With Delta(S) the removal of a set S

    f(S) = sum_m || A_m Delta_m(S) G_m ||_1 - lambda <g, Delta(S)>

which the sum of single scores bounds from above. In each of the M maps a channel adds a matrix of
rank one to `R_m = A_m Delta_m(S) G_m`, so that what it costs to flip a channel, removed or kept, is

    f(S + j) - f(S) = sum_m ( || R_m + l_mj r_mj^T ||_1 - || R_m ||_1 ) + lambda's term

with no approximation. A pass over all channels computes `M D F^2` entries: 4e9 for SmolLM2-135M,
3e11 for an OPT of D = 2048 and F = 8192. A set of a known size takes 10 to 25 passes; elimination
one by one would take F of them, in rounds it is about 100 at F = 1536 and 200 at F = 8192, over the
channels that are left. Beside the factors about 4 matrices `[D, F]` a map are alive, and a block of
candidates, never `[F, D, F]`.
"""

from collections.abc import Mapping
from functools import partial, reduce
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from gradot_jax.compression.rank import keep_order
from gradot_jax.compression.score import ScoreTerms, channel_gradient, channel_terms, moved_columns
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.nn.layout import Channels
from gradot_jax.nn.linear import Dense

BLOCK = 2**22
"""Entries of a block: of one row of R for each of the candidates that go side by side."""

_ROWS = 16
"""Rows of R that a step adds: fewer would move the sums through memory too often."""

_SHARE, _WINDOW = 16, 64
"""A round of elimination takes one channel and a sixteenth as many as are gone, of the cheapest 64;
larger shares cost up to 5 % of f."""

_RETURNS, _PARTNERS, _ROUNDS = 64, 16, 64
"""A round of swaps tries so many removed channels, each against so many kept ones; and the most
rounds. Other numbers, and a start from elimination, change f by 1 % in either direction."""

_NOISE = 1e-6
"""Fall of f, as a share of it, that rounding can feign."""

_EXACT = jax.lax.Precision.HIGHEST


class Removals(NamedTuple):
    """What the removal of each channel does to one map: `A Delta_j G = - left_j right_j^T`.

    Transposed for the map out of the channels, so that F comes last in each.

    Attributes:
        left: `[F, D]`, of a map with a bias `[F, D + 1]`.
        right: `[F, F]`.
    """

    left: jax.Array
    right: jax.Array


class _Search(NamedTuple):
    """The set so far: which channels are removed `[F]`, and R `[D, F]` of each map."""

    removed: jax.Array
    residuals: tuple[jax.Array, ...]


@partial(jax.jit, static_argnames="channels")
def channel_set_terms(
    channels: Channels,
    layer: Mapping[str, Dense],
    factors: Mapping[str, KroneckerFactors],
    removed: jax.Array,
) -> ScoreTerms:
    """Terms of the score for removing a set of channels, scalars.

    Args:
        channels: which maps those are.
        layer: them, as in `channel_terms`.
        factors: of the same maps; `gradient` may be None.
        removed: whether each channel is in the set, `[F]` bool.
    """
    chex.assert_shape(removed, (layer[channels.out].shape[0],))
    residuals = _residuals(_removals(channels, layer, factors), removed)
    gradient = channel_gradient(channels, layer, factors)
    return ScoreTerms(_norm(residuals), jnp.where(removed, gradient, 0).sum())


@partial(jax.jit, static_argnames=("channels", "count", "block"))
def channel_set_costs(
    channels: Channels,
    layer: Mapping[str, Dense],
    factors: Mapping[str, KroneckerFactors],
    weight: jax.Array | float = 0.0,
    count: int | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """What each channel costs as one of a set; falling costs are an order of keeping.

    For a known count the set starts as the channels of least single score, and channels are
    swapped while f falls: f is never above that of single scores, and the costs of the set are
    below all others. Otherwise channels are eliminated to the last, each at its cost given those
    before it, raised where costs would fall.

    Args:
        channels: which maps those are.
        layer: them, as in `channel_terms`.
        factors: of the same maps; `gradient` may be None.
        weight: lambda, dimensionless as in `combine`, by the means of single terms in this layer.
        count: channels that will be kept, at least 1, if that is known.
        block: see `BLOCK`.

    Returns:
        `[F]`, lambda's term included, in the unit of the Hessian term.
    """
    single = channel_terms(channels, layer, factors)
    hessian, gradient = (jnp.abs(term).mean() for term in single)
    slopes = weight * single.gradient * hessian / jnp.where(gradient > 0, gradient, 1)
    size, maps = slopes.shape[0], _removals(channels, layer, factors)
    if count is None:
        return _eliminate(maps, slopes, block)
    scores = single.hessian + slopes
    if count >= size:
        return scores
    least = jnp.zeros(size, bool).at[keep_order(scores, 0)[count:]].set(True)
    removed = _swap(maps, slopes, least, count, block)
    flips = _flips(maps, slopes, _search(maps, removed), size, block)
    costs = jnp.where(removed, -flips, flips)
    inside, outside = (jnp.where(s, costs, jnp.nan) for s in (removed, ~removed))
    lift = jnp.maximum(jnp.nanmax(inside) - jnp.nanmin(outside), 0) + 1e-3 * jnp.abs(costs).max()
    return jnp.where(removed, costs, costs + lift)


def _removals(channels, layer, factors) -> tuple[Removals, ...]:
    out, of_out = layer[channels.out].kernel.astype(jnp.float32), factors[channels.out]
    last = jnp.dot(out, of_out.gradient_covariance, precision=_EXACT), of_out.input_covariance
    moved = {site: moved_columns(layer[site], factors[site]).T for site in channels.into}
    into = [Removals(left, factors[site].gradient_covariance) for site, left in moved.items()]
    maps = (*into, Removals(*last))
    chex.assert_shape([m.right for m in maps], (len(out), len(out)))
    return maps


def _residuals(maps: tuple[Removals, ...], removed: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.dot((m.left * removed[:, None]).T, m.right, precision=_EXACT) for m in maps)


def _search(maps, removed: jax.Array) -> _Search:
    # Anew in each round: what rank-one changes round off does not add up.
    return _Search(removed, _residuals(maps, removed))


def _norm(residuals) -> jax.Array:
    return reduce(jnp.add, [jnp.abs(r).sum(0).sum() for r in residuals])


def _flipped(maps, search: _Search, channel: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """R of each map after a flip, and by how much their norms rise."""
    sign = jnp.where(search.removed[channel], -1.0, 1.0)
    pairs = list(zip(maps, search.residuals, strict=True))
    after = tuple(r + jnp.outer(sign * m.left[channel], m.right[channel]) for m, r in pairs)
    # Differences entry by entry: those of two norms would drown in rounding.
    rises = [(jnp.abs(a) - jnp.abs(r)).sum(0).sum() for a, (_, r) in zip(after, pairs, strict=True)]
    return after, reduce(jnp.add, rises)


def _rises(maps, residuals, chosen: jax.Array, signs: jax.Array) -> jax.Array:
    """By how much the norms rise with each flip of some channels `[C]`, side by side; `[C]`."""

    def of_map(removals: Removals, residual: jax.Array) -> jax.Array:
        left, right = signs[:, None] * removals.left[chosen], removals.right[chosen]

        def add_row(sums, row):
            old, steps = row
            return sums + (jnp.abs(old[None] + steps[:, None] * right) - jnp.abs(old)[None]), None

        rows = residual, left.T
        return jax.lax.scan(add_row, jnp.zeros_like(right), rows, unroll=_ROWS)[0].sum(1)

    return reduce(jnp.add, map(of_map, maps, residuals))


def _flips(maps, slopes, search: _Search, number: jax.Array | int, block: int) -> jax.Array:
    """By how much f rises with the flip of each channel, `[F]`; at least of `number` kept ones.

    Others are infinite.
    """
    size = slopes.shape[0]
    width = min(max(block // size, 1), size)
    kept_first = jnp.argsort(search.removed, stable=True)
    order = jnp.pad(kept_first, (0, -size % width), constant_values=size)
    signs = jnp.where(search.removed, -1.0, 1.0)

    def evaluate(index, flips):
        chosen = jax.lax.dynamic_slice_in_dim(order, index * width, width)
        rises = _rises(maps, search.residuals, chosen, signs[chosen])
        return flips.at[chosen].set(rises + signs[chosen] * slopes[chosen], mode="drop")

    return jax.lax.fori_loop(0, -(-number // width), evaluate, jnp.full(size, jnp.inf))


def _eliminate(maps, slopes, block: int) -> jax.Array:
    """Costs of greedy elimination, `[F]`; of equals the highest index goes first.

    A round looks at the cheapest in turn and removes those that, given the ones before, still cost
    no more than the last of twice as many as it is to take did at its start. The first 16 rounds
    take one each.
    """
    size, gap = slopes.shape[0], 4 * jnp.finfo(slopes.dtype).eps

    def last(removed, costs):
        return jnp.where(removed, costs, jnp.finfo(costs.dtype).min).max()

    def round_(state):
        removed, costs = state
        kept = size - removed.sum()
        start = _search(maps, removed)
        flips = _flips(maps, slopes, start, kept, block)
        # What is not a number goes first, and ends the search.
        flips = jnp.where(removed, jnp.inf, jnp.where(jnp.isnan(flips), -jnp.inf, flips))
        order = keep_order(flips, 0)[::-1]
        most = jnp.minimum(1 + (size - kept) // _SHARE, kept)
        limit = flips[order[jnp.minimum(2 * most, kept) - 1]]

        def turn(state, channel):
            search, costs = state
            after, rise = _flipped(maps, search, channel)
            rise += slopes[channel]
            taken = search.removed.sum() - removed.sum()
            fits = (taken < most) & ((rise <= limit) | (taken == 0)) & ~removed[channel]
            before = last(search.removed, costs)
            raised = jnp.maximum(rise, before + gap * jnp.abs(before))
            now = (
                _Search(search.removed.at[channel].set(True), after),
                costs.at[channel].set(raised),
            )
            return jax.lax.cond(fits, lambda: now, lambda: state), None

        (search, costs), _ = jax.lax.scan(turn, (start, costs), order[:_WINDOW])
        return search.removed, costs

    start = jnp.zeros(size, bool), jnp.full(size, jnp.inf)
    return jax.lax.while_loop(lambda s: ~s[0].all() & jnp.isfinite(last(*s)), round_, start)[1]


def _swap(maps, slopes, removed: jax.Array, count: int, block: int) -> jax.Array:
    """Swaps removed for kept channels while f falls; `[F]` bool.

    In a round the removed channels that would save most come back in turn, and the cheapest kept
    ones are tried in the place of each side by side.
    """
    size = slopes.shape[0]
    returns, partners = min(_RETURNS, size - count), min(_PARTNERS, count)

    def round_(state):
        removed, _, rounds = state
        start = _search(maps, removed)
        flips = _flips(maps, slopes, start, size, block)
        back = jnp.argsort(jnp.where(removed, flips, jnp.inf))[:returns]
        others = jnp.argsort(jnp.where(removed, jnp.inf, flips))[: min(returns + partners, count)]
        least = _NOISE * _norm(start.residuals)

        def turn(state, channel):
            search, swaps = state
            without, rise = _flipped(maps, search, channel)
            tried = jax.lax.dynamic_slice_in_dim(others, swaps, partners)
            rises = _rises(maps, without, tried, jnp.ones(partners)) + slopes[tried]
            rises = jnp.where(search.removed[tried], jnp.inf, rise - slopes[channel] + rises)
            best = tried[jnp.argmin(rises)]

            def swap():
                swapped = search.removed.at[channel].set(False).at[best].set(True)
                after, _ = _flipped(maps, _Search(search.removed, without), best)
                return _Search(swapped, after), swaps + 1

            return jax.lax.cond(rises.min() < -least, swap, lambda: state), None

        (search, swaps), _ = jax.lax.scan(turn, (start, 0), back)
        return search.removed, swaps, rounds + 1

    start = removed, jnp.asarray(1), 0
    return jax.lax.while_loop(lambda s: (s[1] > 0) & (s[2] < _ROUNDS), round_, start)[0]
