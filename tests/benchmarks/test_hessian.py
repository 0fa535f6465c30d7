import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.hessian import ShiftedMaps, hessian_action, hessian_norms, mean_loss, token_rows
from gradot_jax.calibration.sweep import kronecker_factors, run_forward
from gradot_jax.models.families import read_config
from gradot_jax.models.params import get_block, init_params
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.layout import maps

LLAMA = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(params=["opt", "llama"])
def model(request, toy_model):
    if request.param == "opt":
        return toy_model(num_hidden_layers=4)
    config = read_config(LLAMA, "test")
    return config, jax.tree.map(lambda w: w * 8, init_params(config, jax.random.key(0)))


def at_layer(model, batch, number):
    """Arguments of the functions at a layer, and the loss that the package finds."""
    forward = run_forward(*model, AdapterSpec(1, 1), [batch])
    hidden = forward.boundaries[number - 1][0]
    return (*model, number, hidden, batch.targets), forward.loss


def test_the_loss_is_the_same_from_every_depth(model, toy_batch, assert_close):
    for number in (1, 2):
        here, expected = at_layer(model, toy_batch(), number)
        own = ShiftedMaps(get_block(here[1].segments[0], number))
        assert_close(mean_loss(*here[:3], own, *here[3:]), expected, "float32_model")


def test_rows_of_tokens_make_the_factors_of_the_sweep(model, toy_batch, assert_close):
    here, _ = at_layer(model, toy_batch(), 2)
    factors = dict(kronecker_factors(*model, AdapterSpec(1, 1), [toy_batch()]))[1]
    for site, (x, g) in token_rows(*here).items():
        assert_close(x.T @ x / len(x), factors[site].input_covariance, "float32_model")
        assert_close(g.T @ g / len(g), factors[site].gradient_covariance, "float32_model")


def test_the_hessian_is_the_slope_of_the_gradient_in_float64(toy_model, toy_batch, monkeypatch):
    here, _ = at_layer(toy_model(num_hidden_layers=4), toy_batch(), 1)
    # Norms are computed in this dtype.
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        config, params = toy_model(num_hidden_layers=4, dtype="float64")
        hidden = jnp.asarray(np.asarray(here[3]), "float64")
        block = get_block(params.segments[0], 1)
        at = {site: weights.kernel for site, weights in maps(block).items()}
        rng = np.random.default_rng(0)

        @jax.jit
        def gradient(kernels):
            def loss(kernels):
                changed = {s: getattr(block, s).replace(kernel=k) for s, k in kernels.items()}
                own = ShiftedMaps(block.replace(**changed))
                return mean_loss(config, params, 1, own, hidden, here[4])

            return jax.grad(loss)(kernels)

        action = jax.jit(hessian_action(config, params, 1, hidden, here[4]))
        for site, kernel in at.items():
            delta = jnp.asarray(rng.normal(size=kernel.shape))
            up, down = (gradient(at | {site: kernel + e * delta})[site] for e in (1e-5, -1e-5))
            zeros = jax.tree.map(jnp.zeros_like, at)
            found = action(zeros | {site: delta})[site]
            assert found.dtype == jnp.float64
            scale = np.abs(found).max()
            np.testing.assert_allclose(found, (up - down) / 2e-5, rtol=0, atol=1e-8 * scale)


def test_norms_are_those_of_each_tangent_alone(model, toy_batch, assert_close):
    here, _ = at_layer(model, toy_batch(), 2)
    action = hessian_action(*here)
    shapes = {s: w.shape for s, w in maps(get_block(here[1].segments[0], 2)).items()}
    tangents = {s: jnp.zeros((4, *shape)) for s, shape in shapes.items()}
    own = jax.random.normal(jax.random.key(0), (4, *shapes["v_proj"]))
    found = hessian_norms(*here, tangents | {"v_proj": own})["v_proj"]
    single = {s: t[0] for s, t in tangents.items()}
    for norm, delta in zip(found, own, strict=True):
        expected = jnp.abs(action(single | {"v_proj": delta})["v_proj"]).sum()
        assert_close(norm, expected, "float32_model")
