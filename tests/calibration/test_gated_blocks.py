"""Factors and scores of blocks with grouped queries and gated MLPs, by a plain model in float64.

The plain model repeats keys and values for each query that shares them, and adds zeros to what
every site puts out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.calibration.sweep import kronecker_factors, sweep_inputs
from gradot_jax.compression.channel import prune_channels
from gradot_jax.compression.score import ScoreTerms
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.linalg.svd import svd
from gradot_jax.methods.gradot import gradot_terms
from gradot_jax.models.families import read_config
from gradot_jax.models.llama.block import LAYOUT
from gradot_jax.models.params import get_block, init_params, unstack_blocks
from gradot_jax.models.run import apply_layer
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.layout import maps
from gradot_jax.nn.linear import Dense

B, T, V, HEADS, GROUPS = 4, 6, 11, 4, 2
SIZES = {
    "vocab_size": V,
    "hidden_size": 6,
    "intermediate_size": 5,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": 2,
    "max_position_embeddings": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}
SPLIT = AdapterSpec(1, 1)
SITES = [site.name for site in LAYOUT.sites]
FULL, SLIDING = "full_attention", "sliding_attention"
MODELS = {
    "llama, every map with a bias": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2, windows from the second layer on": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 2,
        "max_window_layers": 1,
    },
    "qwen3, norms of heads and windows in turn": {
        "model_type": "qwen3",
        "head_dim": 4,
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": [FULL, SLIDING, FULL, SLIDING],
    },
}
WINDOWS = {"llama": [None] * 4, "qwen2": [None, 2, 2, 2], "qwen3": [None, 3, None, 3]}
"""Tokens that each layer's attention sees."""


def build(values):
    """A model whose every parameter is random, gains and biases too."""
    config = read_config(SIZES | values)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        gain = path[-1].name == "scale"
        return jnp.asarray(gain + 0.4 * rng.normal(size=leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return config, jax.tree.map_with_path(fill, shapes)


def make_batch():
    """Random tokens; one sequence ends in padding, and some tokens have no target."""
    tokens = np.random.default_rng(2).integers(0, V, (B, T + 1))
    real, counted = np.ones((2, B, T), np.float32)
    real[1, 4:] = counted[1, 3:] = counted[2, 0] = 0
    return Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], counted, real)))


def rms(norm, x, epsilon):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * norm.scale


