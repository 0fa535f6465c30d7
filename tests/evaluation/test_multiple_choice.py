import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from gradot_jax.data.records import Choice, ChoiceRecords, Item, ItemRecords
from gradot_jax.data.tokenizer import encode, load_tokenizer
from gradot_jax.errors import InputError
from gradot_jax.evaluation.multiple_choice import accepted_match, multiple_choice, tokenise
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


@pytest.fixture
def partly_diverged(config, params, tokenizer):
    """NaN for the longest answer of `CHOICES` alone, which is the third of the second item."""
    prompt = len(encode(tokenizer, "Question: q?\nAnswer:"))
    last = prompt + len(" dog x")
    table = params.shell.embed_positions.at[last + 1].set(jnp.nan)
    return params.replace(shell=params.shell.replace(embed_positions=table))


def test_a_diverged_model_prefers_no_answer(config, partly_diverged, tokenizer):
    result = multiple_choice(
        config, partly_diverged, tokenizer, records([0, 0, 0, 0]), batch_size=4
    )
    assert np.isnan(result.accuracy) and np.isnan(result.accuracy_normalised)
    assert np.isfinite(result.log_likelihood) and result.num_items == 4


def test_a_diverged_model_matches_nothing_that_could_be_counted(config, partly_diverged, tokenizer):
    for answers, counted in (([0, 0, 0, 0], False), ([0, 2, 0, 0], True)):
        questions = tokenise(config, tokenizer, as_items(answers))
        result = accepted_match(config, partly_diverged, questions, batch_size=4)
        assert np.isnan(result.exact_match) == np.isnan(result.log_likelihood) == counted


def test_evaluation_compiles_once(config, params, tokenizer):
    before = sequence_scores._cache_size()
    multiple_choice(config, params, tokenizer, records([0, 0, 0, 0]), batch_size=5)
    assert sequence_scores._cache_size() == before + 1


def as_items(answers):
    return ItemRecords(records(answers).items, "items")


def test_verbatim_items_score_as_the_choices_they_spell_out(config, params, tokenizer):
    answers = [1, 2, 0, 1]
    expected = multiple_choice(config, params, tokenizer, records(answers), batch_size=9)
    assert multiple_choice(config, params, tokenizer, as_items(answers), batch_size=9) == expected


def test_any_accepted_continuation_is_right(config, params, tokenizer, likelihoods):
    items = tuple(item._replace(accepted=(1, 0)) for item in as_items([0, 0, 0, 0]).records)
    result = multiple_choice(config, params, tokenizer, ItemRecords(items, "i"), batch_size=9)
    likeliest = [max(row[:2]) for row in likelihoods]
    assert result.accuracy == np.mean([max(row) == max(row[:2]) for row in likelihoods])
    np.testing.assert_allclose(result.log_likelihood, np.mean(likeliest), rtol=1e-6)


def test_without_bos_the_prompt_begins_by_itself(config, params, tokenizer, log_probabilities):
    def score(choice):
        context = encode(tokenizer, "Question: q?\nAnswer:")
        answer = encode(tokenizer, f" {choice}")
        table = log_probabilities(np.array([(context + answer)[:-1]], np.int32), None)[0]
        return sum(table[len(context) - 1 + i, token] for i, token in enumerate(answer))

    answers = [0, 1, 0, 1]
    result = multiple_choice(config, params, tokenizer, as_items(answers), batch_size=9, bos=False)
    gold = [score(choices[answer]) for choices, answer in zip(CHOICES, answers, strict=True)]
    np.testing.assert_allclose(result.log_likelihood, np.mean(gold), rtol=1e-6)


def test_an_alias_that_greedy_decoding_gives_is_a_match(
    config, params, tokenizer, log_probabilities
):
    characters = [chr(byte) for byte in range(33, 127)]

    def after(prompt):
        """Log-probability of each character; the vocabulary is of bytes."""
        ids = np.array([[config.bos_token_id, *encode(tokenizer, prompt)]], np.int32)
        table = log_probabilities(ids, None)[0, -1]
        return table, {text: table[encode(tokenizer, text)[0]] for text in characters}

    items, gold = [], []
    for prompt in characters:
        table, scores = after(prompt)
        best, worst = max(scores, key=scores.get), min(scores, key=scores.get)
        if scores[best] == table.max():
            accepted = (0,) if len(items) % 2 else (0, 1)
            items.append(Item(prompt, (worst, best), accepted))
            gold.append(scores[best] if 1 in accepted else scores[worst])
    records = ItemRecords(tuple(items), "items")
    questions = tokenise(config, tokenizer, records)
    result = accepted_match(config, params, questions, batch_size=32)
    assert result.num_examples == len(items) >= 2
    assert result.exact_match == sum(1 in item.accepted for item in items) / len(items)
    np.testing.assert_allclose(result.log_likelihood, np.mean(gold), rtol=1e-6)
