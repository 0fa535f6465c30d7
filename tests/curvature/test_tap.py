from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.curvature.tap import (
    BlockTaps,
    InputMoments,
    TappedMaps,
    tap_input,
    tap_output,
    tap_removal,
    zero_input_tap,
    zero_taps,
)
from gradot_jax.linalg.gram import Gram, symmetric, zero_gram
from gradot_jax.nn.layout import Channels, Layout, Site
from gradot_jax.nn.linear import Dense, Linear

D_IN, D_OUT = 4, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, D_IN)).astype(np.float32)
G = RNG.normal(size=(2, 5, D_OUT)).astype(np.float32)
W = RNG.normal(size=(D_IN, D_OUT)).astype(np.float32)
MASK = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])


def tapped(w, x, taps, mask=None):
    return tap_output(jnp.dot(tap_input(x, taps[0], mask), w), taps[1], mask)


def zero_pair():
    return zero_input_tap(D_IN), zero_gram(D_OUT)


def pull(function, g, *args):
    value, vjp = jax.vjp(function, *args)
    return value, vjp(g)


def whole(tree):
    """A tree of cotangents with each `Gram` as the matrix that it stands for."""
    is_gram = lambda node: isinstance(node, Gram)  # noqa: E731
    return jax.tree.map(lambda g: symmetric(g) if is_gram(g) else g, tree, is_leaf=is_gram)


def moments(x, g, weights):
    """Sums over tokens written out, one token at a time, in float64."""
    x, g = x.astype(np.float64).reshape(-1, D_IN), g.astype(np.float64).reshape(-1, D_OUT)
    second = sum(k * np.outer(row, row) for row, k in zip(x, weights.ravel(), strict=True))
    first = sum(k * row for row, k in zip(x, weights.ravel(), strict=True))
    return (second, first), sum(
        k * np.outer(row, row) for row, k in zip(g, weights.ravel(), strict=True)
    )


@pytest.mark.parametrize("dtype", ["int32", "bool", "float32", None])
def test_cotangents_of_taps_are_moments_of_the_tokens_that_count(dtype, assert_close):
    mask = None if dtype is None else jnp.asarray(MASK, dtype)
    weights = np.ones((2, 5)) if dtype is None else MASK
    _, (_, _, taps) = pull(lambda w, x, t: tapped(w, x, t, mask), G, W, X, zero_pair())
    inputs, outputs = moments(X, G, weights)
    assert_close((tuple(whole(taps[0])), whole(taps[1])), (inputs, outputs), "float32")


def test_taps_change_neither_value_nor_gradients():
    value, (dw, dx, _) = pull(tapped, G, W, X, zero_pair())
    plain, (dw_plain, dx_plain) = pull(jnp.dot, G, X, W)[0], pull(jnp.dot, G, X, W)[1][::-1]
    np.testing.assert_array_equal(value, plain)
    np.testing.assert_array_equal(dw, dw_plain)
    np.testing.assert_array_equal(dx, dx_plain)


def test_one_input_tap_serves_several_maps(assert_close):
    def shared(tap):
        x = tap_input(X, tap, None)
        return jnp.dot(x, W), jnp.dot(x, 2 * W), jnp.dot(x, W - 1)

    _, (tap,) = pull(shared, (G, G, G), zero_input_tap(D_IN))
    assert_close(tuple(whole(tap)), moments(X, G, np.ones((2, 5)))[0], "float32")


