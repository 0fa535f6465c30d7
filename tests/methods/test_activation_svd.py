import numpy as np
import pytest

from gradot_jax.compression.rank import factorise, keep_order
from gradot_jax.methods.activation_svd import ACTIVATION_SVD, compress
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.problem import Problem
from gradot_jax.methods.scored import WHITENING_DAMPING, propose
from gradot_jax.models.params import layers_at
from gradot_jax.models.split import AdapterSpec

SPLIT = AdapterSpec(1, 1)


@pytest.fixture(scope="module")
def outcome(toy_model, toy_batch):
    config, params = toy_model()
    options = CompressionOptions(method="activation-svd", budget=0.5)
    return compress(
        Problem(config=config, params=params, split=SPLIT, batches=[toy_batch()], options=options)
    )


def test_kept_are_the_first_components_and_the_channels_of_most_energy(outcome):
    for layer, plan in enumerate(outcome.layers):
        assert [kept for _, kept in plan.components] == [(0, 1)] * 4
        energy = outcome.scores["channels_hessian"][layer]
        assert set(plan.channels) == set(np.argsort(-energy)[: len(plan.channels)])
    assert not outcome.scores["components_gradient"].any()


def test_maps_are_low_rank_and_biases_untouched(outcome, toy_model):
    _, params = toy_model()
    middle = layers_at(params.segments, SPLIT.middle_layers(params.num_layers))
    for block, original in zip(outcome.blocks, middle, strict=True):
        assert block.q_proj.rank == 2
        np.testing.assert_array_equal(block.q_proj.bias, original.q_proj.bias)
        np.testing.assert_array_equal(block.fc2.bias, original.fc2.bias)


def test_kept_components_are_those_that_move_the_outputs_least(random_layer, assert_close):
    block, factors = random_layer()
    candidate = propose(block, factors, ACTIVATION_SVD)
    for site in block.layout.low_rank:
        kernel = np.asarray(getattr(block, site).kernel, np.float64)
        a = np.asarray(factors[site].input_covariance, np.float64)
        a = a + WHITENING_DAMPING * np.trace(a) / len(a) * np.eye(len(a))
        scores = candidate.terms.components[site].hessian
        kept = np.sort(keep_order(scores, 0)[:3])
        np.testing.assert_array_equal(kept, np.arange(3))
        left, right = factorise(candidate.parts[site], kept)
        lost = kernel - np.asarray(left, np.float64) @ np.asarray(right, np.float64)
        removed = np.asarray(scores, np.float64)[3:]
        assert_close(np.trace(lost.T @ a @ lost), np.square(removed).sum(), "float32_model")


def test_a_whole_decomposition_is_the_kernel(random_layer, assert_close):
    block, factors = random_layer()
    for site, parts in propose(block, factors, ACTIVATION_SVD).parts.items():
        left, right = factorise(parts, np.arange(parts.values.size))
        assert_close(left @ right, getattr(block, site).kernel, "float32_model")


def test_energy_of_a_channel_is_that_of_what_it_adds(random_layer, assert_close):
    block, factors = random_layer()
    energy = np.diag(np.asarray(factors["down"].input_covariance, np.float64))
    rows = zip(energy, np.asarray(block.down.kernel, np.float64), strict=True)
    # E || a_j w_j ||^2, with the expectation taken first.
    expected = np.sqrt([np.trace(e * np.outer(row, row)) for e, row in rows])
    terms = propose(block, factors, ACTIVATION_SVD).terms
    assert_close(terms.channels.hessian, expected, "float32")
    assert not any(np.any(t.gradient) for t in (terms.channels, *terms.components.values()))


def test_it_is_not_scored_without_factors(random_layer):
    with pytest.raises(ValueError, match="needs Kronecker factors"):
        propose(random_layer()[0], None, ACTIVATION_SVD)
