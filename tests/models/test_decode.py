"""Decoding with a cache against reading the whole sequence anew for every token."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.decode import Sampling, decode, longest_cached, nucleus, prefill
from gradot_jax.models.params import Params, Shared, slice_blocks
from gradot_jax.models.partition import shard_params
from gradot_jax.models.run import forward
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.nn.linear import Dense
from gradot_jax.parallel import make_mesh, put

FOLDER = Path(__file__).parent
VARIANTS = ("opt/golden/pre_ln", "opt/golden/post_ln_projection", "llama/golden/llama_dynamic")
VARIANTS += ("llama/golden/llama_yarn", "llama/golden/qwen2_window", "llama/golden/qwen3_window")
COUNTS = np.array([1, 6, 3])
KEYS = jax.random.split(jax.random.key(0), len(COUNTS))


def written(config, params, steps, **settings):
    """Prompts, the tokens that follow, and the logits after them."""
    ids = np.random.default_rng(1).integers(4, config.vocab_size, (len(COUNTS), 6))
    capacity = int(COUNTS.max()) + steps
    decoding = prefill(config, params, jnp.asarray(ids), jnp.asarray(COUNTS), capacity=capacity)
    decoding, tokens = decode(config, params, decoding, KEYS, steps=steps, **settings)
    return ids, np.asarray(tokens), np.asarray(decoding.logits)


def check(config, params, steps, assert_close):
    ids, tokens, logits = written(config, params, steps)
    for row, count in enumerate(COUNTS):
        sequence = list(ids[row, :count])
        for token in tokens[row]:
            expected = forward(config, params, np.array([sequence]))[0, -1]
            assert int(expected.argmax()) == token
            sequence.append(int(token))
        last = forward(config, params, np.array([sequence]))[0, -1]
        assert_close(logits[row], last, "float32_model")


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_logits_are_those_of_the_whole_sequence(variant, assert_close):
    config, params = load_model(FOLDER / variant)
    steps = min(6, longest_cached(config) - int(COUNTS.max()))
    check(config, params, steps, assert_close)


def test_an_emulator_with_shared_blocks_and_harmonizers_is_decoded_as_it_runs(assert_close):
    config, params = load_model(FOLDER / "llama/golden/llama_grouped")
    (stack,) = params.segments
    rng, width = np.random.default_rng(0), config.hidden_size
    kernels = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, width, 3), (1, 3, width)))
    biases = jnp.zeros((1, 3)), jnp.zeros((1, width))
    harmonizer = Harmonizer(*map(Dense, kernels, biases))
    middle = Shared(slice_blocks(stack, 0, 2), (1, 0, 1))
    check(config, Params(params.shell, (stack, harmonizer, middle)), 6, assert_close)


def test_a_model_on_a_mesh_writes_the_same(assert_close):
    config, params = load_model(FOLDER / "llama/golden/qwen3")
    mesh = make_mesh(1, 2)
    sharded = shard_params(params, mesh)
    ids, tokens, logits = written(config, params, 5)
    placed = put((ids, COUNTS), mesh.batched)
    decoding = prefill(config, sharded, *placed, capacity=11)
    decoding, got = decode(config, sharded, decoding, KEYS, steps=5)
    np.testing.assert_array_equal(got, tokens)
    assert_close(decoding.logits, logits, "float32_model")


def test_a_row_does_not_depend_on_its_neighbours():
    config, params = load_model(FOLDER / "llama/golden/mistral")
    ids, tokens, _ = written(config, params, 8, sampling=Sampling(1.0, 0.9))
    alone = prefill(config, params, jnp.asarray(ids[1:2]), jnp.asarray(COUNTS[1:2]), capacity=20)
    _, got = decode(config, params, alone, KEYS[1:2], sampling=Sampling(1.0, 0.9), steps=8)
    np.testing.assert_array_equal(got[0], tokens[1])


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-50, [2]), (0.5, [2]), (0.7, [0, 2]), (0.85, [0, 2, 3]), (1, range(4))]
)
def test_a_nucleus_is_the_fewest_likeliest_tokens_that_reach_the_share(top_p, kept):
    logits = jnp.log(jnp.array([[0.2, 0.1, 0.55, 0.15]]))
    got = np.asarray(nucleus(logits, top_p))[0]
    assert np.flatnonzero(np.isfinite(got)).tolist() == list(kept)
    np.testing.assert_allclose(got[list(kept)], np.asarray(logits)[0, list(kept)])


def test_draws_have_the_probabilities_of_the_logits_at_their_temperature():
    config, params = load_model(FOLDER / "llama/golden/llama_tied")
    number = 4096
    ids, counts = jnp.full((number, 1), 5), jnp.ones(number, jnp.int32)
    keys = jax.random.split(jax.random.key(3), number)
    decoding = prefill(config, params, ids, counts, capacity=2)
    expected = jax.nn.softmax(decoding.logits[0] / 3)
    _, tokens = decode(config, params, decoding, keys, sampling=Sampling(3.0), steps=1)
    shares = np.bincount(tokens[:, 0], minlength=config.vocab_size) / number
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / number))
