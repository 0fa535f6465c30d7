import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradot_jax.methods.compress import compress
from gradot_jax.models.run import forward
from gradot_jax.models.split import AdapterSpec, split_model
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.loss import token_log_likelihood
from gradot_jax.training.adapter import evaluation_step, init_training, train_step
from gradot_jax.training.optimizer import make_optimizer

OPTIMIZER = make_optimizer(learning_rate=1e-2, num_steps=10)


@pytest.fixture(scope="module")
def case(toy_model):
    """A configuration and an emulator of one compressed layer."""
    config, params = toy_model(num_hidden_layers=3, vocab_size=24, max_position_embeddings=12)
    split, options = AdapterSpec(1, 1), {"method": "magnitude", "budget": 0.5}
    return config, compress(config, params, split, (), **options)[1]


@pytest.fixture(scope="module")
def batch():
    """Rows of unequal length; a third of the targets does not count."""
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 24, (2, 4, 10))
    real = np.arange(10) < np.array([10, 7, 10, 4])[:, None]
    counted = real & (rng.random(real.shape) < 0.7)
    return Batch(*map(jnp.asarray, (ids, targets, counted.astype("float32"), real.astype("int32"))))


@pytest.fixture(scope="module")
def plain(case, batch):
    """Mean loss from all logits, its gradient's norm, and the adapter after one update."""
    config, emulator = case

    def mean_loss(adapter):
        params = emulator.assemble(adapter)
        logits = forward(config, params, batch.input_ids, batch.attention_mask)
        nats = -token_log_likelihood(logits, batch.targets) * batch.loss_mask
        return nats.sum() / batch.loss_mask.sum()

    @jax.jit
    def step(adapter):
        loss, gradient = jax.value_and_grad(mean_loss)(adapter)
        updates, _ = OPTIMIZER.update(gradient, OPTIMIZER.init(adapter), adapter)
        return loss, optax.tree.norm(gradient), optax.apply_updates(adapter, updates)

    return step(emulator.adapter)


def without_key_biases(adapter):
    """They shift all scores of a query alike: what Adam makes of their gradient is rounding."""

    def clear(block):
        return block.replace(k_proj=block.k_proj.replace(bias=None))

    return adapter.replace(bottom=clear(adapter.bottom), top=clear(adapter.top))


@pytest.mark.parametrize("remat", [False, True])
def test_a_step_is_one_update_by_the_gradient_of_the_mean_loss(
    case, batch, plain, remat, assert_close
):
    config, emulator = case
    loss, norm, adapter = plain
    frozen, state = init_training(emulator, OPTIMIZER)
    state, metrics = train_step(config, OPTIMIZER, state, frozen, batch, remat=remat)
    assert_close((metrics.loss, metrics.gradient_norm), (loss, norm), "float32_model")
    got, expected = (without_key_biases(a) for a in (state.adapter, adapter))
    assert_close(got, expected, "float32_model")


def test_evaluation_sums_what_a_step_averages(case, batch, plain, assert_close):
    config, emulator = case
    frozen, state = init_training(emulator, OPTIMIZER)
    total, count = evaluation_step(config, state.adapter, frozen, batch)
    assert count == batch.loss_mask.sum()
    assert_close(total / count, plain[0], "float32_model")


def test_a_step_keeps_less_than_the_scores_of_its_layers(toy_model):
    config, params = toy_model(max_position_embeddings=512)
    model = split_model(params, AdapterSpec(1, 0))
    ids = jnp.zeros((4, 512), jnp.int32)
    batch = Batch(ids, ids, jnp.ones(ids.shape), jnp.ones(ids.shape))
    frozen, state = init_training(model, OPTIMIZER)
    lowered = train_step.lower(config, OPTIMIZER, state, frozen, batch)
    scores = 4 * config.num_attention_heads * 512**2 * 4
    # Slow code needs the same memory, and is made in half the time.
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory < config.num_hidden_layers * scores
