import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.calibration.sweep import (
    kronecker_factors,
    run_forward,
    sweep_inputs,
    sweep_middle,
)
from gradot_jax.curvature.tap import zero_taps
from gradot_jax.errors import InputError
from gradot_jax.models.opt.block import LAYOUT
from gradot_jax.models.params import get_block, unstack_blocks
from gradot_jax.models.run import embed, head, summed_loss
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.attention import causal_attention
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.linear import linear
from gradot_jax.nn.loss import token_log_likelihood
from gradot_jax.nn.norm import layer_norm
from gradot_jax.parallel import make_mesh

SPLIT = AdapterSpec(1, 1)
SITES = [site.name for site in LAYOUT.sites]
VARIANTS = {
    "relu, norm before": {},
    "gelu, norm after": {"activation_function": "gelu", "do_layer_norm_before": False},
}


def block_with_shifts(config, block, hidden, mask, shifts):
    """One block, with zeros added to the output of every site; also returns what each site reads.

    The zero-perturbation capture that factor taps replace.
    """
    inputs = {}

    def site(name, x):
        inputs[name] = x
        return linear(getattr(block, name), x) + shifts[name]

    pre = config.do_layer_norm_before
    activation = {"relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}
    x = layer_norm(block.self_attn_layer_norm, hidden) if pre else hidden
    q, k, v = (site(name, x) for name in ("q_proj", "k_proj", "v_proj"))
    attended = causal_attention(q, k, v, config.num_attention_heads, mask)
    hidden = hidden + site("out_proj", attended)
    if not pre:
        hidden = layer_norm(block.self_attn_layer_norm, hidden)
    x = layer_norm(block.final_layer_norm, hidden) if pre else hidden
    hidden = hidden + site("fc2", activation[config.activation_function](site("fc1", x)))
    return (hidden if pre else layer_norm(block.final_layer_norm, hidden)), inputs


def logits_with_shifts(config, params, batch, shifts):
    mask = batch.attention_mask

    def step(hidden, layer):
        return block_with_shifts(config, layer[0], hidden, mask, layer[1])

    hidden = embed(config, params.shell, batch.input_ids, mask)
    hidden, captured = jax.lax.scan(step, hidden, (params.segments[0], shifts))
    return head(config, params.shell, hidden), captured


def zero_shifts(params, batch):
    """Per site, `[L, B, T, D_out]`."""
    lead = (params.num_layers, *batch.input_ids.shape)
    return {name: np.zeros((*lead, getattr(params.segments[0], name).shape[1])) for name in SITES}


def captured_tokens(config, params, batch, skip=0):
    """What enters each of the middle's sites and the cotangents of what leaves it, real tokens.

    Without the first `skip` of each sequence.
    """

    def loss(shifts):
        logits, captured = logits_with_shifts(config, params, batch, shifts)
        likelihood = token_log_likelihood(logits, batch.targets) * batch.loss_mask
        return -likelihood.sum(), captured

    shifts = zero_shifts(params, batch)
    cotangents, captured = jax.jit(jax.grad(loss, has_aux=True))(shifts)
    real = np.asarray(batch.attention_mask) > 0
    for row in real:
        row[np.flatnonzero(row)[:skip]] = False
    return {
        (layer, name): tuple(
            np.asarray(part[name][layer + 1], np.float64)[real] for part in (captured, cotangents)
        )
        for layer in range(params.num_layers - 2)
        for name in SITES
    }


def captured_factors(config, params, batch, skip=0):
    """A, E[x] and G of the middle's sites, from captured arrays multiplied in float64."""
    return {
        site: (x.T @ x / len(x), x.mean(0), g.T @ g / len(x))
        for site, (x, g) in captured_tokens(config, params, batch, skip).items()
    }


def removal_fishers(config, params, batches, **options):
    forward_pass = run_forward(config, params, SPLIT, batches, **options)
    sweep = sweep_middle(config, params, SPLIT, forward_pass, with_removals=True)
    return {layer: sites["fc2"].removal_fisher for layer, sites in sweep}


def swept(config, params, batches, **options):
    return dict(kronecker_factors(config, params, SPLIT, batches, **options))


def without_gradient(factors):
    return {
        (layer, name): tuple(site)[:3]
        for layer, sites in factors.items()
        for name, site in sites.items()
    }


def with_gradient(factors):
    """As above, with the bias as a last row of the gradient: that of k_proj is noise around zero.

    A constant added to all keys does not change the softmax.
    """
    return {
        (layer, name): (*site[:3], np.concatenate([site[3].kernel, site[3].bias[None]]))
        for layer, sites in factors.items()
        for name, site in sites.items()
    }


@pytest.fixture(scope="module")
def batch(toy_batch):
    return toy_batch()


@pytest.fixture(scope="module")
def factors(toy_model, batch):
    config, params = toy_model()
    return swept(config, params, [batch])


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_equal_those_of_captured_inputs_and_cotangents(
    variant, toy_model, toy_batch, assert_close
):
    config, params = toy_model(**VARIANTS[variant])
    # Not the draw in which a softmax is saturated, and a gradient the difference of equal numbers.
    batch = toy_batch(seed=2)
    got = without_gradient(swept(config, params, [batch]))
    assert_close(got, captured_factors(config, params, batch), "float32_model")


@pytest.mark.parametrize("skip", [1, 3])
def test_first_positions_are_left_out_of_factors_and_of_nothing_else(
    skip, toy_model, toy_batch, assert_close
):
    config, params = toy_model()
    batch = toy_batch(seed=2)
    # Sequences padded in front and behind: their first tokens are not those in the first column.
    mask = np.array(batch.attention_mask)
    mask[0, :2] = mask[1, -2:] = 0
    batch = batch._replace(attention_mask=mask, loss_mask=batch.loss_mask * mask)
    whole, got = (swept(config, params, [batch], skip_positions=n) for n in (0, skip))
    expected = captured_factors(config, params, batch, skip)
    assert_close(without_gradient(got), expected, "float32_model")
    counted = mask.sum() - skip * len(mask)
    for layer, sites in got.items():
        for name, site in sites.items():
            before = whole[layer][name].gradient.kernel * mask.sum() / counted
            assert_close(site.gradient.kernel, before, "float32_model")
    inputs = dict(sweep_inputs(config, params, SPLIT, [batch], skip_positions=skip))
    for layer, sites in inputs.items():
        of_inputs = {name: tuple(site)[:2] for name, site in sites.items()}
        assert_close(of_inputs, {n: expected[layer, n][:2] for n in of_inputs}, "float32_model")


def test_skipping_every_position_is_refused(toy_model, batch):
    config, params = toy_model()
    most = int(np.asarray(batch.attention_mask).sum(1).max())
    with pytest.raises(InputError, match=f"skip_positions {most} leaves no token .* {most} "):
        run_forward(config, params, SPLIT, [batch], skip_positions=most)
    with pytest.raises(InputError, match="leaves no token"):
        next(sweep_inputs(config, params, SPLIT, [batch], skip_positions=most))


def test_gradients_equal_those_of_the_full_model(toy_model, batch, factors, assert_close):
    config, params = toy_model()
    full = jax.jit(jax.grad(lambda p: summed_loss(config, p, batch)[0] / batch.targets.size))
    blocks = unstack_blocks(full(params).segments)[1:-1]
    expected = {
        layer: {
            name: site._replace(gradient=getattr(blocks[layer], name))
            for name, site in sites.items()
        }
        for layer, sites in factors.items()
    }
    assert_close(with_gradient(factors), with_gradient(expected), "float32_model")


def test_layers_come_from_the_top_down_and_boundaries_are_released(toy_model, batch):
    config, params = toy_model()
    forward_pass = run_forward(config, params, SPLIT, [batch])
    loss, count = summed_loss(config, params, batch)
    assert forward_pass.loss == pytest.approx(float(loss / count), rel=1e-5)
    assert (forward_pass.num_tokens, forward_pass.num_sequences) == (48, 8)
    seen = []
    for layer, sites in sweep_middle(config, params, SPLIT, forward_pass):
        seen.append(layer)
        assert len(forward_pass.boundaries) == layer
        assert all(site.gradient is None for site in sites.values())
    assert seen == [2, 1, 0]


def test_query_key_and_value_share_one_input_factor(toy_model, factors):
    _, params = toy_model()
    taps = zero_taps(get_block(params.segments[0], 0))
    assert taps.inputs.keys() == {site.reads for site in LAYOUT.sites} and len(taps.inputs) == 4
    for sites in factors.values():
        for name in ("k_proj", "v_proj"):
            np.testing.assert_array_equal(
                sites["q_proj"].input_covariance, sites[name].input_covariance
            )


def test_microbatches_equal_one_batch(toy_model, batch, factors, assert_close):
    config, params = toy_model()
    parts = [Batch(*(field[i : i + 2] for field in batch)) for i in range(0, 8, 2)]
    got = without_gradient(swept(config, params, parts, with_gradient=False))
    assert_close(got, without_gradient(factors), "float32_model")


def test_eight_devices_equal_one(toy_model, batch, factors, assert_close):
    config, params = toy_model()
    sharded = swept(config, params, [batch], mesh=make_mesh(data=8), with_gradient=False)
    assert_close(without_gradient(sharded), without_gradient(factors), "float32_model")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side, toy_model, batch, assert_close):
    config, params = toy_model()
    short = Batch(*(field[:, :4] for field in batch))
    width = ((0, 0), (2, 0) if side == "left" else (0, 2))
    padded = Batch(*(jnp.pad(field, width) for field in short))
    got, expected = (with_gradient(swept(config, params, [b])) for b in (padded, short))
    assert_close(got, expected, "float32_model")