def turned(config, x):
    """Heads `[B, T, N, K]`, each plane a complex number."""
    size = x.shape[-1]
    planes = config.rotary.rope_theta ** (-2 * np.arange(size // 2) / size)
    z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(
        1j * np.arange(x.shape[1])[None, :, None, None] * planes
    )
    return jnp.concatenate([z.real, z.imag], axis=-1)


def plain_block(config, block, hidden, mask, shifts, window):
    """One block's output, and what each site reads."""
    inputs, epsilon = {}, config.rms_norm_eps

    def site(name, x):
        inputs[name], weights = x, getattr(block, name)
        y = x @ weights.kernel + shifts[name]
        return y if weights.bias is None else y + weights.bias

    x = rms(block.input_layernorm, hidden, epsilon)
    query, key, value = (
        site(name, x).reshape(*x.shape[:2], -1, config.head_dim)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    key = jnp.repeat(key, HEADS // GROUPS, axis=2) + shifts["keys"]
    value = jnp.repeat(value, HEADS // GROUPS, axis=2) + shifts["values"]
    if block.q_norm is not None:
        query, key = rms(block.q_norm, query, epsilon), rms(block.k_norm, key, epsilon)
    query, key = turned(config, query), turned(config, key)
    before = np.arange(T)[:, None] - np.arange(T)
    near = (before >= 0) & (before < (window or T))
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / np.sqrt(config.head_dim)
    scores = jnp.where(near & (mask[:, None, None] > 0), scores, -1e30)
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), value)
    hidden = hidden + site("o_proj", mixed.reshape(*x.shape[:2], -1))
    x = rms(block.post_attention_layernorm, hidden, epsilon)
    gate, up = site("gate_proj", x), site("up_proj", x)
    return hidden + site("down_proj", gate / (1 + jnp.exp(-gate)) * up), inputs


def plain_loss(config, params, shifts, batch):
    """Next-token loss, summed over the counted targets, and what each site reads."""
    hidden, captured = params.shell.embed_tokens[batch.input_ids], []
    windows = WINDOWS[config.model_type]
    for block, own, window in zip(params.segments, shifts, windows, strict=True):
        mask = batch.attention_mask
        hidden, inputs = plain_block(config, block, hidden, mask, own, window)
        captured.append(inputs)
    logits = rms(params.shell.norm, hidden, config.rms_norm_eps) @ params.shell.lm_head
    likelihood = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(likelihood, batch.targets[..., None], axis=-1)[..., 0]
    return -(chosen * batch.loss_mask).sum(), captured


class Tokens(NamedTuple):
    """The plain model's numbers of one layer, float64, real tokens only.

    Attributes:
        inputs: of each site, `[N, D_in]`.
        cotangents: of each site's output, `[N, D_out]`, and of the repeated `keys` and `values`
            before they are turned, `[N, H, K]`.
        gradient: of the block's parameters.
    """

    inputs: dict[str, np.ndarray]
    cotangents: dict[str, np.ndarray]
    gradient: Any


def plain_tokens(config, params, batch):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wide = params.replace(segments=tuple(unstack_blocks(params.segments)))
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), wide)
        batch = Batch(*(jnp.asarray(np.asarray(field)) for field in batch))
        widths = {name: (weights.shape[1],) for name, weights in maps(wide.segments[0]).items()}
        widths |= dict.fromkeys(["keys", "values"], (HEADS, config.head_dim))
        zeros = [{n: np.zeros((B, T, *w)) for n, w in widths.items()} for _ in wide.segments]
        grad = jax.jit(
            jax.grad(
                lambda params, shifts: plain_loss(config, params, shifts, batch),
                argnums=(0, 1),
                has_aux=True,
            )
        )
        (gradient, cotangents), captured = jax.tree.map(np.asarray, grad(wide, zeros))
    assert jax.tree.leaves(gradient)[0].dtype == np.float64
    real = np.asarray(batch.attention_mask) > 0
    return [
        Tokens({n: x[real] for n, x in inputs.items()}, {n: g[real] for n, g in own.items()}, block)
        for inputs, own, block in zip(captured, cotangents, gradient.segments, strict=True)
    ][1:-1]


class Case(NamedTuple):
    """A model, its factors by layer and site, and the plain model's tokens by layer."""

    config: Any
    params: Any
    batch: Batch
    factors: dict[int, dict[str, KroneckerFactors]]
    tokens: list[Tokens]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    (config, params), batch = build(MODELS[request.param]), make_batch()
    factors = dict(kronecker_factors(config, params, SPLIT, [batch]))
    return Case(config, params, batch, factors, plain_tokens(config, params, batch))


def mean_gram(rows):
    return rows.T @ rows / len(rows)


def plain_factors(tokens):
    """What `kronecker_factors` yields of one layer, in float64."""

    def of_site(name):
        x, g, dense = tokens.inputs[name], tokens.cotangents[name], getattr(tokens.gradient, name)
        gradient = jax.tree.map(lambda leaf: leaf / len(x), dense)
        return KroneckerFactors(mean_gram(x), x.mean(0), mean_gram(g), gradient)

    return {name: of_site(name) for name in SITES}


def test_factors_and_gradients_of_every_site_are_those_of_the_plain_model(case, assert_close):
    expected = {layer: plain_factors(tokens) for layer, tokens in enumerate(case.tokens)}
    assert set(case.factors) == {0, 1}
    biased = [s for s in SITES if getattr(case.params.segments[0], s).bias is not None]
    assert len(biased) == {"llama": 7, "qwen2": 3, "qwen3": 0}[case.config.model_type]
    assert_close(case.factors, expected, "float32_model")


def test_gradient_factor_of_shared_keys_and_values_is_of_the_sum_over_their_queries(
    case, assert_close
):
    for layer, tokens in enumerate(case.tokens):
        for site, name in (("k_proj", "keys"), ("v_proj", "values")):
            each = tokens.cotangents[name]
            of_groups = each.reshape(len(each), GROUPS, HEADS // GROUPS, -1)
            summed = mean_gram(of_groups.sum(2).reshape(len(each), -1))
            got = case.factors[layer][site].gradient_covariance
            assert_close(got, summed, "float32_model")
            apart = sum(mean_gram(of_groups[:, :, m].reshape(len(each), -1)) for m in range(2))
            assert np.abs(apart - summed).max() > 0.1 * np.abs(summed).max()


def test_moments_of_inputs_alone_are_the_same(case, assert_close):
    swept = dict(sweep_inputs(case.config, case.params, SPLIT, [case.batch]))
    for layer, tokens in enumerate(case.tokens):
        got = {name: tuple(swept[layer][name][:2]) for name in SITES}
        expected = {name: (mean_gram(x), x.mean(0)) for name, x in tokens.inputs.items()}
        assert_close(got, expected, "float32_model")
        assert all(factors.gradient_covariance is None for factors in swept[layer].values())


def hessian(x, g, bias):
    """H written out; entry (i, o) of a matrix is entry `i D_out + o` of its vector."""
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1) if bias else x
    return np.kron(mean_gram(x), mean_gram(g))


def removal_terms(hessian, slope, removals):
    """Both terms of the score of each removal, from its matrix."""
    return ScoreTerms(
        np.array([np.abs(hessian @ delta.reshape(-1)).sum() for delta in removals]),
        np.array([-(slope * delta).sum() for delta in removals]),
    )


def test_scores_of_components_and_channels_are_those_of_the_written_out_hessian(case, assert_close):
    for layer, tokens in enumerate(case.tokens):
        block = get_block(case.params.segments[0], layer + 1)
        layer_maps = maps(block)
        parts = {
            name: jax.tree.map(lambda part: part[0], svd(layer_maps[name].kernel[None]))
            for name in LAYOUT.low_rank
        }
        got = gradot_terms(LAYOUT, layer_maps, parts, case.factors[layer])
        assert got.components.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}
        for name, decomposition in parts.items():
            u, s, v = (np.asarray(part, np.float64) for part in decomposition)
            x, g = tokens.inputs[name], tokens.cotangents[name]
            removals = [-s[k] * np.outer(u[:, k], v[:, k]) for k in range(len(s))]
            expected = removal_terms(hessian(x, g, False), x.T @ g / len(x), removals)
            assert_close(got.components[name], expected, "float32_model")
        total = ScoreTerms(np.zeros(5), np.zeros(5))
        for name in ("gate_proj", "up_proj", "down_proj"):
            x, g, weights = tokens.inputs[name], tokens.cotangents[name], layer_maps[name]
            matrix, bias = np.asarray(weights.kernel, np.float64), False
            if name != "down_proj" and weights.bias is not None:
                matrix, bias = np.concatenate([matrix, np.asarray(weights.bias)[None]]), True
            slope = np.concatenate([x.T @ g, g.sum(0)[None]])[: len(matrix)] / len(x)
            removals = []
            for j in range(5):
                delta = np.zeros_like(matrix)
                channel = (j,) if name == "down_proj" else (slice(None), j)
                delta[channel] = -matrix[channel]
                removals.append(delta)
            terms = removal_terms(hessian(x, g, bias), slope, removals)
            total = jax.tree.map(np.add, total, terms)
        assert_close(got.channels, total, "float32_model")


