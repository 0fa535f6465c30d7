import dataclasses
import json
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradot_jax.data.examples import epoch_batches
from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import get_block, init_params, slice_blocks
from gradot_jax.models.partition import place_batch
from gradot_jax.models.run import summed_loss
from gradot_jax.models.split import Adapter, AdapterSpec, split_model
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.parallel import make_mesh
from gradot_jax.training import adapter as training
from gradot_jax.training.adapter import evaluation_step, finetune_adapter, init_training, train_step
from gradot_jax.training.loop import DivergenceError
from gradot_jax.training.optimizer import make_optimizer
from gradot_jax.training.stop import Interrupted

CONFIG = OPTConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=4,
    ffn_dim=32,
    num_attention_heads=2,
    max_position_embeddings=8,
    word_embed_proj_dim=16,
    init_std=0.1,
)
OPTIMIZER = make_optimizer(learning_rate=1e-2, num_steps=100)
# Its first update is the gradient, and it has a state.
PLAIN = optax.sgd(1.0, momentum=0.5)
# Good for four updates, too large for two, and then not finite.
WILD = optax.sgd(lambda count: jnp.select([count < 4, count < 6], [0.5, 30.0], jnp.inf))
FLOAT32_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def make_model(num_layers):
    """Random weights, made by numpy because that compiles nothing."""
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, num_hidden_layers=num_layers)

    def fill(path, leaf):
        scale = jax.tree_util.keystr(path).endswith("scale")
        return rng.normal(scale, 0.1, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def compress(middle):
    """A middle of two shapes: one block with low-rank attention, one also with a pruned MLP."""

    def low_rank(site):
        u, s, v = np.linalg.svd(site.kernel, full_matrices=False)
        return LowRank(u[:, :5] * s[:5], v[:5], site.bias)

    first, second = get_block(middle, 0), get_block(middle, 1)
    first = first.replace(q_proj=low_rank(first.q_proj), out_proj=low_rank(first.out_proj))
    second = second.replace(
        v_proj=low_rank(second.v_proj),
        fc1=Dense(second.fc1.kernel[:, :12], second.fc1.bias[:12]),
        fc2=Dense(second.fc2.kernel[:12], second.fc2.bias),
    )
    return tuple(jax.tree.map(lambda leaf: leaf[None], block) for block in (first, second))


@pytest.fixture(scope="module")
def compressed():
    """Four blocks, the middle two compressed to different shapes."""
    params = make_model(4)
    stack = params.segments[0]
    adapter = Adapter(slice_blocks(stack, 0, 1), slice_blocks(stack, 3, 4))
    emulator = Emulator(params.shell, adapter, compress(slice_blocks(stack, 1, 3)))
    return jax.tree.map(jnp.asarray, emulator)


@pytest.fixture(scope="module")
def emulator():
    """The smallest there is, as the owner trains it: one block before the original middle."""
    model = split_model(make_model(2), AdapterSpec(1, 0))
    return jax.tree.map(jnp.asarray, Emulator(model.shell, model.adapter, model.middle))


def examples(count=24, length=8, seed=0):
    rows = np.random.default_rng(seed).integers(3, 32, (count, 1))
    ids = ((rows + np.arange(length + 1)) % 29 + 3).astype(np.int32)
    ones = np.ones((count, length), np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones)


EXAMPLES = examples()
VALIDATION = (examples(count=5, seed=1),)


def batches(start=0):
    return epoch_batches(EXAMPLES, 8, seed=0, start_step=start)


def tune(emulator, **settings):
    given = {"train_batches": batches, "optimizer": OPTIMIZER, "num_steps": 4} | settings
    data, optimizer = given.pop("train_batches"), given.pop("optimizer")
    return finetune_adapter(CONFIG, emulator, data, optimizer, **given)


def one_step(emulator, batch, optimizer=OPTIMIZER, **settings):
    frozen, state = init_training(emulator, optimizer, **settings)
    mesh = settings.get("mesh")
    return train_step(CONFIG, optimizer, state, frozen, place_batch(batch, mesh), mesh=mesh)


def gradient(emulator, batch, **settings):
    """The adapter's gradient, read off a first step of rate 1."""
    state, _ = one_step(emulator, batch, PLAIN, **settings)
    return jax.tree.map(lambda old, new: old - new, emulator.adapter, state.adapter)


def loss(emulator, adapter, data=VALIDATION):
    frozen, _ = init_training(emulator, PLAIN)
    total, count = evaluation_step(CONFIG, adapter, frozen, place_batch(data[0], None))
    return float(total / count)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_near(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def without_key_bias(adapter):
    """Less the biases of the keys: softmax does not see them, their gradient is rounding."""

    def less(block):
        return block.replace(k_proj=block.k_proj.replace(bias=None))

    return adapter.replace(bottom=less(adapter.bottom), top=less(adapter.top))


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_loss_decreases_and_everything_but_the_adapter_is_unchanged(emulator, tmp_path):
    before = jax.tree.map(np.array, emulator)
    adapter = tune(emulator, num_steps=30, metrics_path=tmp_path / "metrics.jsonl")
    assert_equal(emulator, before)
    assert loss(emulator, adapter) < 0.9 * loss(emulator, emulator.adapter)
    steps = records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["learning_rate"] == pytest.approx(1e-2)
    assert steps[0]["tokens_per_second"] > 0


def test_optimizer_state_holds_the_adapter_and_nothing_else(emulator):
    _, state = init_training(emulator, OPTIMIZER)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(emulator.adapter))
    held = sorted(leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert held == sorted(2 * shapes)


def test_gradient_is_that_of_the_mean_loss_of_the_assembled_model(compressed):
    batch = next(batches())

    def mean_loss(adapter):
        total, count = summed_loss(CONFIG, compressed.assemble(adapter), batch)
        return total / count

    expected = jax.jit(jax.grad(mean_loss))(compressed.adapter)
    assert_near(gradient(compressed, batch), expected, rtol=1e-3, atol=1e-6)


def test_prompt_targets_do_not_matter_when_only_answers_count(emulator):
    batch = next(batches())
    mask = np.zeros_like(batch.loss_mask)
    mask[:, 5:] = 1
    batch = batch._replace(loss_mask=mask)
    other = batch._replace(targets=np.where(mask > 0, batch.targets, 3))
    assert_equal(gradient(emulator, batch), gradient(emulator, other))


def test_two_accumulated_microbatches_give_the_gradient_of_one_batch(emulator):
    whole = next(batches())
    halves = [Batch(*(leaf[rows] for leaf in whole)) for rows in (slice(0, 4), slice(4, 8))]
    accumulating = make_optimizer(learning_rate=1e-2, num_steps=100, accumulate=2)
    frozen, state = init_training(emulator, accumulating)
    for half in halves:
        state, _ = train_step(CONFIG, accumulating, state, frozen, place_batch(half, None))
    at_once, _ = one_step(emulator, whole)
    for moment in ("mu", "nu"):
        accumulated = optax.tree.get(state.optimizer, moment)
        assert_near(accumulated, optax.tree.get(at_once.optimizer, moment), rtol=1e-4, atol=1e-8)


MESHES = [(1, 1), (2, 1), (1, 2), (8, 1), (2, 4), (4, 2)]


@pytest.fixture(scope="module")
def tuned_on_one_device(compressed):
    # A step of rate 1 from zero momentum is the gradient.
    return {steps: tune(compressed, num_steps=steps, optimizer=PLAIN) for steps in (1, 4)}


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_gradient_and_run_on_a_mesh_are_those_on_one_device(
    compressed, tuned_on_one_device, data, model, assert_close
):
    mesh = make_mesh(data, model)
    before = train_step._cache_size()
    for num_steps, single in tuned_on_one_device.items():
        sharded = tune(compressed, mesh=mesh, num_steps=num_steps, optimizer=PLAIN)
        moved = [jax.tree.map(jnp.subtract, t, compressed.adapter) for t in (sharded, single)]
        assert_close(*map(without_key_bias, moved), "float32_model")
        if data == model == 1:
            assert_equal(sharded, single)
    assert train_step._cache_size() <= before + 2


def test_update_by_adam_on_a_mesh_is_that_on_one_device(compressed, assert_close):
    batch = next(batches())
    mesh = make_mesh(4, 2)
    sharded, _ = one_step(compressed, batch, mesh=mesh)
    single, _ = one_step(compressed, batch)
    for moment in ("mu", "nu"):
        trees = [optax.tree.get(state.optimizer, moment) for state in (sharded, single)]
        assert_close(*map(without_key_bias, trees), "float32_model")


def test_each_device_of_a_mesh_holds_its_share_of_weights_masters_and_moments(compressed):
    mesh = make_mesh(4, 2)
    frozen, state = init_training(compressed, OPTIMIZER, mesh=mesh)
    placed = place_batch(next(batches()), mesh)
    state, _ = train_step(CONFIG, OPTIMIZER, state, frozen, placed, mesh=mesh)
    matrices = [
        (path, leaf)
        for path, leaf in jax.tree.leaves_with_path((frozen, state))
        if getattr(path[-1], "name", "") in ("kernel", "embed_tokens")
    ]
    # Two outer blocks as masters and twice as moments, the dense maps of the middle, the shell.
    assert len(matrices) == 3 * 2 * 6 + 9 + 1
    for path, leaf in matrices:
        shares = [shard.data.size * 8 for shard in leaf.addressable_shards]
        assert shares == [leaf.size] * 8, jax.tree_util.keystr(path)


def test_rows_added_to_fill_a_mesh_change_nothing(compressed):
    batch = next(batches())
    five = Batch(*(leaf[:5] for leaf in batch))
    mask = batch.loss_mask * (np.arange(8) < 5)[:, None]
    settings = {"num_steps": 1, "optimizer": PLAIN}
    filled = tune(compressed, train_batches=[five], mesh=make_mesh(8, 1), **settings)
    masked = tune(compressed, train_batches=[batch._replace(loss_mask=mask)], **settings)
    assert_near(filled, masked, **FLOAT32_TOLERANCE)


def test_float32_masters_keep_updates_that_bfloat16_would_lose(emulator):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), emulator)
    adapter = tune(half, compute_dtype=jnp.bfloat16, optimizer=optax.adam(1e-6))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    old, new = half.adapter.bottom.fc1.kernel, adapter.bottom.fc1.kernel
    assert np.mean(new != old.astype(jnp.float32)) > 0.95
    assert np.mean(new.astype(jnp.bfloat16) == old) > 0.95


