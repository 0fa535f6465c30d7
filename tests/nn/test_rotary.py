import math

import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.nn.rotary import Rotary, frequencies, rotate

KINDS = {
    "default": Rotary(128, 8192, rope_theta=500_000.0),
    "linear": Rotary(64, 2048, "linear", factor=4.0),
    "dynamic": Rotary(64, 2048, "dynamic", factor=2.0),
    "llama3": Rotary(128, 8192, "llama3", 500_000.0, 8.0, 1.0, 4.0),
    "yarn": Rotary(128, 32_768, "yarn", 1_000_000.0, 4.0),
    "yarn, not truncated": Rotary(64, 4096, "yarn", factor=16.0, truncate=False),
    "yarn, other bounds": Rotary(32, 64, "yarn", 500.0, 3.0, beta_fast=8.0, beta_slow=0.5),
}
RNG = np.random.default_rng(0)
B, T, HEADS, SIZE = 2, 6, 3, 8
X = RNG.normal(size=(B, T, HEADS * SIZE)).astype(np.float32)
PLAIN = Rotary(SIZE, 16)


def written_out(rotary, length):
    """Plane by plane from the formulas, in float64."""
    size, trained, factor = rotary.head_dim, rotary.original_max_position_embeddings, rotary.factor
    theta, planes = rotary.rope_theta, []
    if rotary.rope_type == "dynamic" and length > trained:
        theta *= (factor * length / trained - factor + 1) ** (size / (size - 2))
    # The plane, maybe between two, that turns so often in P tokens.
    fast, slow = (
        size / 2 * np.log(trained / (2 * np.pi * turns)) / np.log(theta)
        for turns in (rotary.beta_fast, rotary.beta_slow)
    )
    if rotary.truncate:
        fast, slow = np.floor(fast), np.ceil(slow)
    fast, slow = max(fast, 0), min(slow, size - 1)
    for i in range(size // 2):
        plain = theta ** (-2 * i / size)
        wavelength = 2 * np.pi / plain
        if rotary.rope_type == "linear":
            plain = plain / factor
        elif rotary.rope_type == "llama3":
            low, high = rotary.low_freq_factor, rotary.high_freq_factor
            if wavelength > trained / low:
                plain = plain / factor
            elif wavelength > trained / high:
                kept = (trained / wavelength - low) / (high - low)
                plain = (1 - kept) * plain / factor + kept * plain
        elif rotary.rope_type == "yarn":
            if i >= slow:
                plain = plain / factor
            elif i > fast:
                stretched = (i - fast) / (slow - fast)
                plain = stretched * plain / factor + (1 - stretched) * plain
        planes.append(plain)
    return np.array(planes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [1, 3])
def test_frequencies_are_those_of_the_formulas(kind, times):
    rotary = KINDS[kind]
    length = times * rotary.original_max_position_embeddings
    got = frequencies(rotary, length)
    assert got.dtype == np.float32 and got.shape == (rotary.head_dim // 2,)
    np.testing.assert_allclose(got, written_out(rotary, length), rtol=4e-6)


@pytest.mark.parametrize("kind", ["llama3", "yarn", "yarn, not truncated"])
def test_a_stretched_embedding_keeps_fast_planes_divides_slow_ones_and_orders_the_rest(kind):
    rotary = KINDS[kind]
    plain = frequencies(rotary._replace(rope_type="default"), 1)
    share = frequencies(rotary, 1) / plain
    turns = rotary.original_max_position_embeddings * plain / (2 * math.pi)
    llama = rotary.rope_type == "llama3"
    slow, fast = (
        (rotary.low_freq_factor, rotary.high_freq_factor)
        if llama
        else (rotary.beta_slow / 1.5, rotary.beta_fast * 1.5)
    )
    np.testing.assert_allclose(share[turns > fast], 1, rtol=1e-6)
    np.testing.assert_allclose(share[turns < slow], 1 / rotary.factor, rtol=1e-6)
    between = share[(share < 0.999) & (share > 1.001 / rotary.factor)]
    assert len(between) > 2 and (np.diff(share) <= 1e-6).all()


def test_a_dynamic_embedding_is_plain_up_to_the_trained_length_and_slower_beyond():
    rotary = KINDS["dynamic"]
    plain = frequencies(rotary._replace(rope_type="default"), 1)
    for length in (1, 2047, 2048):
        np.testing.assert_array_equal(frequencies(rotary, length), plain)
    beyond = [frequencies(rotary, length) for length in (2049, 4096, 8192)]
    for before, after in zip([plain, *beyond], beyond, strict=False):
        # The first plane turns a radian a token whatever the base.
        assert after[0] == before[0] == 1 and (after[1:] < before[1:]).all()


def test_the_length_of_a_dynamic_embedding_is_that_of_the_sequence(assert_close):
    rotary, longer = Rotary(SIZE, 4, "dynamic", factor=2.0), X.repeat(2, axis=1)
    # The plain embedding of the base that this length asks for.
    theta = rotary.rope_theta * (2 * 12 / 4 - 1) ** (SIZE / (SIZE - 2))
    assert_close(
        rotate(rotary, longer), rotate(Rotary(SIZE, 4, rope_theta=theta), longer), "float32"
    )
    short = longer[:, :4]
    np.testing.assert_array_equal(rotate(rotary, short), rotate(Rotary(SIZE, 4), short))


@pytest.mark.parametrize("positions", [None, RNG.integers(0, 16, (B, T))])
@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_each_plane_of_each_head_is_turned_by_its_angle(positions, factor, assert_close):
    rotary = PLAIN._replace(attention_factor=factor)
    at = np.arange(T)[None].repeat(B, 0) if positions is None else positions
    halves = X.astype(np.float64).reshape(B, T, HEADS, 2, SIZE // 2)
    # A plane is a complex number: feature i and feature i + K/2.
    turn = factor * np.exp(1j * at[..., None, None] * written_out(rotary, T))
    turned = (halves[..., 0, :] + 1j * halves[..., 1, :]) * turn
    expected = np.stack([turned.real, turned.imag], axis=3).reshape(X.shape)
    given = None if positions is None else jnp.asarray(positions)
    assert_close(rotate(rotary, X, given), expected, "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_turning_keeps_the_length_of_each_head(kind, assert_close):
    rotary = KINDS[kind]
    x = RNG.normal(size=(1, 5, 2 * rotary.head_dim)).astype(np.float32)
    positions = jnp.asarray([[0, 1, 17, 400, 1999]])
    before, after = (
        np.linalg.norm(np.asarray(a, np.float64).reshape(5, 2, -1), axis=-1)
        for a in (x, rotate(rotary, x, positions))
    )
    assert_close(after, before, "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_queries_and_keys_depend_on_their_distance_alone(kind):
    rotary = KINDS[kind]
    query, key = RNG.normal(size=(2, rotary.head_dim)).astype(np.float32)
    at = np.array([0, 1, 30, 200])

    def turned(vector, positions):
        rows = np.broadcast_to(vector, (1, len(positions), rotary.head_dim))
        return np.asarray(rotate(rotary, rows, jnp.asarray(positions)[None]), np.float64)[0]

    near, far = ((turned(query, at + d) * turned(key, at)).sum(-1) for d in (3, 9))
    scale = np.linalg.norm(query) * np.linalg.norm(key)
    # An angle of 200 radians is known to 1e-5.
    np.testing.assert_allclose(near, near[0], atol=5e-5 * scale)
    np.testing.assert_allclose(far, far[0], atol=5e-5 * scale)
    assert abs(near[0] - far[0]) > 1e-3 * scale


def test_the_first_token_is_not_turned():
    np.testing.assert_array_equal(rotate(PLAIN, X[:, :1]), X[:, :1])


def test_padding_before_the_first_token_stays_finite():
    assert np.isfinite(rotate(PLAIN, X, jnp.full((B, T), -1))).all()


def test_half_precision_stays_half_precision_at_angles_of_float32(assert_close):
    late = jnp.full((B, T), 1001)
    got = rotate(PLAIN, jnp.asarray(X, jnp.bfloat16), late)
    assert got.dtype == jnp.bfloat16
    # Of eight significant bits, 1,001 would be 1,000.
    assert_close(got.astype(jnp.float32), rotate(PLAIN, X, late), "bfloat16")
