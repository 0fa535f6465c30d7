"""Decoding with a cache: each new token is run alone, on the keys and values of those before it.

Prompts are padded on the right and token t of a sequence has its keys at index t, so that rows of
any length go side by side and a row does not depend on its neighbours.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params, Segment, Shared, depth, get_block
from gradot_jax.models.partition import gather_over_data
from gradot_jax.models.run import apply_with_attention, embed, head, runs
from gradot_jax.nn.attention import cached_attention, causal_attention
from gradot_jax.nn.layout import Projected


class Cache(NamedTuple):
    """Keys and values of the layers of a run, `[L, B, C, G K]` each."""

    keys: jax.Array
    values: jax.Array


class Decoding(NamedTuple):
    """Sequences being written.

    Attributes:
        caches: of each run of layers; None where a run has no attention.
        logits: of the next token of each sequence, `[B, V]`.
        counts: `[B]`, tokens of each sequence.
    """

    caches: tuple[Cache | None, ...]
    logits: jax.Array
    counts: jax.Array


class Sampling(NamedTuple):
    """How the next token is chosen.

    Attributes:
        temperature: what logits are divided by before a token is drawn; 0 takes the likeliest.
        top_p: a token is drawn from the fewest of the likeliest whose probabilities reach it.
    """

    temperature: float = 0.0
    top_p: float = 1.0


GREEDY = Sampling()


def longest_cached(config: ModelConfig) -> int:
    """Tokens of the longest sequence that can be decoded with a cache.

    A dynamic rotary embedding changes all keys with each token beyond those trained on first.
    """
    return getattr(config, "max_cached_positions", config.max_position_embeddings)


@partial(jax.jit, static_argnames=("config", "capacity"))
def prefill(
    config: ModelConfig, params: Params, input_ids: jax.Array, counts: jax.Array, *, capacity: int
) -> Decoding:
    """Runs prompts and fills the cache.

    Args:
        config: the model's configuration.
        params: its weights, or an assembled emulator's.
        input_ids: `[B, T]`, padded on the right, where no token of a prompt sees it.
        counts: `[B]`, tokens of each prompt, at least 1.
        capacity: C, tokens that a sequence can grow to.
    """
    space = ((0, 0), (0, capacity - input_ids.shape[1]), (0, 0))
    hidden, caches = embed(config, params.shell, input_ids), []
    for run, window in runs(config, params.segments):

        def attend(projected: Projected, window=window) -> tuple[jax.Array, Cache]:
            kept = (jnp.pad(a, space) for a in (projected.key, projected.value))
            heads = config.num_attention_heads
            return causal_attention(*projected, heads, None, window), Cache(*kept)

        def step(hidden: jax.Array, index: jax.Array, run=run, attend=attend):
            return apply_with_attention(config, get_block(run, index), hidden, attend)

        hidden, cache = jax.lax.scan(step, hidden, _indices(run))
        caches.append(cache)
    last = jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)
    return Decoding(tuple(caches), head(config, params.shell, last)[:, 0], counts)


@partial(jax.jit, static_argnames=("config", "sampling", "steps"), donate_argnames=("decoding",))
def decode(
    config: ModelConfig,
    params: Params,
    decoding: Decoding,
    keys: jax.Array,
    *,
    sampling: Sampling = GREEDY,
    steps: int,
) -> tuple[Decoding, jax.Array]:
    """Writes `steps` tokens at the end of each sequence.

    Args:
        config: the model's configuration.
        params: its weights, or an assembled emulator's.
        decoding: the sequences; its arrays are given up.
        keys: `[B]` random keys, one for each sequence; the number of a token is folded in.
        sampling: how tokens are chosen.
        steps: how many.

    Returns:
        The sequences grown, and the tokens `[B, steps]`; -1 from where a sequence's logits are not
        numbers.
    """

    def step(decoding: Decoding, _):
        tokens = _choose(decoding, keys, sampling)
        return _advance(config, params, decoding, jnp.maximum(tokens, 0)), tokens

    decoding, tokens = jax.lax.scan(step, decoding, length=steps)
    return decoding, tokens.T


def _choose(decoding: Decoding, keys: jax.Array, sampling: Sampling) -> jax.Array:
    logits = decoding.logits.astype(jnp.float32)
    tokens = logits.argmax(-1)
    if sampling.temperature:
        own = jax.vmap(jax.random.fold_in)(keys, decoding.counts)
        scaled = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
        tokens = jax.vmap(jax.random.categorical)(own, nucleus(scaled, sampling.top_p))
    return jnp.where(jnp.isfinite(logits).all(-1), tokens, -1)


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits `[..., V]` of the fewest likeliest tokens that reach `top_p`; -inf elsewhere.

    Holtzman et al. 2020. The likeliest token stays whatever `top_p`.
    """
    if top_p >= 1:
        return logits
    falling = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.where((before < top_p) | (before == 0), falling, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _advance(
    config: ModelConfig, params: Params, decoding: Decoding, tokens: jax.Array
) -> Decoding:
    """Runs one token of each sequence."""
    position = decoding.counts
    shell, caches = gather_over_data(params.shell), []
    hidden = config.family.embed(config, shell, tokens[:, None], position[:, None], None)
    for (run, window), cache in zip(runs(config, params.segments), decoding.caches, strict=True):
        step = partial(_cached_step, config, run, window, position)
        indices = _indices(run)
        (hidden, cache), _ = jax.lax.scan(
            step, (hidden, cache), (jnp.arange(len(indices)), indices)
        )
        caches.append(cache)
    return Decoding(tuple(caches), head(config, params.shell, hidden)[:, 0], position + 1)


def _cached_step(config: ModelConfig, run, window: int | None, position: jax.Array, carry, indices):
    (hidden, cache), (place, index) = carry, indices
    rows = jnp.arange(len(position))

    def attend(projected: Projected) -> tuple[jax.Array, Cache]:
        # Written before it is read, so that the cache can grow where it lies.
        where = (place, rows, position)
        keys = cache.keys.at[where].set(projected.key[:, 0])
        grown = Cache(keys, cache.values.at[where].set(projected.value[:, 0]))
        keys, values = (leaf[place] for leaf in grown)
        heads = config.num_attention_heads
        return cached_attention(projected.query, keys, values, heads, position, window), grown

    block, at = get_block(run, index), position[:, None]
    return apply_with_attention(config, block, hidden, attend, positions=at), None


def _indices(run: Segment) -> jax.Array:
    """Of the stored layers of a run, in the order in which they run."""
    return jnp.asarray(run.order if isinstance(run, Shared) else range(depth(run)), jnp.int32)
