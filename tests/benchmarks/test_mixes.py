import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.mixes import (
    MIXES,
    attention_groups,
    feature_scores,
    fewer_features,
    mixed_block,
    without,
)
from gradot_jax.calibration.sweep import kronecker_factors
from gradot_jax.errors import InputError
from gradot_jax.methods.compress import compress
from gradot_jax.models.families import read_config
from gradot_jax.models.params import get_block, init_params
from gradot_jax.models.run import apply_layer
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.layout import maps
from gradot_jax.nn.linear import LowRank, dense_kernel

LLAMA = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}
SPLIT, LAYER = AdapterSpec(1, 1), 1


@pytest.fixture(params=["opt", "llama"])
def swept(request, toy_model, toy_batch):
    """Model, its only middle block, and that block's factors."""
    if request.param == "opt":
        config, params = toy_model(num_hidden_layers=3)
    else:
        config = read_config(LLAMA, "test")
        params = jax.tree.map(lambda w: w * 8, init_params(config, jax.random.key(0)))
    batch = toy_batch()
    factors = dict(kronecker_factors(config, params, SPLIT, [batch]))[0]
    return config, params, batch, get_block(params.segments[0], LAYER), factors


def test_the_papers_mix_is_gradot(swept, assert_close):
    config, params, batch, block, factors = swept
    _, emulator = compress(config, params, SPLIT, [batch], method="gradot", budget=0.6)
    expected = get_block(emulator.middle[0], 0)
    got = mixed_block(config, block, factors, "paper", 0.6)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
    kernels = [{s: dense_kernel(w) for s, w in maps(b).items()} for b in (got, expected)]
    assert_close(*kernels, "float32_model")


def test_groups_of_attention_hold_every_feature_once(swept):
    config, _, _, block, _ = swept
    q, k, v, out = block.layout.low_rank
    groups = attention_groups(config, block)
    for kind, site, size in (
        ("queries", q, maps(block)[q].shape[1]),
        ("queries", k, maps(block)[k].shape[1]),
        ("values", v, maps(block)[v].shape[1]),
        ("values", out, maps(block)[out].shape[0]),
    ):
        assert sorted(j for group in groups[kind] for j in group[site]) == list(range(size))


def test_features_of_a_group_meet_only_each_other(swept, assert_close):
    config, _, _, block, _ = swept
    q, *_, out = block.layout.low_rank
    hidden = jax.random.normal(jax.random.key(1), (1, 5, config.hidden_size))
    for kind, alone in (("queries", q), ("values", out)):
        group = attention_groups(config, block)[kind][1]
        cut = {s: without(maps(block)[s], where, rows=s == out) for s, where in group.items()}
        whole = apply_layer(config, block.replace(**cut), hidden)
        # So it is enough to remove those of one side.
        half = apply_layer(config, block.replace(**{alone: cut[alone]}), hidden)
        assert_close(half, whole, "float32_model")
        assert float(jnp.abs(whole - apply_layer(config, block, hidden)).max()) > 1e-3


def test_scores_of_features_are_norms_of_what_moves(swept, assert_close):
    _, _, _, block, factors = swept
    *_, out = block.layout.low_rank
    layer = {site: maps(block)[site] for site in block.layout.low_rank}
    for site, scores in feature_scores(layer, factors, out).items():
        kernel, bias = layer[site].kernel, layer[site].bias
        whole = np.asarray(kernel, np.float64)
        a, g = (np.asarray(m, np.float64) for m in (factors[site][0], factors[site][2]))
        if bias is not None and site != out:
            # A bias is the weight of an input that is always one.
            whole = np.concatenate([whole, np.asarray(bias, np.float64)[None]])
            mean = np.asarray(factors[site].input_mean, np.float64)[:, None]
            a = np.block([[a, mean], [mean.T, np.ones((1, 1))]])
        for j in (0, len(scores) - 1):
            delta = np.zeros_like(whole)
            where = (j, slice(None)) if site == out else (slice(None), j)
            delta[where] = whole[where]
            assert_close(scores[j], np.abs(a @ delta @ g).sum(), "float32_model")


@pytest.mark.parametrize("mix", MIXES)
def test_no_mix_keeps_more_than_its_budget(mix, swept):
    config, _, _, block, factors = swept
    done = maps(mixed_block(config, block, factors, mix, 0.6))
    kept = whole = 0
    for site, weights in maps(block).items():
        whole += weights.kernel.size
        if isinstance(done[site], LowRank):
            kept += sum(leaf.size for leaf in (done[site].left, done[site].right))
        else:
            kept += int((np.asarray(done[site].kernel) != 0).sum())
    assert 0.3 < kept / whole <= 0.6


def test_least_groups_go(swept):
    config, _, _, block, factors = swept
    q, k, _, out = block.layout.low_rank
    done = fewer_features(config, block, factors, 0.5)
    scores = feature_scores({s: maps(block)[s] for s in block.layout.low_rank}, factors, out)
    groups = attention_groups(config, block)["queries"]
    own = np.array([scores[q][g[q]].sum() + scores[k][g[k]].sum() for g in groups])
    gone = np.array([not np.asarray(done[k].kernel)[:, g[k]].any() for g in groups])
    assert gone.sum() == len(groups) - len(groups) // 2
    assert own[gone].max() <= own[~gone].min()


def test_normed_queries_are_refused():
    config = read_config(LLAMA, "test")
    block = get_block(init_params(config, jax.random.key(0)).segments[0], LAYER)
    with pytest.raises(InputError, match="normed"):
        attention_groups(config, block.replace(q_norm=block.input_layernorm))