def test_gradient_in_float16_points_as_in_float32(emulator):
    batch = next(batches())
    exact = gradient(emulator, batch)
    half = gradient(emulator, batch, compute_dtype=jnp.float16)
    cosine = optax.tree.vdot(exact, half) / (optax.tree.norm(exact) * optax.tree.norm(half))
    assert cosine > 0.999


def test_remat_changes_nothing_but_memory(emulator):
    remat = tune(emulator, remat=True, optimizer=PLAIN)
    assert_near(remat, tune(emulator, optimizer=PLAIN), **FLOAT32_TOLERANCE)


def test_an_emulator_of_numpy_arrays_trains_as_one_on_devices(emulator):
    assert_equal(tune(jax.tree.map(np.asarray, emulator)), tune(emulator))


def test_best_adapter_is_kept_when_the_last_is_worse(emulator, tmp_path):
    path = tmp_path / "metrics.jsonl"
    settings = {"num_steps": 6, "evaluate_every": 2, "optimizer": WILD}
    best = tune(emulator, validation_batches=VALIDATION, metrics_path=path, **settings)
    history = {r["step"]: r["validation_loss"] for r in records(path) if "validation_loss" in r}
    assert list(history) == [0, 2, 4, 6]
    assert history[4] < history[0] < history[6]
    assert loss(emulator, best) == pytest.approx(history[4], rel=1e-5)
    assert loss(emulator, tune(emulator, **settings)) == pytest.approx(history[6], rel=1e-5)


