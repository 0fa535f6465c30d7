import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.calibration.fidelity import gradient_fidelity
from gradot_jax.compression.budget import channel_pool, rank_pool, uniform_counts
from gradot_jax.compression.plan import Plan
from gradot_jax.errors import InputError
from gradot_jax.methods.compress import compress, run_compression
from gradot_jax.methods.layer_drop import kept_layers
from gradot_jax.methods.options import CompressionOptions, DistillationOptions, ScaleOTOptions
from gradot_jax.models.opt.block import LAYOUT
from gradot_jax.models.params import count_params, get_block, unstack_blocks
from gradot_jax.models.run import forward
from gradot_jax.models.split import AdapterSpec, adapter_of, split_model
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.linear import Dense, LowRank, dense_kernel
from gradot_jax.parallel import make_mesh

SPLIT = AdapterSpec(1, 1)
D, F, MIDDLE = 8, 12, 3


@pytest.fixture(scope="module")
def model(toy_model):
    return toy_model()


@pytest.fixture(scope="module")
def batch(toy_batch):
    return toy_batch()


@pytest.fixture(scope="module")
def middle(model):
    (stack,) = split_model(model[1], SPLIT).middle
    return stack


@pytest.fixture(scope="module")
def half(model, batch):
    return run(model, [batch], budget=0.5)


def run(model, batches, mesh=None, **options):
    return run_compression(*model, SPLIT, batches, CompressionOptions(**options), mesh=mesh)


def cost(shapes):
    """Parameters of the kernels that a budget counts: attention and MLP."""
    ranks = [rank for shape in shapes for _, rank in shape.ranks]
    attention = sum(D * D if rank is None else 2 * D * rank for rank in ranks)
    return attention, sum(2 * D * shape.num_channels for shape in shapes)


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("method", ["gradot", "magnitude"])
def test_full_budget_is_the_original_bit_for_bit(method, allocation, model, middle, batch):
    config, params = model
    options = {"compensate_mlp": "refit", "compensate_attention": "refit"}
    result = run(model, [batch], method=method, budget=1.0, allocation=allocation, **options)
    assert_same(result.emulator.middle, (middle,))
    logits = forward(config, result.emulator.assemble(), batch.input_ids)
    np.testing.assert_array_equal(logits, forward(config, params, batch.input_ids))


def test_adapter_and_shell_are_those_of_the_original(model, half):
    adapter = adapter_of(model[1], SPLIT)
    assert half.emulator.shell is model[1].shell
    assert_same(half.emulator.adapter, adapter)


def test_uniform_shapes_are_the_counts_of_the_budget(half):
    (rank,), (channels,) = (
        uniform_counts([pool], 0.5) for pool in (rank_pool(D, D), channel_pool(F, 2 * D))
    )
    for shape in half.plan.emulator.shapes:
        assert shape.ranks == tuple((site, rank) for site in LAYOUT.low_rank)
        assert shape.num_channels == channels
    assert cost(half.plan.emulator.shapes) == (MIDDLE * 4 * D * D / 2, MIDDLE * 2 * D * F / 2)
    assert [layer.layer for layer in half.plan.layers] == [1, 2, 3]


def test_emulator_holds_exactly_what_the_plan_keeps(middle, half, assert_close):
    for i, (plan, block) in enumerate(
        zip(half.plan.layers, unstack_blocks(half.emulator.middle), strict=True)
    ):
        original, kept = get_block(middle, i), np.array(plan.channels)
        assert_same(block.fc1, Dense(original.fc1.kernel[:, kept], original.fc1.bias[kept]))
        assert_same(block.fc2, Dense(original.fc2.kernel[kept], original.fc2.bias))
        assert_same(block.final_layer_norm, original.final_layer_norm)
        for site, components in plan.components:
            u, s, vt = np.linalg.svd(np.asarray(getattr(original, site).kernel, np.float64))
            k = list(components)
            assert_close(dense_kernel(getattr(block, site)), (u[:, k] * s[k]) @ vt[k], "float32")
            np.testing.assert_array_equal(getattr(block, site).bias, getattr(original, site).bias)