def without(block, site, channel):
    """A block in which one map has nothing of a channel."""
    weights = getattr(block, site)
    if site == "down_proj":
        cut = Dense(weights.kernel.at[channel].set(0), weights.bias)
    else:
        bias = None if weights.bias is None else weights.bias.at[channel].set(0)
        cut = Dense(weights.kernel.at[:, channel].set(0), bias)
    return block.replace(**{site: cut})


def chosen(block, channels):
    """A block with some channels alone, in the order given."""
    return block.replace(**prune_channels(LAYOUT.channels, maps(block), np.array(channels)))


def test_a_channel_is_gone_when_any_of_its_maps_is_zero_and_their_order_is_nothing(
    case, assert_close
):
    block = get_block(case.params.segments[0], 1)
    hidden = jnp.asarray(np.random.default_rng(3).normal(size=(B, T, 6)), jnp.float32)
    run = jax.jit(lambda block: apply_layer(case.config, block, hidden))
    whole, pruned = run(block), run(chosen(block, [0, 1, 3, 4]))
    assert np.abs(whole - pruned).max() > 1e-3
    for site in ("gate_proj", "up_proj", "down_proj"):
        assert_close(run(without(block, site, 2)), pruned, "float32")
    assert_close(run(chosen(block, [3, 0, 4, 2, 1])), whole, "float32")


def test_removing_channels_one_after_another_is_removing_them_at_once(case, assert_close):
    block = get_block(case.params.segments[0], 2)
    one_by_one = chosen(chosen(block, [0, 1, 3, 4]), [0, 2, 3])
    jax.tree.map(np.testing.assert_array_equal, one_by_one, chosen(block, [0, 3, 4]))
    run = jax.jit(lambda block: apply_layer(case.config, block, jnp.ones((1, 3, 6))))
    out = block.down_proj
    bare = run(block.replace(down_proj=Dense(jnp.zeros_like(out.kernel), out.bias)))
    adds = [run(chosen(block, [j])) - bare for j in range(5)]
    assert_close(bare + sum(adds), run(block), "float32_model")
