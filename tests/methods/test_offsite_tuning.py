import dataclasses
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradot_jax.errors import InputError
from gradot_jax.methods import layer_drop
from gradot_jax.methods.offsite_tuning import compress, distillation_sums
from gradot_jax.methods.options import CompressionOptions, DistillationOptions
from gradot_jax.methods.problem import Problem
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import init_params, take_blocks
from gradot_jax.models.run import embed, run_blocks, summed_loss
from gradot_jax.models.split import AdapterSpec, split_model
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import make_mesh

CONFIG = OPTConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=6,
    ffn_dim=32,
    num_attention_heads=2,
    max_position_embeddings=8,
    word_embed_proj_dim=16,
)
SPLIT = AdapterSpec(1, 1)
SHORT = DistillationOptions(steps=40, warmup_steps=2, learning_rate=5e-3)


def text(count, seed):
    """Batches of sequences that count up in steps of 1 or 2, as told by their first two tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        first, stride = rng.integers(0, 32, (8, 1)), rng.integers(1, 3, (8, 1))
        ids = ((first + stride * np.arange(9)) % 32).astype(np.int32)
        ones = np.ones((8, 8), np.int32)
        made.append(Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones))
    return made


BATCHES = text(16, seed=1)
SUMS = jax.jit(distillation_sums, static_argnames=("config",))


@pytest.fixture(scope="module")
def params():
    """A model that has learnt the text, so that what its layers do matters."""
    optimizer = optax.adam(5e-3)

    @jax.jit
    def train(params, state, batch):
        def loss_of(params):
            total, count = summed_loss(CONFIG, params, batch)
            return total / count

        updates, state = optimizer.update(jax.grad(loss_of)(params), state)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)

    def fill(path, leaf):
        gain = path[-1].name == "scale"
        return jnp.asarray(gain + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    params = jax.tree.map_with_path(fill, shapes)
    state = optimizer.init(params)
    for batch in text(150, seed=0):
        params, state = train(params, state, batch)
    return params


def problem_of(params, batches=BATCHES, split=SPLIT, budget=0.5, mesh=None, folder=None, **changes):
    options = {"method": "offsite-tuning", "budget": budget, "distillation": SHORT} | changes
    return Problem(
        config=CONFIG,
        params=params,
        split=split,
        batches=batches,
        options=CompressionOptions(**options),
        mesh=mesh,
        checkpoints=folder,
    )


def distillation(**changes):
    return {"distillation": dataclasses.replace(SHORT, **changes)}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def distilled(params):
    return compress(problem_of(params))


def norm_of_difference(a, b):
    return float(optax.tree.norm(jax.tree.map(lambda x, y: np.asarray(x - y), a, b)))


def test_distillation_lowers_the_error_and_the_loss_of_the_emulator(distilled):
    record = distilled.calibration
    assert (record["training_batches"], record["held_out_batches"]) == (14, 2)
    assert record["final"]["normalised_error"] < 0.5 * record["initial"]["normalised_error"]
    assert record["final"]["lm_loss"] < 0.6 * record["initial"]["lm_loss"]


def test_error_alone_lowers_the_loss_of_the_emulator_too(params):
    record = compress(problem_of(params, **distillation(lm_weight=0.0))).calibration
    assert record["final"]["normalised_error"] < 0.5 * record["initial"]["normalised_error"]
    assert record["final"]["lm_loss"] < 0.6 * record["initial"]["lm_loss"]


def test_kept_layers_are_those_of_layer_drop_and_only_they_change(params, distilled):
    before = jax.tree.map(np.array, params)
    compress(problem_of(params))
    assert_equal(params, before)
    dropped = layer_drop.compress(problem_of(params))
    assert distilled.layers == dropped.layers
    assert (distilled.layer_map, distilled.split) == (None, None)
    for new, old in zip(distilled.blocks, dropped.blocks, strict=True):
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new, old)
        assert min(jax.tree.leaves(moved)) > 0
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, old)


def test_whole_middle_as_its_own_student_has_no_error_at_all(params):
    original = split_model(params, SPLIT)
    losses = SUMS(CONFIG, original.middle[0], original, BATCHES[0])
    assert float(losses.normalised_error) == 0.0
    total, count = summed_loss(CONFIG, params, BATCHES[0])
    assert float(losses.lm_loss) == pytest.approx(float(total / count), rel=1e-5)


def padded(batch):
    """The batch with sequences of all lengths, and tokens at padding that should not matter."""
    real = np.arange(8)[None] < np.arange(1, 9)[:, None]
    garbage = np.random.default_rng(0).integers(0, 32, real.shape)
    return Batch(
        np.where(real, batch.input_ids, garbage).astype(np.int32),
        batch.targets,
        real.astype(np.float32),
        real.astype(np.int32),
    )


def test_losses_equal_numpy_float64_with_padding_left_out(params):
    batch = padded(BATCHES[0])
    original = split_model(params, SPLIT)
    student = take_blocks(original.middle[0], (0, 3))
    sums = SUMS(CONFIG, student, original, batch)

    mask = batch.attention_mask
    inputs = run_blocks(
        CONFIG, (original.adapter.bottom,), embed(CONFIG, params.shell, batch.input_ids, mask), mask
    )
    t, s = (
        np.asarray(run_blocks(CONFIG, segments, inputs, mask), np.float64)[mask.astype(bool)]
        for segments in (original.middle, (student,))
    )
    assert float(sums.normalised_error) == pytest.approx(
        np.mean((t - s) ** 2) / np.mean(t**2), rel=1e-5
    )
    emulator = original.replace(middle=(student,)).assemble()
    total, count = summed_loss(CONFIG, emulator, batch)
    assert float(sums.lm_loss) == pytest.approx(float(total / count), rel=1e-5)


def test_run_goes_on_from_its_checkpoint_and_ends_the_same(params, distilled, tmp_path, caplog):
    compress(problem_of(params, folder=tmp_path))
    shutil.rmtree(tmp_path / "40")
    caplog.set_level(logging.INFO, logger="gradot_jax")
    caplog.clear()
    resumed = compress(problem_of(params, folder=tmp_path))
    validated = [record.message for record in caplog.records if "validation" in record.message]
    assert [message.partition(":")[0] for message in validated] == ["step 40"]
    assert_equal(resumed.blocks, distilled.blocks)
    assert resumed.calibration == distilled.calibration
    with pytest.raises(InputError, match=r"identity\.seed was 0, now 1"):
        compress(problem_of(params, folder=tmp_path, seed=1))
    with pytest.raises(InputError, match=r"identity\.text was"):
        compress(problem_of(params, BATCHES[:-1], folder=tmp_path))


def test_training_that_only_does_harm_gives_back_the_dropped_layers(params):
    copying = [batch._replace(targets=batch.input_ids) for batch in BATCHES[14:]]
    problem = problem_of(params, BATCHES[:14] + copying)
    outcome = compress(problem)
    assert outcome.calibration["best_step"] == 0
    assert outcome.calibration["final"] == outcome.calibration["initial"]
    assert_equal(outcome.blocks, layer_drop.compress(problem).blocks)


def test_two_batches_are_trained_on_and_none_is_held_out(params):
    record = compress(problem_of(params, BATCHES[:2])).calibration
    assert (record["training_batches"], record["held_out_batches"]) == (2, 0)
    assert record["best_step"] == record["steps"]
    assert record["final"]["lm_loss"] < record["initial"]["lm_loss"]


def test_without_weight_on_its_error_the_original_middle_does_not_run(params):
    middle = params.segments[0].fc2.bias
    # Layers 1 and 4 are kept; what is not a number in layer 2 would reach every weight.
    broken = jax.tree.map(
        lambda leaf: leaf.at[2].set(jnp.nan) if leaf is middle else leaf, params.segments[0]
    )
    broken = params.replace(segments=(broken,))
    options = distillation(steps=3, kd_weight=0.0)
    outcome = compress(problem_of(broken, **options))
    assert outcome.calibration["final"]["lm_loss"] < outcome.calibration["initial"]["lm_loss"]
    assert_equal(outcome.blocks, compress(problem_of(params, **options)).blocks)


def test_blocks_come_back_in_the_dtype_of_the_original(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    outcome = compress(problem_of(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(outcome.blocks)} == {jnp.dtype("bfloat16")}
    # The arithmetic is that of float32: only the result is rounded.
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    exact = compress(problem_of(whole)).blocks
    change = norm_of_difference(exact, layer_drop.compress(problem_of(whole)).blocks)
    assert norm_of_difference(outcome.blocks, exact) < 0.05 * change


def test_sharded_equals_single_device(params, distilled):
    sharded = compress(problem_of(params, mesh=make_mesh(4, 2)))
    kernel = sharded.blocks[0].fc1.kernel
    assert kernel.addressable_shards[0].data.shape == (16 // 4, 32 // 2)
    change = norm_of_difference(distilled.blocks, layer_drop.compress(problem_of(params)).blocks)
    # Adam divides a gradient by its size and makes noise of one that is nearly zero, such as that
    # of the bias of k: the sum over all weights tells what the largest difference would not.
    blocks = jax.device_get(sharded.blocks)
    assert norm_of_difference(blocks, jax.device_get(distilled.blocks)) < 0.05 * change
    assert sharded.calibration["final"] == pytest.approx(distilled.calibration["final"], rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "at least one batch"),
        ({"batches": [b._replace(loss_mask=0 * b.loss_mask) for b in BATCHES]}, "no target"),
        ({"split": AdapterSpec(1, 1, (3,))}, "offsite-tuning needs one middle"),
        (distillation(steps=2), "warmup_steps = 2 and num_steps = 2"),
    ],
)
def test_problems_that_cannot_be_trained_on_are_refused(params, changes, message):
    with pytest.raises(InputError, match=message):
        compress(problem_of(params, **changes))
