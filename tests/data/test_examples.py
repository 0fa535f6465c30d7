import itertools

import numpy as np
import pytest

from gradot_jax.data.examples import (
    choice_examples,
    epoch_batches,
    eval_batches,
    line_examples,
    prompt_examples,
    take,
    text_examples,
    token_stream,
)
from gradot_jax.data.records import Choice, ChoiceRecords, Item, ItemRecords, Prompt, PromptRecords
from gradot_jax.data.tokenizer import encode
from gradot_jax.errors import InputError
from gradot_jax.nn.batch import Batch

BOS, EOS = 2, 3
TEXTS = ["the cat sat", "", "on the mat</s>", "the dog"]


def numbered(count, length=3):
    """Examples whose tokens are their own row number."""
    ids = np.repeat(np.arange(count, dtype=np.int32)[:, None], length, axis=1)
    return Batch(ids, ids, np.ones((count, length), np.float32), np.ones_like(ids))


def rows_of(batches):
    return [batch.input_ids[:, 0].tolist() for batch in batches]


def prompts(*pairs):
    return PromptRecords(tuple(Prompt(*pair) for pair in pairs), "data.jsonl")


def test_each_document_begins_with_bos_and_bos_occurs_nowhere_else(tokenizer):
    stream = token_stream(tokenizer, TEXTS, BOS)
    expected = [[BOS, *encode(tokenizer, text)] for text in TEXTS if text]
    assert stream.tolist() == list(itertools.chain(*expected))
    assert (stream == BOS).sum() == 3


@pytest.mark.parametrize("length", [1, 3, 4])
def test_windows_partition_the_stream(tokenizer, length):
    stream = token_stream(tokenizer, TEXTS, BOS).tolist()
    examples = text_examples(tokenizer, TEXTS, length, BOS)
    start, expected = 0, []
    while start + length + 1 <= len(stream):
        expected.append((stream[start : start + length], stream[start + 1 : start + length + 1]))
        start += length + 1
    assert examples.input_ids.tolist() == [inputs for inputs, _ in expected]
    assert examples.targets.tolist() == [targets for _, targets in expected]
    assert examples.loss_mask.dtype == np.float32 and examples.loss_mask.all()
    assert examples.attention_mask.all()
    assert all(field.shape == (len(expected), length) for field in examples)


def test_the_shortest_text_makes_one_window_and_a_shorter_one_is_refused(tokenizer):
    length = len(encode(tokenizer, "the cat"))
    assert len(text_examples(tokenizer, ["the cat"], length, BOS).input_ids) == 1
    with pytest.raises(InputError, match=rf"shorter than one sequence.*{length + 1} tokens"):
        text_examples(tokenizer, ["the cat"], length + 1, BOS)
    with pytest.raises(InputError, match="shorter than one sequence: it has 0 tokens"):
        text_examples(tokenizer, [""], 4, BOS)


@pytest.mark.parametrize("eos", [None, EOS])
def test_prompt_rows_equal_a_naive_loop(tokenizer, eos):
    records = prompts(("the cat", " sat on"), ("", "</s>a"), ("the dog sat on the", " log"))
    examples, cuts = prompt_examples(tokenizer, records, BOS, 64, eos_id=eos)
    assert cuts == 0
    for row, (prompt, completion) in enumerate(records.records):
        context = [BOS, *encode(tokenizer, prompt)]
        answer = encode(tokenizer, completion) + ([] if eos is None else [eos])
        tokens = context + answer
        for position in range(examples.input_ids.shape[1]):
            real = position + 1 < len(tokens)
            assert examples.attention_mask[row, position] == real
            assert examples.loss_mask[row, position] == (real and position + 1 >= len(context))
            if real:
                assert examples.input_ids[row, position] == tokens[position]
                assert examples.targets[row, position] == tokens[position + 1]


def test_rows_are_padded_to_a_multiple_of_eight_within_the_limit(tokenizer):
    pairs = prompts(("the cat sat on the mat", " and the dog"), ("a", "b"))
    longest = len(encode(tokenizer, "the cat sat on the mat") + encode(tokenizer, " and the dog"))
    padded = prompt_examples(tokenizer, pairs, BOS, 64)[0].input_ids.shape[1]
    assert padded % 8 == 0 and longest <= padded < longest + 8
    assert prompt_examples(tokenizer, pairs, BOS, longest)[0].input_ids.shape == (2, longest)


def test_a_long_prompt_loses_its_beginning_but_not_bos_nor_completion(tokenizer):
    prompt, completion = "the cat sat on the mat", " and the dog"
    answer = encode(tokenizer, completion)
    limit = len(answer) + 2
    examples, cuts = prompt_examples(tokenizer, prompts((prompt, completion)), BOS, limit)
    tokens = [BOS, *encode(tokenizer, prompt)[-2:], *answer]
    assert cuts == 1
    assert examples.input_ids.tolist() == [tokens[:-1]]
    assert examples.targets.tolist() == [tokens[1:]]
    assert examples.loss_mask.sum() == len(answer)


def test_a_completion_beyond_the_limit_is_refused_with_its_place(tokenizer):
    records = prompts(("a", "b"), ("the", " cat sat on the mat"))
    limit = len(encode(tokenizer, " cat sat on the mat"))
    examples, cuts = prompt_examples(tokenizer, records, BOS, limit)
    assert cuts == 1 and examples.loss_mask[1].all()
    with pytest.raises(InputError, match=f"data.jsonl record 2: its completion has {limit}"):
        prompt_examples(tokenizer, records, BOS, limit - 1)