def test_a_token_without_target_counts_as_input_and_adds_no_gradient(
    toy_model, batch, assert_close
):
    config, params = toy_model()
    partly = batch._replace(loss_mask=batch.loss_mask.at[:, 3:].set(0))
    got = without_gradient(swept(config, params, [partly], with_gradient=False))
    assert_close(got, captured_factors(config, params, partly), "float32_model")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("counted", [6, 4])
def test_removal_fisher_equals_the_sum_over_tokens(
    variant, counted, toy_model, batch, assert_close
):
    config, params = toy_model(**VARIANTS[variant])
    alive = (jnp.arange(6) < counted).astype(jnp.float32)
    partly = Batch(*batch[:2], *(field * alive[None] for field in batch[2:]))
    expected = {}
    for (layer, name), (x, g) in captured_tokens(config, params, partly).items():
        if name == "fc2":
            effects = x * (g @ np.asarray(params.segments[0].fc2.kernel[layer + 1], np.float64).T)
            expected[layer] = sum(np.outer(row, row) for row in effects) / len(effects)
    assert_close(removal_fishers(config, params, [partly]), expected, "float32_model")


def test_removal_fisher_of_microbatches_and_of_eight_devices_is_that_of_one_batch(
    toy_model, batch, assert_close
):
    config, params = toy_model()
    whole = removal_fishers(config, params, [batch])
    parts = [Batch(*(field[i : i + 2] for field in batch)) for i in range(0, 8, 2)]
    assert_close(removal_fishers(config, params, parts), whole, "float32_model")
    sharded = removal_fishers(config, params, [batch], mesh=make_mesh(data=8))
    assert_close(sharded, whole, "float32_model")


