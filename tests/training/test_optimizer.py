import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import init_params
from gradot_jax.training.optimizer import (
    current_learning_rate,
    decay_mask,
    make_optimizer,
    rated_optimizer,
)

PARAMS = {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}
GRADIENT = jax.tree.map(lambda leaf: 0.1 * leaf, PARAMS)


def run(optimizer, gradients, params=PARAMS):
    state, update, rates = optimizer.init(params), jax.jit(optimizer.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        rates.append(float(current_learning_rate(state)))
    return params, rates


def test_equals_adamw_of_optax():
    ours, _ = run(
        make_optimizer(
            learning_rate=0.1, num_steps=3, schedule="constant", weight_decay=0.5, clip_norm=None
        ),
        [GRADIENT] * 3,
    )
    theirs = optax.adamw(0.1, weight_decay=0.5, mask={"kernel": True, "bias": False})
    params, state = PARAMS, theirs.init(PARAMS)
    for _ in range(3):
        updates, state = theirs.update(GRADIENT, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, params)


def test_weight_decay_reaches_matrices_and_no_bias_or_norm():
    config = OPTConfig(
        vocab_size=8,
        hidden_size=4,
        num_hidden_layers=2,
        ffn_dim=8,
        num_attention_heads=1,
        max_position_embeddings=4,
        word_embed_proj_dim=4,
    )
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    stack = params.segments[0]
    leaves = jax.tree_util.tree_flatten_with_path(decay_mask(stack))[0]
    decayed = {jax.tree_util.keystr(path) for path, decays in leaves if decays}
    sites = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    assert decayed == {f".{site}.kernel" for site in sites}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.85355, 0.5, 0.14645]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedule_rises_to_the_peak_and_falls(schedule, expected):
    optimizer = make_optimizer(learning_rate=1.0, num_steps=6, warmup_steps=2, schedule=schedule)
    _, rates = run(optimizer, [GRADIENT] * 6)
    np.testing.assert_allclose(rates, expected, atol=1e-5)


def test_schedule_counts_updates_not_accumulated_batches():
    optimizer = make_optimizer(learning_rate=1.0, num_steps=2, accumulate=3)
    _, rates = run(optimizer, [GRADIENT] * 6)
    assert rates[2] == 1.0
    assert rates[5] == 0.5


def test_clipping_bounds_the_gradient_that_moments_see():
    optimizer = make_optimizer(learning_rate=1.0, num_steps=1, clip_norm=1.0)
    huge = jax.tree.map(lambda leaf: 1e6 * leaf, PARAMS)
    _, state = optimizer.update(huge, optimizer.init(PARAMS), PARAMS)
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(first_moment), 0.1, rtol=1e-5)


def test_an_optimizer_without_a_recorded_rate_has_none():
    assert current_learning_rate(optax.sgd(0.1).init(PARAMS)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"num_steps": 0}, "num_steps"),
        ({"warmup_steps": 4}, "warmup_steps"),
        ({"schedule": "step"}, "schedule 'step'"),
        ({"accumulate": 0}, "accumulate"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(**{"learning_rate": 0.1, "num_steps": 4} | settings)


def after_steps(optimizer):
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
    state = optimizer.init(params)
    for i in range(4):
        gradient = jax.tree.map(lambda leaf, i=i: jnp.cos(leaf + i), params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


RATED = {"learning_rate": 1e-2, "num_steps": 5, "warmup_steps": 2, "weight_decay": 0.1}


def test_a_factor_on_the_rate_is_that_rate(assert_close):
    expected = make_optimizer(**(RATED | {"learning_rate": 2e-2}))
    assert_close(after_steps(rated_optimizer(2.0, **RATED)), after_steps(expected), "float32")


def test_optimizers_are_equal_whatever_the_rate_and_differ_by_settings():
    one, two = rated_optimizer(0.5, **RATED), rated_optimizer(2.0, **RATED)
    other = rated_optimizer(0.5, **(RATED | {"num_steps": 6}))
    assert one == two and hash(one) == hash(two)
    assert one != other


def test_the_rate_of_record_is_the_one_that_was_taken():
    optimizer = rated_optimizer(3.0, **RATED)
    params = {"kernel": jnp.ones(2)}
    state = optimizer.init(params)
    for expected in (0.0, 1.5e-2):
        _, state = optimizer.update(params, state, params)
        assert float(current_learning_rate(state)) == pytest.approx(expected)


@pytest.mark.parametrize("betas", [(1.0, 0.999), (0.9, -0.1), (0.9, float("nan"))])
def test_decays_out_of_range_are_refused(betas):
    with pytest.raises(InputError, match="decays of the moments"):
        make_optimizer(learning_rate=1e-3, num_steps=2, betas=betas)