def test_adapter_that_only_gets_worse_is_returned_as_it_came(emulator):
    copying = VALIDATION[0]._replace(targets=VALIDATION[0].input_ids)
    best = tune(emulator, num_steps=3, evaluate_every=1, validation_batches=iter([copying]))
    assert_equal(best, emulator.adapter)


def test_last_partial_interval_is_validated(emulator, tmp_path):
    path = tmp_path / "metrics.jsonl"
    tune(emulator, num_steps=5, evaluate_every=3, validation_batches=VALIDATION, metrics_path=path)
    assert [r["step"] for r in records(path) if "validation_loss" in r] == [0, 3, 5]


@pytest.mark.parametrize(
    ("validation", "as_function"), [(None, True), (None, False), (VALIDATION, True)]
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    emulator, tmp_path, validation, as_function
):
    check_resume(emulator, tmp_path, as_function, validation_batches=validation)


def test_resumed_run_on_a_mesh_equals_uninterrupted_run_bit_for_bit(compressed, tmp_path):
    mesh = make_mesh(8, 1)
    settings = {"mesh": mesh, "optimizer": PLAIN, "validation_batches": VALIDATION}
    check_resume(compressed, tmp_path, True, **settings)


def check_resume(emulator, folder, as_function, **settings):
    path = folder / "metrics.jsonl"
    settings |= {"metrics_path": path, "evaluate_every": 2}
    whole = tune(emulator, num_steps=6, checkpoints=folder / "whole", **settings)
    whole_records = records(path)
    settings["checkpoints"] = folder / "parts"
    tune(emulator, num_steps=3, **settings)
    data = batches if as_function else batches()
    settings |= {"num_steps": 6, "resume": True}
    assert_equal(tune(emulator, train_batches=data, **settings), whole)
    assert losses(records(path)) == losses(whole_records)
    # One step more of each shows that the optimisers' states are equal too.
    settings["num_steps"] = 7
    parts = tune(emulator, **settings)
    assert_equal(parts, tune(emulator, **settings | {"checkpoints": folder / "whole"}))