def test_kept_are_the_highest_scores_above_the_floor(half):
    for i, plan in enumerate(half.plan.layers):
        channels = half.scores["channels_hessian"][i]
        assert set(plan.channels) == set(np.argsort(-channels, kind="stable")[: F // 2])
        for site, (_, components) in enumerate(plan.components):
            scores = half.scores["components_hessian"][i, site]
            best = np.argsort(-scores[1:], kind="stable")[: len(components) - 1] + 1
            assert set(components) == {0, *best}


def test_microbatches_and_devices_choose_the_same(model, batch, half):
    parts = [Batch(*(field[i : i + 2] for field in batch)) for i in range(0, 8, 2)]
    assert run(model, parts, budget=0.5).plan == half.plan
    assert run(model, [batch], mesh=make_mesh(data=8), budget=0.5).plan == half.plan
    record = {"tokens": 48, "sequences": 8}
    assert {name: half.calibration[name] for name in record} == record


def test_permuted_channels_are_chosen_as_before(model, batch, half):
    config, params = model
    order = np.random.default_rng(0).permutation(F)
    blocks = params.segments[0]
    permuted = blocks.replace(
        fc1=Dense(blocks.fc1.kernel[:, :, order], blocks.fc1.bias[:, order]),
        fc2=Dense(blocks.fc2.kernel[:, order], blocks.fc2.bias),
    )
    got = run((config, params.replace(segments=(permuted,))), [batch], budget=0.5)
    for plan, expected in zip(got.plan.layers, half.plan.layers, strict=True):
        assert {order[channel] for channel in plan.channels} == set(expected.channels)
        assert plan.components == expected.components


@pytest.mark.parametrize(("budget", "multiple"), [(0.3, 1), (0.6, 2), (0.85, 1)])
def test_global_shapes_stay_within_the_budget(budget, multiple, model, batch):
    multiples = {"rank_multiple": multiple, "channel_multiple": multiple}
    result = run(model, [batch], budget=budget, allocation="global", **multiples)
    attention, mlp = cost(result.plan.emulator.shapes)
    assert attention <= budget * MIDDLE * 4 * D * D and mlp <= budget * MIDDLE * 2 * D * F
    for shape in result.plan.emulator.shapes:
        assert shape.num_channels % multiple == 0
        assert all(r is None or (0 < r < D // 2 and r % multiple == 0) for _, r in shape.ranks)
    emulated = unstack_blocks(result.emulator.middle)
    for block, shape in zip(emulated, result.plan.emulator.shapes, strict=True):
        assert block.fc1.shape[1] == shape.num_channels
        for site, rank in shape.ranks:
            weights = getattr(block, site)
            assert (weights.rank if isinstance(weights, LowRank) else None) == rank


def test_attention_and_mlp_have_budgets_of_their_own(model):
    result = run(model, [], method="magnitude", budget=1.0, attention_budget=1.0, mlp_budget=0.25)
    attention, mlp = cost(result.plan.emulator.shapes)
    assert (attention, mlp) == (MIDDLE * 4 * D * D, MIDDLE * 2 * D * F / 4)
    assert (result.plan.attention_budget, result.plan.mlp_budget) == (1.0, 0.25)


def test_lambda_prefers_to_remove_what_raises_the_loss(model, batch):
    plans = {}
    for weight in (-100.0, 100.0):
        result = run(model, [batch], budget=0.5, lambda_attention=weight, lambda_mlp=weight)
        plans[weight] = result.plan
        for i, plan in enumerate(result.plan.layers):
            gradient = result.scores["channels_gradient"][i]
            removed = sorted(set(range(F)) - set(plan.channels))
            kept = gradient[list(plan.channels)].mean()
            assert np.sign(kept - gradient[removed].mean()) == np.sign(weight)
    assert plans[-100.0] != plans[100.0]


def test_scores_without_lambda_take_no_gradient(half):
    assert half.scores["components_hessian"].shape == (MIDDLE, 4, D)
    assert half.scores["channels_hessian"].shape == (MIDDLE, F)
    assert not half.scores["channels_gradient"].any()


def test_compensation_changes_weights_and_not_the_choice(model, batch, half):
    options = {"compensate_attention": "refit", "compensate_mlp": "refit"}
    refitted = run(model, [batch], budget=0.5, **options)
    assert refitted.plan == half.plan
    assert count_params(refitted.emulator) == count_params(half.emulator)
    before, after = half.emulator.middle[0], refitted.emulator.middle[0]
    assert not np.array_equal(before.fc2.kernel, after.fc2.kernel)
    assert not np.array_equal(before.q_proj.right, after.q_proj.right)
    assert_same(after.fc1, before.fc1)


@pytest.mark.parametrize("compensate", ["none", "refit"])
def test_half_precision_models_give_half_precision_emulators(compensate, toy_model, batch):
    model = toy_model(dtype="bfloat16")
    options = {"compensate_attention": compensate, "compensate_mlp": compensate}
    result = run(model, [batch], budget=0.5, **options)
    leaves = jax.tree.leaves(result.emulator)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in leaves)


def test_gradot_preserves_the_gradient_where_magnitude_preserves_the_weights(toy_model, toy_batch):
    # Inputs that the norms damp a hundredfold carry large weights which do next to nothing.
    config, params = toy_model()
    damped = np.where(np.arange(D) % 2, 0.01, 1.0).astype(np.float32)
    blocks = params.segments[0]
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        weights = getattr(blocks, norm)
        weights = weights.replace(
            scale=weights.scale * damped[None], bias=weights.bias * damped[None]
        )
        blocks = blocks.replace(**{norm: weights})
    for site in ("q_proj", "k_proj", "v_proj", "fc1"):
        weights = getattr(blocks, site)
        kernel = weights.kernel / np.sqrt(damped)[None, :, None]
        blocks = blocks.replace(**{site: weights.replace(kernel=kernel)})
    params = params.replace(segments=(blocks,))
    (middle,) = split_model(params, SPLIT).middle

    def weight_error(emulator):
        pairs = [
            (dense_kernel(getattr(stack, site))[i], getattr(middle, site).kernel[i])
            for stack in emulator.middle
            for site in LAYOUT.low_rank
            for i in range(MIDDLE)
        ]
        lost = sum(float(np.square(got - wanted).sum()) for got, wanted in pairs)
        return lost / sum(float(np.square(wanted).sum()) for _, wanted in pairs)

    errors = {}
    for method in ("gradot", "magnitude"):
        result = run((config, params), [toy_batch(0)], method=method, budget=0.5)
        fidelity = gradient_fidelity(config, params, result.emulator, [toy_batch(1)])
        errors[method] = fidelity.adapter.relative_error, weight_error(result.emulator)
    (gradient, weight), (gradient_magnitude, weight_magnitude) = errors.values()
    assert gradient < gradient_magnitude
    assert weight > weight_magnitude


@pytest.mark.parametrize(("budget", "count"), [(0.34, 1), (0.6, 1), (2 / 3, 2), (1.0, 3)])
def test_layer_drop_keeps_the_whole_layers_that_the_budget_holds(budget, count, model, middle):
    plan, emulator = compress(*model, SPLIT, [], method="layer-drop", budget=budget)
    kept = kept_layers(MIDDLE, count)
    assert [layer.layer for layer in plan.layers] == [1 + i for i in kept]
    for got, i in zip(unstack_blocks(emulator.middle), kept, strict=True):
        assert_same(got, get_block(middle, i))
    assert cost(plan.emulator.shapes) == (count * 4 * D * D, count * 2 * D * F)


def test_a_budget_below_one_layer_is_refused_with_the_least(model):
    with pytest.raises(InputError, match=r"the least is 0\.3334"):
        compress(*model, SPLIT, [], method="layer-drop", budget=0.33)


def test_empty_middle_keeps_nothing(model):
    plan, emulator = compress(*model, SPLIT, [], method="empty")
    assert plan.layers == () and emulator.middle == ()


def test_magnitude_reads_no_text_unless_it_compensates(model, batch):
    assert run(model, [], method="magnitude").calibration == {}
    with pytest.raises(InputError, match="at least one batch"):
        run(model, [], method="magnitude", compensate_mlp="refit")


def test_plan_survives_its_json(half):
    assert Plan.from_json(half.plan.to_json()) == half.plan


@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["budget", "attention_budget", "mlp_budget"])
def test_budget_outside_zero_to_one_is_refused(name, value):
    with pytest.raises(InputError, match=rf"{name} must lie in \(0, 1\]"):
        CompressionOptions(**{name: value})


@pytest.mark.parametrize(
    "option",
    [
        {"method": "best"},
        {"allocation": "local"},
        {"adapter": "spread"},
        {"attention_score": "l2"},
        {"attention_basis": "eigh"},
        {"channel_score": "l2"},
        {"fisher": "exact"},
        {"compensate_attention": "shift"},
        {"compensate_mlp": "bias"},
        {"rank_multiple": 0},
        {"rank_multiple": 1.5},
        {"channel_multiple": True},
        {"budget": True},
        {"budget": "0.6"},
        {"method": ["gradot"]},
        {"channel_multiple": -1},
        {"lambda_attention": float("nan")},
        {"lambda_mlp": float("inf")},
        {"damping": 0.0},
        {"damping": float("nan")},
        {"skip_positions": -1},
        {"skip_positions": True},
    ],
)
def test_option_out_of_range_is_refused_by_name(option):
    with pytest.raises(InputError, match=next(iter(option))):
        CompressionOptions(**option)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "layer-drop", "mlp_budget": 0.5},
        {"method": "empty", "lambda_mlp": 0.1},
        {"method": "magnitude", "channel_score": "token-fisher"},
        {"method": "gradot", "adapter": "own"},
        {"method": "crash", "scaleot": ScaleOTOptions(steps=3)},
    ],
)
def test_option_that_a_method_does_not_read_is_refused(options):
    name = list(options)[1]
    with pytest.raises(InputError, match=f"{name} does nothing in the method"):
        CompressionOptions(**options)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (DistillationOptions, {"steps": 0}),
        (DistillationOptions, {"kd_weight": -1.0}),
        (DistillationOptions, {"lm_weight": 0.0, "kd_weight": 0.0}),
        (DistillationOptions, {"learning_rate": 0.0}),
        (ScaleOTOptions, {"harmonizer_rank": 0}),
        (ScaleOTOptions, {"num_networks": 1}),
        (ScaleOTOptions, {"rank_removed": 1.0}),
    ],
)
def test_nested_option_out_of_range_is_refused_by_name(kind, option):
    with pytest.raises(InputError, match=next(iter(option))):
        kind(**option)


def test_bias_shift_of_a_model_without_biases_is_refused(toy_model, batch):
    model = toy_model(enable_bias=False)
    with pytest.raises(InputError, match="model with biases"):
        run(model, [batch], compensate_attention="bias")


@pytest.mark.parametrize("method", ["gradot", "magnitude"])
def test_scores_that_are_not_finite_are_refused(method, model, batch):
    # Outputs are as they were; squares of the hidden activations are out of range.
    config, params = model
    blocks = params.segments[0]
    fc1 = jax.tree.map(lambda leaf: leaf.at[2].multiply(1e25), blocks.fc1)
    fc2 = blocks.fc2.replace(kernel=blocks.fc2.kernel.at[2].multiply(1e-25))
    broken = params.replace(segments=(blocks.replace(fc1=fc1, fc2=fc2),))
    with pytest.raises(InputError, match=r"layer 2: the scores are not finite"):
        run((config, broken), [batch], method=method, budget=0.5)


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompressionOptions().budget = 0.1
