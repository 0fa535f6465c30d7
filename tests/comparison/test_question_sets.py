import json

import datasets
import jax
import numpy as np
import pytest
import tokenizers

from gradot_jax.comparison.question_sets import question_tasks, question_testbed
from gradot_jax.data.records import Item, ItemRecords
from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.errors import InputError
from gradot_jax.evaluation.multiple_choice import multiple_choice
from gradot_jax.nn.batch import Batch

WORDS = "the cat dog sat ran on under a mat log and then home it was red green big old".split()
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
CHANGES = {"steps": 7, "batch_size": 3, "learning_rate": 1e-3, "warmup": 4}


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """Builds a tokenizer of words in a given order."""

    def build(words):
        ids = {word: number for number, word in enumerate([*SPECIALS, *words])}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        folder = tmp_path_factory.mktemp("tokenizer")
        made.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(folder)

    return build


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of):
    return tokenizer_of(WORDS)


@pytest.fixture(scope="module")
def model(toy_model):
    return toy_model(vocab_size=len(SPECIALS + WORDS), max_position_embeddings=32)


def choice(word, key="B"):
    choices = {"text": ["red", "old"], "label": ["A", "B"]}
    return {"question_stem": f"the {word} is", "choices": choices, "answerKey": key}


@pytest.fixture
def write(tmp_path):
    """Writes the splits of a task into a folder of its name, and gives the folder above."""

    def write(name, train, report=None):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", train), ("validation", train[:4]), ("test", report or train)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines)
        return folder.parent

    return write


@pytest.fixture
def tasks(model, tokenizer):
    """Tasks by name; options are those of `question_tasks`."""

    def build(*names, tokenizer=tokenizer, **options):
        settings = {"preset": "corrected"} | options
        return question_tasks(names, model[0], tokenizer, changes=CHANGES, **settings)

    return build


def rows(batches):
    """What tells the rows of a calibration text apart."""
    return {int(row[0]) for batch in batches for row in batch.input_ids}


@pytest.fixture
def bed(model):
    """A testbed of 40 rows, of which 10 are held out."""

    def build(num_sequences):
        ids = np.arange(40, dtype=np.int32)[:, None] * np.ones((1, 6), np.int32)
        counted, real = np.ones(ids.shape, np.float32), np.ones_like(ids)
        text = Batch(input_ids=ids, targets=ids, loss_mask=counted, attention_mask=real)
        sizes = {"num_sequences": num_sequences, "batch_size": 4}
        return question_testbed("toy", *model, (), text, **sizes)

    return build


def test_no_draw_takes_a_row_that_gradients_are_compared_on(bed):
    made = bed(12)
    held_out, draws = rows(made.held_out), [rows(made.calibration(seed)) for seed in range(5)]
    assert held_out == set(range(30, 40))
    assert all(len(draw) == 12 and not draw & held_out for draw in draws)
    assert len({frozenset(draw) for draw in draws}) == 5
    assert rows(made.calibration(3)) == draws[3]


def test_draws_of_much_the_same_rows_are_refused(bed):
    assert rows(bed(15).calibration(1))
    made = bed(16)
    assert len(rows(made.calibration(0))) == 16
    with pytest.raises(InputError, match="are 30 sequences to draw 16 from, expected at least 32"):
        made.calibration(1)
    with pytest.raises(InputError, match="to draw 28 from, expected at least 56"):
        bed(100).calibration(1)


@pytest.mark.parametrize(
    ("epochs", "steps", "warmup"),
    [(None, 7, 4), (1, 6, 4), (2.5, 15, 4), (0.5, 3, 2), (0.01, 1, 0)],
)
def test_an_epoch_is_as_many_steps_as_batches_fill(write, tasks, epochs, steps, warmup):
    data = write("openbookqa", [choice(word) for word in WORDS])
    (task,) = tasks("openbookqa", data=data, epochs=epochs)
    assert len(task.train.input_ids) // 3 == 6
    assert (task.tuning.steps, task.tuning.warmup) == (steps, warmup)


