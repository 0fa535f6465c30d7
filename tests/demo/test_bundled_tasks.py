import json

import numpy as np
import pytest
import tokenizers

from gradot_jax.data.examples import take
from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.demo.bundled_tasks import (
    CALIBRATION_SHARES,
    FINE_TUNING,
    LENGTH,
    calibration_examples,
    load_tasks,
    split_prose,
)
from gradot_jax.demo.corpus import Facts, bundled_facts

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
BOS = 2


@pytest.fixture(scope="module")
def facts():
    people = bundled_facts().syn[: 3 * 380]
    return Facts(api=tuple((f"name{i}", f"module{i % 7}") for i in range(1200)), syn=people)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "Question: Which town does x call home?\nAnswer: What does x do all day? Which creature"
    model.train_from_iterator([text + " belongs to x? Where do I find name module"] * 4, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tasks(tokenizer, facts):
    return load_tasks(tokenizer, facts, ["top", "api", "syn"])


def texts(tokenizer, examples):
    """(prompt, completion) of each row, read back from its tokens."""
    rows = []
    for index in range(len(examples.input_ids)):
        row = take(examples, index)
        counted = row.loss_mask > 0
        prompt = row.input_ids[: np.nonzero(counted)[0][0] + 1]
        assert prompt[0] == BOS and row.attention_mask[counted].all()
        rows.append((tokenizer.decode(prompt[1:]), tokenizer.decode(row.targets[counted])))
    return rows


def parts(task):
    return task.parts.train, task.parts.development, task.parts.test


def test_prose_parts_share_no_document():
    split = split_prose([str(i) for i in range(17)])
    everything = split.train + split.development + split.test
    assert sorted(everything, key=int) == [str(i) for i in range(17)]
    assert (len(split.development), len(split.test)) == (2, 4)


def test_prose_examples_are_whole_windows(tasks):
    assert tasks["top"].metric == "perplexity"
    train, development, test = parts(tasks["top"])
    assert {part.input_ids.shape[1] for part in (train, development, test)} == {LENGTH}
    assert len(test.input_ids) == 120
    assert train.loss_mask.all() and test.attention_mask.all()
    assert train.input_ids[0, 0] == test.input_ids[0, 0] == BOS


def test_api_items_ask_for_the_module_and_parts_share_no_name(tasks, tokenizer, facts):
    assert tasks["api"].metric == "exact_match"
    rows = [texts(tokenizer, part) for part in parts(tasks["api"])]
    assert [len(part) for part in rows] == [600, 210, 390]
    asked = {
        (f"Question: Where do I find {name}?\nAnswer:", f" {module}\n")
        for name, module in facts.api
    }
    assert {row for part in rows for row in part} == asked and len(asked) == 1200


def test_syn_items_ask_for_all_three_attributes_and_parts_share_no_person(tasks, tokenizer, facts):
    rows = [texts(tokenizer, part) for part in parts(tasks["syn"])]
    assert [len(part) for part in rows] == [600, 150, 390]
    answers = {(name, attribute): value for name, attribute, value in facts.syn}
    asked = {}
    for name, _, _ in facts.syn:
        for attribute, question in {
            "city": f"Question: Which town does {name} call home?\nAnswer:",
            "job": f"Question: What does {name} do all day?\nAnswer:",
            "animal": f"Question: Which creature belongs to {name}?\nAnswer:",
        }.items():
            asked[question] = (name, attribute)
    people = []
    for part in rows:
        assert all(answer == f" {answers[asked[question]]}\n" for question, answer in part)
        people.append({asked[question][0] for question, _ in part})
        assert len(part) == len(set(part)) == 3 * len(people[-1])
    assert not people[0] & people[1] and not people[2] & (people[0] | people[1])


def test_tasks_are_the_same_every_time(tasks, tokenizer, facts):
    again = load_tasks(tokenizer, facts, ["syn"])["syn"]
    for one, other in zip(parts(again), parts(tasks["syn"]), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_task_has_settings_and_examples_enough_for_a_batch(tasks):
    assert FINE_TUNING.keys() == tasks.keys()
    for name, task in tasks.items():
        assert len(task.parts.train.input_ids) >= FINE_TUNING[name].batch_size


def test_unknown_tasks_and_too_few_facts_are_refused(tokenizer, facts):
    with pytest.raises(ValueError, match=r"unknown tasks \['nope'\]"):
        load_tasks(tokenizer, facts, ["nope", "api"])
    with pytest.raises(ValueError, match="api: the parts need 1200 names, there are 1199"):
        load_tasks(tokenizer, Facts(facts.api[1:], facts.syn), ["api"])


def test_calibration_draws_windows_of_each_source_by_its_share(tokenizer, facts):
    sources = {"code": "Z" * 3000, "more": "Z" * 2000}
    examples = calibration_examples(tokenizer, facts, num_sequences=400, length=40, sources=sources)
    assert all(field.shape == (400, 40) for field in examples)
    assert np.array_equal(examples.input_ids[:, 1:], examples.targets[:, :-1])
    lines = [tokenizer.decode(row) for row in examples.input_ids]
    shares = {
        "code": np.mean([line.count("Z") > 20 for line in lines]),
        "api": np.mean(["module" in line or "name" in line for line in lines]),
    }
    for source, share in shares.items():
        assert abs(share - CALIBRATION_SHARES[source]) < 0.1


def test_calibration_is_a_function_of_its_seed(tokenizer, facts):
    def draw(seed):
        sources = {"code": "abc " * 500}
        options = {"num_sequences": 8, "length": 20, "sources": sources}
        return calibration_examples(tokenizer, facts, seed=seed, **options).input_ids

    assert np.array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
