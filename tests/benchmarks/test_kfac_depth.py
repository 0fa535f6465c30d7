import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kfac_depth
from benchmarks.kfac_depth import compare, draw, fisher_norms, removals, study
from gradot_jax.calibration.sweep import kronecker_factors
from gradot_jax.compression.score import channel_terms, component_terms
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.errors import InputError
from gradot_jax.linalg.svd import svd
from gradot_jax.methods.compress import compress
from gradot_jax.models.params import get_block
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.layout import maps
from gradot_jax.nn.linear import dense_kernel

RNG = np.random.default_rng(0)
N, D_IN, D_OUT = 12, 5, 3


def factors_of(x, g):
    return KroneckerFactors(x.T @ x / len(x), x.mean(0), g.T @ g / len(g), None)


def test_factors_are_the_hessian_of_least_squares_with_white_residuals(assert_close):
    x, weights = (jnp.asarray(RNG.normal(size=s), "float32") for s in ((N, D_IN), (D_IN, D_OUT)))
    residuals = np.linalg.qr(RNG.normal(size=(N, D_OUT)))[0] * np.sqrt(N)
    targets = x @ weights - residuals.astype(np.float32)

    def loss(weights):
        return jnp.square(x @ weights - targets).sum() / 2 / N

    g = x @ weights - targets
    deltas = jnp.asarray(RNG.normal(size=(4, D_IN, D_OUT)), "float32")
    exact = [jax.jvp(jax.grad(loss), (weights,), (delta,))[1] for delta in deltas]
    kfac, _ = fisher_norms(factors_of(x, g), x, g, deltas)
    assert_close(kfac, jnp.stack([jnp.abs(h).sum() for h in exact]), "float32_model")


def test_of_one_token_the_factors_are_the_fisher(assert_close):
    x, g = (jnp.asarray(RNG.normal(size=(1, d)), "float32") for d in (D_IN, D_OUT))
    deltas = jnp.asarray(RNG.normal(size=(4, D_IN, D_OUT)), "float32")
    assert_close(*fisher_norms(factors_of(x, g), x, g, deltas), "float32_model")


def test_the_fisher_is_the_sum_of_outer_products_of_tokens(assert_close):
    x, g, delta = (RNG.normal(size=s) for s in ((N, D_IN), (N, D_OUT), (D_IN, D_OUT)))
    slopes = np.einsum("ni,no->nio", x, g).reshape(N, -1)
    expected = np.abs(slopes.T @ slopes @ delta.reshape(-1) / N).sum()
    x, g, delta = (jnp.asarray(a, "float32") for a in (x, g, delta))
    assert_close(fisher_norms(factors_of(x, g), x, g, delta[None])[1][0], expected, "float32_model")


@pytest.fixture
def layer(toy_model, toy_batch):
    config, params = toy_model(enable_bias=False)
    factors = dict(kronecker_factors(config, params, AdapterSpec(), [toy_batch()]))[0]
    return config, params, get_block(params.segments[0], 2), factors


def test_all_candidates_together_are_the_terms_of_the_score(layer, assert_close):
    config, _, block, factors = layer
    own = maps(block)

    def norms(site, count):
        deltas = removals(config, block, factors, count)[site][:-1]
        x, g = jnp.zeros((1, deltas.shape[1])), jnp.zeros((1, deltas.shape[2]))
        return np.asarray(fisher_norms(factors[site], x, g, deltas)[0])

    for site in block.layout.low_rank:
        parts = jax.tree.map(lambda leaf: leaf[0], svd(own[site].kernel[None]))
        terms = component_terms(parts, factors[site]).hessian
        assert_close(norms(site, len(terms)), np.sort(terms)[::-1], "float32_model")
    terms = channel_terms(block.layout.channels, own, factors).hessian
    assert_close(norms("fc1", 12) + norms("fc2", 12), np.sort(terms)[::-1], "float32_model")
    np.testing.assert_array_equal(norms("fc2", 3), norms("fc2", 12)[[2, 6, 10]])


def test_the_whole_is_what_the_method_removes(layer, toy_batch, assert_close):
    config, params, block, factors = layer
    plan, emulator = compress(config, params, AdapterSpec(), [toy_batch()], budget=0.6)
    (cut,) = emulator.middle
    deltas = removals(config, block, factors, 2)
    for site in block.layout.low_rank:
        left = getattr(block, site).kernel + deltas[site][-1]
        assert_close(left, dense_kernel(getattr(cut, site))[0], "float32_model")
    kept = np.isin(np.arange(12), plan.layers[0].channels)
    np.testing.assert_array_equal((deltas["fc1"][-1] == 0).all(0), kept)
    np.testing.assert_array_equal((deltas["fc2"][-1] == 0).all(1), kept)


def test_candidates_that_move_nothing_have_no_ratio():
    exact, own = np.array([4.0, 2.0, 0.0, 8.0]), np.array([2.0, 3.0, 0.0, 4.0])
    found = compare({"hessian": exact, "kfac": own})["kfac"]
    assert found["ratio"] == 1.0 and found["whole_ratio"] == 0.5
    assert found["rank_correlation"] == pytest.approx(0.5)
    dead = compare({"hessian": np.zeros(3), "kfac": np.zeros(3)})["kfac"]
    assert {dead["ratio"], dead["whole_ratio"], dead["rank_correlation"]} == {None}


def test_a_study_is_gone_on_with_and_drawn(toy_model, toy_batch, tmp_path, monkeypatch):
    model, path = toy_model(num_hidden_layers=6), tmp_path / "toy.json"
    study(*model, toy_batch(), [3], 3, path, model="toy")
    first = json.loads(path.read_text())["layers"]["3"]
    assert first.keys() == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert all(len(site["hessian"]["candidates"]) == 3 for site in first.values())
    study(*model, toy_batch(), [2, 3], 3, path, model="toy")
    record = json.loads(path.read_text())
    assert record["layers"].keys() == {"2", "3"} and record["layers"]["3"] == first
    for batch, count in ((toy_batch(), 4), (toy_batch(seed=1), 3)):
        with pytest.raises(InputError, match="another measurement"):
            study(*model, batch, [2], count, path, model="toy")
    with pytest.raises(InputError, match=r"must lie in \[2, 3\]"):
        study(*model, toy_batch(), [4], 3, path, model="toy")
    figure = tmp_path / "depth.png"
    argv = ["kfac_depth", "--draw", str(path), str(path), "--out", str(figure)]
    monkeypatch.setattr(sys, "argv", argv)
    kfac_depth.main()
    assert figure.stat().st_size > 10_000
    draw(figure, [record])