def test_too_few_examples_for_a_batch_are_refused(write, tasks):
    data = write("openbookqa", [choice("cat"), choice("dog")])
    with pytest.raises(InputError, match="openbookqa: 2 examples to train on do not fill a batch"):
        tasks("openbookqa", data=data)


def test_a_task_without_a_folder_never_takes_anothers(write, tasks):
    data = write("openbookqa", [choice(word) for word in WORDS])
    absent = "arc-easy: no such folder, expected the data of arc-easy; .* has folders of openbookqa"
    for names in (("arc-easy",), ("openbookqa", "arc-easy")):
        with pytest.raises(InputError, match=absent):
            tasks(*names, data=data)
    (above,) = tasks("openbookqa", data=data)
    (itself,) = tasks("openbookqa", data=data / "openbookqa")
    assert itself.test_digest == above.test_digest
    # One folder is the data of one task.
    with pytest.raises(InputError, match=r"expected the data of openbookqa; .* folders of no task"):
        tasks("openbookqa", "webqs", data=data / "openbookqa")


def test_the_digest_is_of_the_tokens_and_of_the_right_answers(write, tasks, tokenizer_of):
    train = [choice(word) for word in WORDS]
    data = write("openbookqa", train)
    (first,) = tasks("openbookqa", data=data)
    assert tasks("openbookqa", data=data)[0].test_digest == first.test_digest
    others = [tasks("openbookqa", data=data, tokenizer=tokenizer_of(WORDS[::-1]))]
    others += [tasks("openbookqa", data=data, preset="paper")]
    data = write("openbookqa", train, [choice(word, "A") for word in WORDS])
    others += [tasks("openbookqa", data=data)]
    assert len({first.test_digest, *(task.test_digest for (task,) in others)}) == 4


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer):
        self.inner, self.texts = tokenizer, 0

    def __call__(self, *arguments, **options):
        self.texts += 1
        return self.inner(*arguments, **options)

    def convert_ids_to_tokens(self, ids):
        return self.inner.convert_ids_to_tokens(ids)


def test_models_are_measured_on_questions_that_are_tokenised_once(write, tasks, model, tokenizer):
    config, params = model
    data = write("openbookqa", [choice(word) for word in WORDS])
    counting = Counting(tokenizer)
    (task,) = tasks("openbookqa", data=data, tokenizer=counting)
    before = counting.texts
    score = task.measure(config, params)
    lost = task.measure(config, jax.tree.map(lambda leaf: leaf * np.float32("nan"), params))
    assert counting.texts == before > 0
    assert np.isnan(lost["accuracy"]) and np.isnan(lost["answer_log_likelihood"])

    items = tuple(Item(f"the {word} is", (" red", " old"), (1,)) for word in WORDS)
    expected = multiple_choice(config, params, tokenizer, ItemRecords(items, "i"), batch_size=8)
    assert score["accuracy"] == 100 * expected.accuracy
    assert score["answer_log_likelihood"] == expected.log_likelihood


def test_the_protocol_says_what_begins_with_bos_and_what_was_left_out_or_cut(write, tasks):
    train = [choice(word) for word in WORDS]
    train[0] = choice("cat " * 40)
    train[1] = train[1] | {"choices": {"text": ["red", ""], "label": ["A", "B"]}}
    data = write("openbookqa", train, [choice("cat"), choice("dog " * 40)])
    write("wikitext-2", [{"text": " ".join(WORDS * 3)}] * 88)
    for preset, bos, of_text in (
        ("paper", False, "every line"),
        ("corrected", True, "every document"),
    ):
        made = tasks("openbookqa", "wikitext-2", data=data, preset=preset)
        questions, text = (task.protocol for task in made)
        assert (questions["bos"], text["bos"]) == (bos, of_text)
        # The first four are the validation part as well.
        assert questions["left_out"] == 2
        assert questions["cut"] == {"train": 1, "development": 1, "report": 2}
        assert text["left_out"] == 0 and set(text["cut"].values()) == {0}
        json.dumps(questions)