@pytest.mark.parametrize("remat", [False, True])
def test_scan_sums_over_steps_and_stacks_over_layers(remat, assert_close):
    square = RNG.normal(size=(3, D_IN, D_IN)).astype(np.float32)
    taps = (zero_input_tap(D_IN), zero_gram(D_IN))
    g = RNG.normal(size=X.shape).astype(np.float32)

    def run(taps):
        step = lambda x, w: (jnp.tanh(tapped(w, x, taps)), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(step) if remat else step, X, square)[0]

    def unrolled(*taps):
        x = X
        for w, tap in zip(square, taps, strict=True):
            x = jnp.tanh(tapped(w, x, tap))
        return x

    _, (summed,) = pull(run, g, taps)
    _, per_layer = pull(unrolled, g, taps, taps, taps)
    assert_close(summed, jax.tree.map(lambda *parts: sum(parts), *per_layer), "float32_model")

    def stacked(taps):
        step = lambda x, layer: (jnp.tanh(tapped(layer[0], x, layer[1])), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(step) if remat else step, X, (square, taps))[0]

    per_step = jax.tree.map(lambda tap: jnp.stack([tap] * 3), taps)
    _, (stacks,) = pull(stacked, g, per_step)
    expected = jax.tree.map(lambda *parts: np.stack(parts), *per_layer)
    assert_close(stacks, expected, "float32_model")


def test_vmap_keeps_examples_apart(assert_close):
    each = jax.vmap(lambda x, g: pull(lambda t: tapped(W, x, t), g, zero_pair())[1][0])
    taps = each(X, G)
    for i in range(2):
        inputs, outputs = moments(X[i], G[i], np.ones(5))
        (second, first), gram = whole(jax.tree.map(lambda leaf, i=i: leaf[i], taps))
        assert_close(((second, first), gram), (inputs, outputs), "float32")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype, assert_close):
    # Ones: a sum in the same dtype would stop growing at 256 or 2,048.
    rows = jnp.ones((5_000, D_IN), dtype)
    g = jnp.ones((5_000, D_OUT), dtype)
    _, (tap,) = pull(lambda t: tapped(jnp.ones((D_IN, D_OUT), dtype), rows, t), g, zero_pair())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tap))
    expected = jax.tree.map(lambda leaf: np.full(leaf.shape, 5_000.0), tap)
    assert_close(tap, expected, "float32")


def removal_tapped(w, x, tap, mask=None):
    return jnp.dot(tap_removal(x, tap, mask), w)


@pytest.mark.parametrize("dtype", ["int32", "bool", "float32", None])
def test_cotangent_of_a_removal_tap_is_the_gram_of_first_order_effects(dtype, assert_close):
    mask = None if dtype is None else jnp.asarray(MASK, dtype)
    weights = np.ones((2, 5)) if dtype is None else MASK
    zero = zero_gram(D_IN)
    value, (dw, dx, gram) = pull(lambda w, x, t: removal_tapped(w, x, t, mask), G, W, X, zero)
    expected = np.zeros((D_IN, D_IN))
    for b, t in np.ndindex(2, 5):
        # The gradient of this token's <g, x W> with respect to gates of 1 on its features.
        effect = X[b, t].astype(np.float64) * (W.astype(np.float64) @ G[b, t])
        expected += weights[b, t] * np.outer(effect, effect)
    assert_close(symmetric(gram), expected, "float32")
    plain, (dx_plain, dw_plain) = pull(jnp.dot, G, X, W)
    jax.tree.map(np.testing.assert_array_equal, (value, dw, dx), (plain, dw_plain, dx_plain))


@pytest.mark.parametrize("remat", [False, True])
def test_removal_taps_sum_over_steps_of_a_scan(remat, assert_close):
    square = RNG.normal(size=(3, D_IN, D_IN)).astype(np.float32)
    g = RNG.normal(size=X.shape).astype(np.float32)

    def step(tap):
        return lambda x, w: (jnp.tanh(removal_tapped(w, x, tap)), None)

    def run(tap):
        return jax.lax.scan(jax.checkpoint(step(tap)) if remat else step(tap), X, square)[0]

    def unrolled(*taps):
        x = X
        for w, tap in zip(square, taps, strict=True):
            x, _ = step(tap)(x, w)
        return x

    zero = zero_gram(D_IN)
    _, (summed,) = pull(run, g, zero)
    _, per_layer = pull(unrolled, g, zero, zero, zero)
    assert_close(whole(summed), sum(map(symmetric, per_layer)), "float32_model")


