import jax
import numpy as np
import pytest

from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.problem import Problem
from gradot_jax.methods.random import compress, random_rule
from gradot_jax.methods.scored import propose
from gradot_jax.models.split import AdapterSpec


@pytest.fixture(scope="module")
def layers(toy_model):
    config, params = toy_model()

    def run(seed):
        options = CompressionOptions(method="random", budget=0.5, seed=seed)
        split = AdapterSpec(1, 1)
        problem = Problem(config=config, params=params, split=split, batches=[], options=options)
        return compress(problem).layers

    return run


def test_choice_follows_the_seed_and_differs_between_layers(layers):
    first = layers(0)
    assert layers(0) == first
    assert len({plan.channels for plan in (*first, *layers(1))}) == 6


def test_floor_of_ranks_is_kept(layers):
    for plan in layers(0):
        assert all(0 in kept and len(kept) == 2 for _, kept in plan.components)


def test_scores_follow_seed_and_layer(random_layer):
    block, _ = random_layer()

    def scores(*draw):
        terms = propose(block, None, random_rule(*draw)).terms
        return {"channels": terms.channels.hessian} | {
            site: own.hessian for site, own in terms.components.items()
        }

    first = scores(0, 1)
    jax.tree.map(np.testing.assert_array_equal, first, scores(0, 1))
    sizes = {"channels": 8, "query": 6, "key": 4, "out": 6}
    assert {name: score.shape for name, score in first.items()} == {
        name: (size,) for name, size in sizes.items()
    }
    assert not np.array_equal(first["query"], first["out"])
    for other in (scores(1, 1), scores(0, 2)):
        assert not any(np.array_equal(first[name], other[name]) for name in sizes)


def test_no_score_has_a_gradient(random_layer):
    terms = propose(random_layer()[0], None, random_rule(0, 1)).terms
    assert not any(np.any(t.gradient) for t in (terms.channels, *terms.components.values()))
