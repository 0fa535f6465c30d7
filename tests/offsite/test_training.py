import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradot_jax.models.opt.forward import forward
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.loss import token_log_likelihood
from gradot_jax.offsite.optimizer import make_optimizer
from gradot_jax.offsite.training import evaluation_step, init_training, train_step

OPTIMIZER = make_optimizer(learning_rate=1e-2, num_steps=10)


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

    def mean_loss(adapter):
        params = case.emulator.assemble(adapter)
        logits = forward(case.config, params, batch.input_ids, batch.attention_mask)
        nats = -token_log_likelihood(logits, batch.targets) * batch.loss_mask
        return nats.sum() / batch.loss_mask.sum()

    @jax.jit
    def step(adapter):
        loss, gradient = jax.value_and_grad(mean_loss)(adapter)
        updates, _ = OPTIMIZER.update(gradient, OPTIMIZER.init(adapter), adapter)
        return loss, optax.tree.norm(gradient), optax.apply_updates(adapter, updates)

    return step(case.emulator.adapter)


def without_key_biases(adapter):
    """They shift all scores of a query alike: what Adam makes of their gradient is rounding."""

    def clear(block):
        return block.replace(k_proj=block.k_proj.replace(bias=None))

    return adapter.replace(bottom=clear(adapter.bottom), top=clear(adapter.top))


@pytest.mark.parametrize("remat", [False, True])
def test_a_step_is_one_update_by_the_gradient_of_the_mean_loss(
    case, batch, plain, remat, assert_close
):
    loss, norm, adapter = plain
    frozen, state = init_training(case.emulator, OPTIMIZER)
    state, metrics = train_step(case.config, OPTIMIZER, state, frozen, batch, remat=remat)
    assert_close((metrics.loss, metrics.gradient_norm), (loss, norm), "float32_model")
    got, expected = (without_key_biases(a) for a in (state.adapter, adapter))
    assert_close(got, expected, "float32_model")


def test_evaluation_sums_what_a_step_averages(case, batch, plain, assert_close):
    frozen, state = init_training(case.emulator, OPTIMIZER)
    total, count = evaluation_step(case.config, state.adapter, frozen, batch)
    assert count == batch.loss_mask.sum()
    assert_close(total / count, plain[0], "float32_model")


def test_a_step_keeps_less_than_the_scores_of_its_layers(make_case):
    case = make_case(max_position_embeddings=512)
    ids = jnp.zeros((4, 512), jnp.int32)
    batch = Batch(ids, ids, jnp.ones(ids.shape), jnp.ones(ids.shape))
    frozen, state = init_training(case.emulator, OPTIMIZER)
    lowered = train_step.lower(case.config, OPTIMIZER, state, frozen, batch)
    scores = 4 * case.config.num_attention_heads * 512**2 * 4
    memory = lowered.compile().memory_analysis().temp_size_in_bytes
    assert memory < case.config.num_hidden_layers * scores