def losses(history):
    return {record["step"]: record["loss"] for record in history if "loss" in record}


def test_resuming_another_run_is_refused_by_name(emulator, tmp_path):
    tune(emulator, num_steps=1, checkpoints=tmp_path)
    with pytest.raises(InputError, match="holds checkpoints of steps"):
        tune(emulator, checkpoints=tmp_path)
    other = emulator.replace(shell=jax.tree.map(lambda leaf: 2 * leaf, emulator.shell))
    with pytest.raises(InputError, match=r"identity\.emulator was"):
        tune(other, checkpoints=tmp_path, resume=True)
    with pytest.raises(InputError, match=r"identity\.settings\.seed was None, now 1"):
        tune(emulator, checkpoints=tmp_path, settings={"seed": 1}, resume=True)
    with pytest.raises(InputError, match=r"identity\.validation was"):
        tune(emulator, checkpoints=tmp_path, validation_batches=VALIDATION[:1], resume=True)
    with pytest.raises(InputError, match=r"arrays\.optimizer.* was float32.*now None"):
        tune(emulator, optimizer=PLAIN, checkpoints=tmp_path, resume=True)


def test_loss_that_is_not_finite_stops_the_run_and_is_never_saved(emulator, tmp_path):
    message = r"at step 8 the loss is nan .*last finite loss was \d+\.\d+: try a lower"
    with pytest.raises(DivergenceError, match=message):
        tune(emulator, optimizer=WILD, num_steps=9, evaluate_every=4, checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.isdigit()] == ["4"]


def test_validation_loss_that_is_not_finite_stops_the_run(emulator):
    broken = emulator.replace(shell=jax.tree.map(lambda leaf: leaf * jnp.nan, emulator.shell))
    with pytest.raises(DivergenceError, match="validation loss is nan after step 0"):
        tune(broken, validation_batches=VALIDATION)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_at_the_step_and_the_run_resumes_exactly(emulator, tmp_path, signum):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def interrupting():
        for step, batch in enumerate(batches(), start=1):
            if step == 3:
                os.kill(os.getpid(), signum)
            yield batch

    with pytest.raises(Interrupted, match=f"{signum.name} after step 3") as caught:
        tune(emulator, num_steps=6, train_batches=interrupting(), checkpoints=tmp_path)
    assert (caught.value.signum, caught.value.step) == (signum, 3)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed = tune(emulator, num_steps=6, checkpoints=tmp_path, resume=True)
    assert_equal(resumed, tune(emulator, num_steps=6))


@pytest.fixture
def interruptible():
    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_is_not_held_back(emulator, tmp_path):
    def impatient():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        yield from batches()

    with pytest.raises(KeyboardInterrupt):
        tune(emulator, train_batches=impatient(), checkpoints=tmp_path)


def test_runs_outside_the_main_thread(emulator, tmp_path):
    done = []
    thread = threading.Thread(
        target=lambda: done.append(tune(emulator, num_steps=1, checkpoints=tmp_path))
    )
    thread.start()
    thread.join()
    assert len(done) == 1


def test_runs_of_equal_shapes_trace_one_step(emulator, monkeypatch):
    traces = []
    original = training.summed_loss

    def counting(*args, **kwargs):
        traces.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "summed_loss", counting)
    optimizer = make_optimizer(learning_rate=1e-3, num_steps=5)
    tune(emulator, optimizer=optimizer)
    tune(emulator, optimizer=optimizer)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_batches": [next(batches())]}, "ended after 1 of 4 steps"),
        ({"num_steps": 0}, "num_steps"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"resume": True}, "checkpoints"),
        ({"validation_batches": []}, "count no target"),
        (
            {"train_batches": [EXAMPLES._replace(loss_mask=np.zeros((24, 8), np.float32))]},
            "step 1 counts no target",
        ),
    ],
)
def test_bad_settings_are_refused(emulator, settings, message):
    with pytest.raises(InputError, match=message):
        tune(emulator, **settings)