def test_choice_rows_are_the_prompts_of_each_choice_in_order(tokenizer):
    items = (Choice("the cat?", ("mat", "log", "dog"), 0), Choice("the dog?", ("a", "b"), 1))
    got, cuts = choice_examples(tokenizer, ChoiceRecords(items, "data.jsonl"), BOS, 64)
    pairs = [
        (f"Question: {item.question}\nAnswer:", f" {c}") for item in items for c in item.choices
    ]
    expected, _ = prompt_examples(tokenizer, prompts(*pairs), BOS, 64)
    assert cuts == 0
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(InputError, match=r"data\.jsonl record 2: its completion has 2 tokens"):
        choice_examples(tokenizer, ChoiceRecords(items, "data.jsonl"), BOS, 1)


def test_items_are_taken_as_they_are(tokenizer):
    pairs = [("the cat", "sat"), ("the cat", " on  "), ("a\n", "the dog")]
    items = (Item("the cat", ("sat", " on  "), (0, 1)), Item("a\n", ("the dog",), (0,)))
    got, cuts = choice_examples(tokenizer, ItemRecords(items, "items"), BOS, 64)
    expected, _ = prompt_examples(tokenizer, prompts(*pairs), BOS, 64)
    assert cuts == 0
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_prompt_without_bos_begins_with_its_own_first_token(tokenizer):
    prompt, answer = (encode(tokenizer, text) for text in ("the cat sat", " on the mat"))
    records = ItemRecords((Item("the cat sat", (" on the mat",), (0,)),), "items")
    tokens = prompt + answer
    for limit in (64, len(tokens) - 1, len(tokens) - 2, len(answer)):
        examples, cuts = choice_examples(tokenizer, records, None, limit)
        row = tokens[-(limit + 1) :]
        used = len(row) - 1
        assert cuts == (len(tokens) > limit + 1)
        assert examples.input_ids[0, :used].tolist() == row[:-1]
        assert examples.targets[0, :used].tolist() == row[1:]
        assert examples.attention_mask.sum() == used
        assert examples.loss_mask[0, :used].sum() == len(answer) == examples.loss_mask.sum()
    with pytest.raises(InputError, match=rf"items record 1: its completion has {len(answer)} tok"):
        choice_examples(tokenizer, records, None, len(answer) - 1)
    empty = ItemRecords((Item("", (" on",), (0,)),), "items")
    with pytest.raises(InputError, match="items record 1: no token precedes its completion"):
        choice_examples(tokenizer, empty, None, 8)


def test_windows_of_lines_stay_within_their_group(tokenizer):
    lines = ["the cat sat on the mat", "", "the dog", "a", "the dog sat on the log"]
    examples = line_examples(tokenizer, lines, 3, BOS, num_groups=2)
    expected = []
    for group in (lines[:3], lines[3:]):
        stream = [token for line in group for token in (BOS, *encode(tokenizer, line))]
        expected += [stream[i : i + 4] for i in range(0, len(stream) - 3, 4)]
    assert examples.input_ids.tolist() == [row[:-1] for row in expected]
    assert examples.targets.tolist() == [row[1:] for row in expected]
    with pytest.raises(InputError, match="shorter than one sequence: it has 1 tokens"):
        line_examples(tokenizer, ["", ""], 1, BOS, num_groups=3)


def test_an_epoch_visits_distinct_examples_and_the_next_in_another_order():
    rows = rows_of(itertools.islice(epoch_batches(numbered(11), 3, seed=5), 6))
    assert all(len(batch) == 3 for batch in rows)
    first, second = (list(itertools.chain(*epoch)) for epoch in (rows[:3], rows[3:]))
    assert len(set(first)) == len(set(second)) == 9
    assert first != second


def test_batches_depend_on_seed_and_step_alone():
    def run(seed, start=0):
        return rows_of(
            itertools.islice(epoch_batches(numbered(11), 3, seed=seed, start_step=start), 8)
        )

    assert run(0) == run(0) != run(1)
    for start in (1, 2, 3, 5, 7):
        assert run(0)[start:] == run(0, start)[: 8 - start]


def test_the_order_of_a_seed_is_fixed_for_good():
    assert rows_of(itertools.islice(epoch_batches(numbered(6), 6, seed=0), 2)) == [
        [0, 2, 1, 5, 4, 3],
        [5, 3, 2, 4, 1, 0],
    ]


def test_all_fields_of_an_example_stay_together():
    examples = numbered(6)
    examples = examples._replace(loss_mask=examples.input_ids.astype(np.float32))
    batch = next(epoch_batches(examples, 4, seed=0))
    assert np.array_equal(batch.loss_mask, batch.input_ids)
    assert np.array_equal(batch.targets, batch.input_ids)


def test_a_batch_as_large_as_the_data_is_fine_and_a_larger_one_is_refused():
    assert sorted(next(epoch_batches(numbered(4), 4, seed=0)).input_ids[:, 0]) == [0, 1, 2, 3]
    with pytest.raises(InputError, match="batch of 5 needs as many examples, there are 4"):
        epoch_batches(numbered(4), 5, seed=0)
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        epoch_batches(numbered(4), 0, seed=0)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7])
def test_evaluation_counts_each_example_once_in_order_and_in_equal_shapes(batch_size):
    batches = list(eval_batches(numbered(5), batch_size))
    assert {batch.input_ids.shape for batch in batches} == {(batch_size, 3)}
    assert {batch.loss_mask.dtype for batch in batches} == {np.dtype(np.float32)}
    counted = [batch.input_ids[batch.loss_mask.any(axis=1), 0].tolist() for batch in batches]
    assert list(itertools.chain(*counted)) == [0, 1, 2, 3, 4]


def test_evaluation_refuses_no_examples_and_no_batch():
    with pytest.raises(InputError, match="no examples"):
        eval_batches(take(numbered(2), slice(0, 0)), 2)
    with pytest.raises(InputError, match="batch_size"):
        eval_batches(numbered(2), -1)