def test_small_effects_of_half_precision_are_not_rounded_to_zero(assert_close):
    x, g = jnp.full((4, D_IN), 1e-4, jnp.float16), jnp.full((4, D_IN), 1e-4, jnp.float16)
    _, (gram,) = pull(lambda t: tap_removal(x, t, None), g, zero_gram(D_IN))
    rows = np.asarray(x, np.float64) * np.asarray(g, np.float64)
    gram = symmetric(gram)
    assert gram.dtype == jnp.float32
    assert_close(gram, rows.T @ rows, "float32")


@flax.struct.dataclass
class GatedBlock:
    """An MLP whose channels two maps go into, both from one input."""

    layout: ClassVar[Layout] = Layout(
        sites=(
            Site("gate", "mlp", "gate", "column"),
            Site("up", "mlp", "up", "column"),
            Site("down", "hidden", "down", "row"),
        ),
        channels=Channels(into=("gate", "up"), out="down"),
        norms=(),
    )

    gate: Linear
    up: Linear
    down: Linear


GATED = GatedBlock(
    *(
        Dense(RNG.normal(size=shape).astype(np.float32), None)
        for shape in ((D_IN, 6), (D_IN, 6), (6, D_OUT))
    )
)


def gated(x, taps, mask=None):
    """Applies `GATED` as a family does."""
    maps = TappedMaps(GATED, mask, taps)
    x = maps.read("mlp", x)
    hidden = maps.remove(jax.nn.silu(maps.apply("gate", x)) * maps.apply("up", x))
    return maps.apply("down", maps.read("hidden", hidden))


def test_taps_of_a_block_fit_its_layout_and_are_those_asked_for():
    taps = zero_taps(GATED, with_removals=True)
    widths = {name: moments.first.shape for name, moments in taps.inputs.items()}
    assert widths == {"mlp": (D_IN,), "hidden": (6,)}
    outputs = {site: symmetric(tap).shape for site, tap in taps.outputs.items()}
    assert outputs == {"gate": (6, 6), "up": (6, 6), "down": (D_OUT, D_OUT)}
    assert symmetric(taps.removals).shape == (6, 6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(taps))
    assert zero_taps(GATED).removals is None
    assert zero_taps(GATED, with_outputs=False).outputs is None


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("removals", [True, False])
def test_cotangents_of_a_blocks_taps_are_those_of_its_maps(outputs, removals, assert_close):
    zeros = zero_taps(GATED, with_outputs=outputs, with_removals=removals)
    value, (got,) = pull(lambda taps: gated(X, taps, jnp.asarray(MASK)), G, zeros)
    np.testing.assert_array_equal(value, gated(X, None))

    # One step at a time in float64, and its way back.
    x, g, counted = X.astype(np.float64), G.astype(np.float64), MASK[..., None] > 0
    gate, up, down = (np.asarray(kernel, np.float64) for kernel in jax.tree.leaves(GATED))
    a, b = x @ gate, x @ up
    slope = 1 / (1 + np.exp(-a))
    hidden = a * slope * b
    back = g @ down.T
    of_gate, of_up = back * b * slope * (1 + a * (1 - slope)), back * a * slope

    def gram(rows):
        return np.einsum("btd,bte->de", rows, rows)

    def moments(rows):
        return InputMoments(gram(rows * counted), (rows * counted).sum((0, 1)))

    expected = BlockTaps(
        inputs={"mlp": moments(x), "hidden": moments(hidden)},
        outputs={
            site: gram(rows * counted)
            for site, rows in {"gate": of_gate, "up": of_up, "down": g}.items()
        }
        if outputs
        else None,
        removals=gram(hidden * back * counted) if removals else None,
    )
    assert_close(value, hidden @ down, "float32")
    assert_close(whole(got), expected, "float32")
