import dataclasses
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.methods.options import CompressionOptions, ScaleOTOptions
from gradot_jax.methods.problem import Problem
from gradot_jax.methods.scaleot.layer_replace import (
    init_harmonizers,
    mean_network_loss,
    replace_step,
    summed_network_loss,
    train_harmonizers,
)
from gradot_jax.models.params import Params, slice_blocks
from gradot_jax.models.partition import place
from gradot_jax.models.run import summed_loss
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.harmonizer import harmonize
from gradot_jax.parallel import make_mesh
from gradot_jax.training.loop import DivergenceError

LAYERS, RANK = 6, 2
SCALEOT = ScaleOTOptions(steps=4, learning_rate=1e-2, harmonizer_rank=RANK, group_size=3)
LOSS = jax.jit(summed_network_loss, static_argnames=("config",))


@pytest.fixture(scope="module")
def problem(toy_model, toy_batch):
    config, params = toy_model(num_hidden_layers=LAYERS)
    batches = [toy_batch(seed, size=4) for seed in range(5)]
    options = CompressionOptions(method="scaleot", scaleot=SCALEOT)
    split = AdapterSpec(1, 1)
    return Problem(config=config, params=params, split=split, batches=batches, options=options)


@pytest.fixture(scope="module")
def harmonizers(problem):
    """Harmonizers that are not the identity."""
    fresh = init_harmonizers(problem.config, RANK, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), fresh)


def with_options(problem, **changes):
    scaleot = dataclasses.replace(problem.options.scaleot, **changes)
    options = dataclasses.replace(problem.options, scaleot=scaleot)
    return dataclasses.replace(problem, options=options)


def train(problem):
    model = place(problem.params, problem.mesh)
    return train_harmonizers(problem, model, problem.batches[:4], problem.batches[4:])


@pytest.fixture(scope="module")
def trained(problem):
    return train(problem)


def test_fresh_harmonizers_are_the_identity(problem):
    fresh = init_harmonizers(problem.config, RANK, jax.random.key(0))
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    for layer in range(LAYERS):
        single = jax.tree.map(lambda leaf, i=layer: leaf[i], fresh)
        np.testing.assert_array_equal(harmonize(single, hidden), hidden)
    assert np.std(fresh.down.kernel, axis=(1, 2)).min() > 0


def test_network_equals_its_layers_run_one_after_another(problem, harmonizers, assert_close):
    blocks = problem.params.segments[0]
    for pattern in ("111111", "000000", "100101"):
        raw = np.array([c == "1" for c in pattern])
        segments = tuple(
            slice_blocks(blocks if runs_raw else harmonizers, i, i + 1)
            for i, runs_raw in enumerate(raw)
        )
        batch = problem.batches[0]
        expected = summed_loss(problem.config, Params(problem.params.shell, segments), batch)
        got = LOSS(problem.config, problem.params, harmonizers, raw, batch)
        assert_close(got, expected, "float32_model")


def test_arithmetic_is_float32_whatever_the_weights(problem, harmonizers):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), problem.params)
    raw = np.arange(LAYERS) % 2 == 0
    jaxpr = jax.make_jaxpr(partial(summed_network_loss, problem.config))(
        half, harmonizers, raw, problem.batches[0]
    )
    products = [line for line in str(jaxpr).splitlines() if "dot_general" in line]
    assert products and all(":f32" in line for line in products)


def test_gradient_reaches_only_harmonizers_that_run(problem, harmonizers):
    raw = np.array([True, False, False, True, True, False])
    batch = problem.batches[0]
    gradient = jax.jit(
        jax.grad(
            lambda h: summed_network_loss(problem.config, problem.params, h, raw, batch)[0],
        )
    )(harmonizers)
    moved = [
        [bool(np.asarray(leaf[i]).any()) for leaf in jax.tree.leaves(gradient)]
        for i in range(LAYERS)
    ]
    assert not np.any(np.array(moved)[raw])
    assert np.all(np.array(moved)[~raw])


def test_a_layer_is_a_conditional_forward_and_backward(problem, harmonizers):
    raw = np.arange(LAYERS) % 2 == 0

    def loss(h):
        return summed_network_loss(problem.config, problem.params, h, raw, problem.batches[0])[0]

    compiled = jax.jit(jax.grad(loss)).lower(harmonizers).as_text()
    assert compiled.count("stablehlo.case") + compiled.count("stablehlo.if") >= 2


def test_training_moves_harmonizers_and_importance(problem, trained):
    harmonizers, importance = trained
    key = jax.random.split(jax.random.key(0))[1]
    fresh = init_harmonizers(problem.config, RANK, key)
    # Six layers in four networks: each has been replaced at least once.
    assert np.abs(harmonizers.up.kernel).max(axis=(1, 2)).min() > 0
    assert not np.array_equal(harmonizers.down.kernel, fresh.down.kernel)
    assert importance.shape == (LAYERS,) and importance.any()


def test_training_lowers_the_loss_of_the_network_of_harmonizers(problem):
    tokens = np.add.outer(np.arange(8), np.arange(7)) % 13
    ones = np.ones((8, 6), np.float32)
    batch = Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], ones, ones)))
    longer = dataclasses.replace(with_options(problem, steps=60), batches=[batch] * 5)
    harmonizers, _ = train(longer)
    fresh = init_harmonizers(problem.config, RANK, jax.random.key(0))
    before, after = (
        mean_network_loss(problem.config, problem.params, h, np.zeros(LAYERS, bool), [batch])
        for h in (fresh, harmonizers)
    )
    assert after < 0.9 * before


def test_equal_runs_share_one_compiled_step_and_one_result(problem, trained):
    for a, b in zip(*map(jax.tree.leaves, (trained, train(problem))), strict=True):
        np.testing.assert_array_equal(a, b)
    compiled = replace_step._cache_size()
    train(problem)
    assert replace_step._cache_size() == compiled
    train(with_options(problem, importance_rate=0.5))
    assert replace_step._cache_size() == compiled + 1


def test_resumed_training_equals_uninterrupted(problem, trained, tmp_path):
    folder = tmp_path / "run"
    problem = dataclasses.replace(problem, checkpoints=folder)
    train(problem)
    shutil.rmtree(folder / "4")
    for a, b in zip(*map(jax.tree.leaves, (train(problem), trained)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="belongs to another run"):
        train(with_options(problem, learning_rate=3e-2))


def test_runs_that_differ_in_rank_alone_share_their_training(problem, tmp_path):
    problem = dataclasses.replace(problem, checkpoints=tmp_path / "run")
    harmonizers, importance = train(problem)
    again = train(with_options(problem, rank_removed=0.5))
    np.testing.assert_array_equal(again[0].up.kernel, harmonizers.up.kernel)
    np.testing.assert_array_equal(again[1], importance)


def test_sharded_training_equals_single(problem, trained, assert_close):
    sharded = train(dataclasses.replace(problem, mesh=make_mesh(data=2, model=2)))
    assert_close(sharded, trained, "float32_model")


def test_a_loss_that_is_not_finite_is_refused(problem):
    shell = problem.params.shell
    broken = shell.replace(embed_tokens=shell.embed_tokens.at[0].set(jnp.nan))
    problem = dataclasses.replace(problem, params=problem.params.replace(shell=broken))
    with pytest.raises(DivergenceError, match="finite"):
        train(problem)


def test_batches_of_unequal_shapes_are_refused(problem, toy_batch):
    with pytest.raises(InputError, match="one shape"):
        train_harmonizers(
            problem, problem.params, problem.batches, [toy_batch(0, size=2), toy_batch(1, size=3)]
        )
