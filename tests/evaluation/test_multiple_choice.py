import json

import numpy as np
import pytest
import tokenizers

from gradot_jax.data.records import Choice, ChoiceRecords
from gradot_jax.data.tokenizer import encode, load_tokenizer
from gradot_jax.errors import InputError
from gradot_jax.evaluation.multiple_choice import multiple_choice
from gradot_jax.evaluation.scores import sequence_scores

CHOICES = (("a", "bcd"), ("mat", "log", "dog x"), ("yes", "no"), ("</s>", "b"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(specials)
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def likelihoods(config, tokenizer, log_probabilities):
    """Log-likelihood of each choice, one unpadded sequence at a time."""

    def score(choice):
        context = [config.bos_token_id, *encode(tokenizer, "Question: q?\nAnswer:")]
        answer = encode(tokenizer, f" {choice}")
        ids = np.array([context + answer], np.int32)
        table = log_probabilities(ids[:, :-1], None)[0]
        return sum(table[len(context) - 1 + offset, token] for offset, token in enumerate(answer))

    return [[score(choice) for choice in choices] for choices in CHOICES]


def records(answers):
    items = zip(CHOICES, answers, strict=True)
    return ChoiceRecords(tuple(Choice("q?", choices, answer) for choices, answer in items), "q")


@pytest.mark.parametrize("batch_size", [2, 16])
def test_accuracy_is_that_of_the_likeliest_answer(
    config, params, tokenizer, likelihoods, batch_size
):
    best = [int(np.argmax(row)) for row in likelihoods]
    answers = [*best[:3], 1 - best[3]]
    result = multiple_choice(config, params, tokenizer, records(answers), batch_size=batch_size)
    assert result.accuracy == 3 / 4
    assert (result.num_items, result.num_truncated) == (4, 0)
    gold = [row[answer] for row, answer in zip(likelihoods, answers, strict=True)]
    np.testing.assert_allclose(result.log_likelihood, np.mean(gold), rtol=1e-6)


def test_normalised_accuracy_divides_by_characters(config, params, tokenizer, likelihoods):
    plain = [int(np.argmax(row)) for row in likelihoods]
    per_character = [
        int(np.argmax(np.array(row) / [len(choice) for choice in choices]))
        for row, choices in zip(likelihoods, CHOICES, strict=True)
    ]
    assert plain != per_character
    result = multiple_choice(config, params, tokenizer, records(per_character), batch_size=9)
    assert result.accuracy_normalised == 1.0
    agreeing = sum(a == b for a, b in zip(plain, per_character, strict=True))
    assert result.accuracy == agreeing / 4


def test_questions_are_cut_to_the_length_and_counted(config, params, tokenizer):
    result = multiple_choice(
        config, params, tokenizer, records([0, 0, 0, 0]), batch_size=9, max_length=16
    )
    assert result.num_truncated == 9
    with pytest.raises(InputError, match="q record 2: its completion has 6 tokens"):
        multiple_choice(
            config, params, tokenizer, records([0, 0, 0, 0]), batch_size=9, max_length=5
        )


def test_evaluation_compiles_once(config, params, tokenizer):
    before = sequence_scores._cache_size()
    multiple_choice(config, params, tokenizer, records([0, 0, 0, 0]), batch_size=5)
    assert sequence_scores._cache_size() == before + 1