def test_removals_are_taken_only_when_asked_for(toy_model, factors):
    _, params = toy_model()
    assert zero_taps(get_block(params.segments[0], 0)).removals is None
    assert all(site.removal_fisher is None for sites in factors.values() for site in sites.values())


def test_sampled_fisher_is_the_fisher_of_the_softmax(toy_model, batch, assert_close):
    config, params = toy_model(num_hidden_layers=3)
    one = Batch(*(field[:1] for field in batch))

    def logits(shifts):
        return logits_with_shifts(config, params, one, shifts)[0][0]

    at = zero_shifts(params, one)
    slopes, p = jax.jit(jax.jacrev(logits))(at), np.asarray(jax.nn.softmax(logits(at)), np.float64)
    curvature = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    many = Batch(*(jnp.repeat(field, 4096, 0) for field in one))
    sampled = swept(config, params, [many], fisher="mc", with_gradient=False)[0]
    for name in SITES:
        # [t, v, n, d]: how the logits at token t move with the site's output at token n.
        jacobian = np.asarray(slopes[name], np.float64)[:, :, 1, 0]
        exact = np.einsum("tvnd,tvw,twne->de", jacobian, curvature, jacobian) / len(p)
        assert_close(sampled[name].gradient_covariance, exact, "monte_carlo")


def test_sampled_fisher_follows_its_seed_and_keeps_the_true_gradient(
    toy_model, batch, factors, assert_close
):
    config, params = toy_model()
    first, again, other = (
        swept(config, params, [batch], fisher="mc", seed=seed)[0]["fc2"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.gradient_covariance, again.gradient_covariance)
    assert np.abs(first.gradient_covariance - other.gradient_covariance).max() > 0
    assert_close(first.gradient, factors[0]["fc2"].gradient, "float32_model")
    assert_close(first.input_covariance, factors[0]["fc2"].input_covariance, "float32_model")


def test_half_precision_models_have_float32_factors(toy_model, toy_batch, assert_close):
    config, params = toy_model(dtype="bfloat16")
    # Of a few tokens' factors rounded activations are a fifth, or nothing, as the draw has it.
    batch = toy_batch(size=128)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    got, expected = (swept(config, p, [batch], with_gradient=False) for p in (params, rounded))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert_close(without_gradient(got), without_gradient(expected), "bfloat16_model")


def test_calibration_without_a_counted_token_is_refused(toy_model, batch):
    config, params = toy_model()
    uncounted = batch._replace(loss_mask=0 * batch.loss_mask)
    for batches in ([], [uncounted]):
        with pytest.raises(InputError, match="at least one batch with a counted token"):
            run_forward(config, params, SPLIT, batches)


def test_batches_of_unequal_shape_are_refused(toy_model, batch):
    config, params = toy_model()
    with pytest.raises(InputError, match="one shape"):
        run_forward(config, params, SPLIT, [batch, Batch(*(field[:, :5] for field in batch))])


def test_loss_that_is_not_finite_is_refused(toy_model, batch):
    config, params = toy_model()
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(InputError, match="not finite"):
        run_forward(config, broken, SPLIT, [batch])


def test_split_without_a_middle_is_refused(toy_model, batch):
    config, params = toy_model()
    with pytest.raises(InputError, match="leave no middle"):
        run_forward(config, params, AdapterSpec(2, 3), [batch])
