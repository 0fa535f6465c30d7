import jax
import numpy as np
import pytest

from gradot_jax.evaluation.greedy import Completion, next_tokens

LETTERS = dict(enumerate("abcdefgh"))


def decode(ids):
    return "".join(LETTERS[token] for token in ids)


def complete(tokens, **settings):
    defaults = {"max_tokens": 9, "until": (), "end_id": 7}
    completion = Completion([0, 1], decode=decode, **(defaults | settings))
    for token in tokens:
        assert not completion.done
        completion.append(token)
    return completion


@pytest.mark.parametrize(
    ("tokens", "settings", "text"),
    [
        ([2, 3, 7], {}, "cd"),
        ([2, 3, 4], {"max_tokens": 3}, "cde"),
        ([2, 3, 4], {"until": ("de", "")}, "c"),
        ([2, 3, 4], {"until": ("e", "cde")}, ""),
        ([0, 1, 3], {"until": ("d",)}, "ab"),
    ],
)
def test_a_completion_ends_at_its_first_stop(tokens, settings, text):
    completion = complete(tokens, **settings)
    assert completion.done and completion.text == text


def test_the_prompt_is_no_stop_string():
    completion = complete([2, 3], until=("ab",))
    assert not completion.done and completion.ids == [0, 1, 2, 3]


def test_next_token_follows_the_last_real_one(config, params, log_probabilities):
    ids = np.random.default_rng(0).integers(4, config.vocab_size, (3, 12)).astype(np.int32)
    counts = np.array([1, 5, 12], np.int32)
    expected = [
        log_probabilities(ids[row : row + 1, :count], None)[0, -1].argmax()
        for row, count in enumerate(counts)
    ]
    np.testing.assert_array_equal(next_tokens(config, params, ids, counts), expected)


def test_after_logits_that_are_no_numbers_no_token_follows(config, params):
    lost = jax.tree.map(lambda leaf: leaf * np.float32("nan"), params)
    ids, counts = np.full((3, 12), 4, np.int32), np.array([1, 5, 12], np.int32)
    assert next_tokens(config, lost, ids, counts).tolist() == [-1, -1, -1]
