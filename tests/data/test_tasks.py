import json

import datasets
import numpy as np
import pytest

from gradot_jax.data.examples import prompt_examples, text_examples
from gradot_jax.data.records import Item, Prompt
from gradot_jax.data.task_data import load_task, task_examples
from gradot_jax.data.tasks import PUBLISHED_TASKS, TASKS
from gradot_jax.data.tokenizer import encode
from gradot_jax.errors import InputError

BOS, EOS = 2, 3

ROWS = {
    "openbookqa": {
        "id": "7-980",
        "question_stem": "The sun is responsible for",
        "choices": {
            "text": ["puppies learning tricks", "plants sprouting"],
            "label": ["A", "B"],
        },
        "answerKey": "B",
    },
    "piqa": {"goal": "Dry a cup.", "sol1": "Use a towel.", "sol2": "Use rain.", "label": 0},
    "arc-easy": {
        "id": "Mercury_7220990",
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "arc-challenge": {
        "id": "TIMSS_1995_8_K19",
        "question": "Which is wet?",
        "choices": {"text": ["sand", "ash", "dust", "rock", "rain"], "label": list("12345")},
        "answerKey": "5",
    },
    "hellaswag": {
        "ind": 14,
        "activity_label": "Wakeboarding",
        "ctx_a": "A man is pulled [step] on a board.",
        "ctx_b": "the Man",
        "ctx": "A man is pulled [step] on a board. the Man",
        "endings": ["falls. [title] He swims.", " rides [substeps] away."],
        "source_id": "activitynet~v_-5KAycAQlC4",
        "split": "train",
        "split_type": "indomain",
        "label": "1",
    },
    "sciq": {
        "question": "What is blue?",
        "distractor3": "coal",
        "distractor1": "grass",
        "distractor2": "blood",
        "correct_answer": "sky",
        "support": " The sky is blue. ",
    },
    "webqs": {
        "url": "http://www.freebase.com/view/en/jamaica",
        "question": "what do jamaicans speak?",
        "answers": ["Patois", "English"],
    },
    "race": {
        "example_id": "high1.txt",
        "article": "Tom has a cat.",
        "answer": "C",
        "question": "Who has a cat?",
        "options": ["Ann", "Bob", "Tom", "Eve"],
    },
    "wikitext-2": {"text": " = Cats = \n"},
}
"""One row of each data set, with all the columns that it has on the hub."""

PAPER = {
    "openbookqa": Prompt("The sun is responsible for", "plants sprouting"),
    "piqa": Prompt("Question: Dry a cup.\nAnswer:", "Use a towel."),
    "arc-easy": Prompt("Question: Which is hot?\nAnswer:", "fire"),
    "arc-challenge": Prompt("Question: Which is wet?\nAnswer:", "rain"),
    "hellaswag": Prompt("Wakeboarding: A man is pulled on a board. The man", "rides away."),
    "sciq": Prompt(" The sky is blue. \nQuestion: What is blue?\nAnswer:", "sky"),
    "webqs": Prompt("Question: what do jamaicans speak?\nAnswer:", " Patois"),
    "race": Prompt("Article: Tom has a cat.\n\nQuestion: Who has a cat?\n\nAnswer:", "Tom"),
}
CORRECTED = PAPER | {
    "sciq": Prompt("The sky is blue. \nQuestion: What is blue?\nAnswer:", "sky"),
    "webqs": Prompt("Question: what do jamaicans speak?\nAnswer:", "Patois"),
    "race": Prompt("Article: Tom has a cat.\n\nWho has a cat?", "Tom"),
}
"""Without the space in front of each answer."""
REPORT = {
    "openbookqa": Item(
        "The sun is responsible for", (" puppies learning tricks", " plants sprouting"), (1,)
    ),
    "piqa": Item("Question: Dry a cup.\nAnswer:", (" Use a towel.", " Use rain."), (0,)),
    "arc-easy": Item("Question: Which is hot?\nAnswer:", (" ice", " fire", " snow"), (1,)),
    "arc-challenge": Item(
        "Question: Which is wet?\nAnswer:", (" sand", " ash", " dust", " rock", " rain"), (4,)
    ),
    "hellaswag": Item(
        "Wakeboarding: A man is pulled on a board. The man",
        (" falls.. He swims.", " rides away."),
        (1,),
    ),
    "sciq": Item(
        "The sky is blue. \nQuestion: What is blue?\nAnswer:",
        (" grass", " blood", " coal", " sky"),
        (3,),
    ),
    "webqs": Item("Question: what do jamaicans speak?\nAnswer:", (" Patois", " English"), (0, 1)),
    "race": Item(
        "Article: Tom has a cat.\n\nWho has a cat?", (" Ann", " Bob", " Tom", " Eve"), (2,)
    ),
}
QUESTIONS = sorted(PAPER)


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """Writes rows by split, as Parquet files or JSON lines, and gives their folder."""

    def write(suffix="jsonl", **splits):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for split, rows in splits.items():
            path = folder / f"{split}.{suffix}"
            if suffix == "parquet":
                datasets.Dataset.from_list(rows).to_parquet(path)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def load(name, folder, preset="paper", **options):
    # Rows of RACE with one article are one passage.
    rows = [ROWS[name]] * (1 if name == "race" else 20)
    return load_task(
        name, preset=preset, data=folder(train=rows, validation=rows[:2], test=rows[:3]), **options
    )


@pytest.mark.parametrize("name", QUESTIONS)
def test_texts_of_the_paper_are_those_of_its_code(name, folder):
    task = load(name, folder)
    assert set(task.train.records) == set(task.validation.records) == {PAPER[name]}
    assert task.report.records[0] == REPORT[name]
    assert not task.append_eos and not task.report_bos


@pytest.mark.parametrize("name", QUESTIONS)
def test_corrected_training_is_worded_as_the_report_is(name, folder):
    task = load(name, folder, "corrected")
    prompt, answer = CORRECTED[name]
    item = task.report.records[0]
    expected = Prompt(prompt, f" {answer}")
    assert set(task.train.records) == set(task.validation.records) == {expected}
    assert (item.prompt, item.continuations[item.accepted[0]]) == expected
    assert task.append_eos and task.report_bos


def test_sciq_is_stripped_as_each_version_of_the_harness_strips_it(folder):
    row = ROWS["sciq"] | {"support": ""}
    data = folder(train=[row], validation=[row], test=[row])
    cue = "Question: What is blue?\nAnswer:"
    paper = load_task("sciq", preset="paper", data=data)
    assert (paper.train.records[0].prompt, paper.report.records[0].prompt) == (f"\n{cue}", cue)
    corrected = load_task("sciq", preset="corrected", data=data)
    assert corrected.train.records[0].prompt == corrected.report.records[0].prompt == f"\n{cue}"


@pytest.mark.parametrize(
    ("name", "preset", "parts"),
    [
        ("arc-easy", "paper", (20, 2, 3)),
        ("arc-easy", "corrected", (20, 2, 3)),
        ("piqa", "paper", (20, 2, 2)),
        ("piqa", "corrected", (19, 1, 2)),
        ("hellaswag", "paper", (20, 2, 2)),
        ("hellaswag", "corrected", (19, 1, 2)),
        ("webqs", "paper", (19, 1, 3)),
        ("webqs", "corrected", (19, 1, 3)),
        ("wikitext-2", "paper", (20, 2, 2)),
        ("wikitext-2", "corrected", (20, 2, 3)),
    ],
)
def test_parts_come_from_the_splits_of_the_preset(name, preset, parts, folder):
    task = load(name, folder, preset)
    assert tuple(len(p.records) for p in (task.train, task.validation, task.report)) == parts


def test_webqs_holds_out_the_first_twentieth_of_its_training_rows(folder):
    rows = [ROWS["webqs"] | {"question": f"number {i}?"} for i in range(50)]
    task = load_task("webqs", preset="paper", data=folder(train=rows, test=rows[:1]))
    held_out = [record.prompt for record in task.validation.records]
    # 5 % of 50 is 2.5, which rounds to the even number.
    assert held_out == [f"Question: number {i}?\nAnswer:" for i in range(2)]
    assert task.train.records[0].prompt == "Question: number 2?\nAnswer:"
    assert len(task.train.records) == 48


def test_parquet_files_read_as_json_lines_do(folder):
    rows = [ROWS["arc-challenge"]]
    one = load_task(
        "arc-challenge", preset="paper", data=folder(train=rows, validation=rows, test=rows)
    )
    for file in folder().iterdir():
        file.unlink()
    two = load_task(
        "arc-challenge",
        preset="paper",
        data=folder("parquet", train=rows, validation=rows, test=rows),
    )
    assert one == two and one.train.digest == two.train.digest


@pytest.mark.parametrize("has_card", [False, True])
def test_a_copy_of_the_whole_data_set_gives_the_configuration_of_the_task(tmp_path, has_card):
    for config, answer in (("ARC-Easy", "A"), ("ARC-Challenge", "C")):
        (tmp_path / "arc" / config).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            row = ROWS["arc-easy"] | {"answerKey": answer}
            table = datasets.Dataset.from_list([row])
            table.to_parquet(tmp_path / "arc" / config / f"{split}-00000-of-00001.parquet")
    if has_card:
        configs = "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(
                f"  - split: {split}\n    path: {config}/{split}-*\n"
                for split in ("train", "validation", "test")
            )
            for config in ("ARC-Challenge", "ARC-Easy")
        )
        (tmp_path / "arc" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    task = load_task("arc-challenge", preset="paper", data=tmp_path / "arc")
    assert [record.completion for record in task.train.records] == ["snow"]


SPLITS = ("train", "validation", "test")


def write_splits(folder, row, pattern="{split}.jsonl"):
    for split in SPLITS:
        path = folder / pattern.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    ("name", "pattern", "found"),
    [
        ("wikitext-2", "wikitext-103-raw-v1/{split}.jsonl", "wikitext-103-raw-v1"),
        ("arc-challenge", "ARC-Easy/{split}.jsonl", "ARC-Easy"),
        ("arc-challenge", "data/ARC-Easy/{split}.jsonl", "ARC-Easy"),
        ("openbookqa", "additional/{split}.jsonl", "additional"),
    ],
)
def test_a_copy_without_the_configuration_of_the_task_is_refused(tmp_path, name, pattern, found):
    write_splits(tmp_path / "copy", ROWS[name], pattern)
    expected = f"has data of {found}, expected the configuration {TASKS[name].config}"
    with pytest.raises(InputError, match=expected):
        load_task(name, preset="paper", data=tmp_path / "copy")


def test_a_card_that_declares_another_configuration_alone_is_refused(tmp_path):
    data = tmp_path / "copy"
    write_splits(data, ROWS["arc-easy"])
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in SPLITS)
    card = f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{files}---\n"
    (data / "README.md").write_text(card)
    assert load_task("arc-easy", preset="paper", data=data).train.records
    with pytest.raises(InputError, match="data of ARC-Easy, expected the configuration ARC-Chall"):
        load_task("arc-challenge", preset="paper", data=data)


@pytest.mark.parametrize("pattern", ["data/{split}-00000-of-00001.jsonl", "{split}/part.jsonl"])
def test_one_configuration_may_lie_in_the_folders_of_the_hub(tmp_path, pattern):
    data = tmp_path / "copy"
    write_splits(data, ROWS["openbookqa"], pattern)
    write_splits(data, {}, ".cache/huggingface/{split}.lock")
    task = load_task("openbookqa", preset="paper", data=data)
    assert task.train.records == (PAPER["openbookqa"],)


def test_a_limit_holds_for_every_part(folder):
    for name, preset in (("piqa", "paper"), ("wikitext-2", "corrected")):
        task = load(name, folder, preset, limit=1)
        assert all(len(p.records) == 1 for p in (task.train, task.validation, task.report))
    with pytest.raises(InputError, match="limit must be at least 1, got 0"):
        load("piqa", folder, limit=0)


def test_questions_with_nothing_to_learn_are_left_out_and_counted(folder):
    rows = [ROWS["hellaswag"] | {"endings": ["a", "[substeps]"]}, ROWS["hellaswag"]]
    data = folder(train=rows, validation=rows)
    task = load_task("hellaswag", preset="paper", data=data)
    assert len(task.train.records) == len(task.validation.records) == 1
    assert task.num_left_out == 2 and len(task.report.records) == 2
    with pytest.raises(InputError, match="hellaswag train: every answer is empty"):
        load_task("hellaswag", preset="paper", data=folder(train=rows[:1], validation=rows))


@pytest.mark.parametrize("name", PUBLISHED_TASKS)
def test_missing_columns_are_named(name, folder):
    column = TASKS[name].columns[-1]
    row = {key: value for key, value in ROWS[name].items() if key != column} | {"other": 1}
    rows = [row] * 20
    data = folder(train=rows, validation=rows, test=rows)
    with pytest.raises(InputError, match=rf"{name} train\S*: has no column {column}; got .*other"):
        load_task(name, preset="paper", data=data)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"label": -1}, "column label must be a number from 0 to 1, got -1"),
        ("piqa", {"goal": 3}, "column goal must be a string, got 3"),
        ("hellaswag", {"label": ""}, "column label must be a number from 0 to 1, got ''"),
        ("hellaswag", {"endings": []}, r"column endings must be one or more strings, got \[\]"),
        ("arc-easy", {"answerKey": "D"}, "column answerKey must be one of the first 3 letters"),
        ("arc-easy", {"choices": ["ice"]}, "column choices must be the lists text and label"),
        ("race", {"answer": "E"}, "column answer must be one of the first 4 letters"),
        ("webqs", {"answers": "Patois"}, "column answers must be one or more strings"),
        ("wikitext-2", {"text": None}, "column text must be a string, got None"),
    ],
)
def test_malformed_rows_are_refused_with_their_place(name, change, message, folder):
    rows = [ROWS[name] | change] * 20
    data = folder(train=rows, validation=rows, test=rows)
    with pytest.raises(InputError, match=rf"{name} train\S* row 1: {message}"):
        load_task(name, preset="paper", data=data)


MADE = {
    "prompt": "Question: Which country is the city of Oslo in?\nAnswer:",
    "completion": " Norway\n",
    "choices": ["Chad\n", "Norway\n", "Peru\n"],
    "answer": 1,
}


@pytest.mark.parametrize("name", sorted(set(TASKS) - {*PUBLISHED_TASKS, "gcide"}))
def test_tasks_that_are_made_here_learn_the_right_answer_as_it_ends(name, folder):
    task = load_task(
        name, preset="corrected", data=folder(train=[MADE], validation=[MADE], test=[MADE])
    )
    assert task.train.records == (Prompt(MADE["prompt"], MADE["completion"]),)
    assert not task.append_eos
    (item,) = task.report.records
    right = [item.continuations[index] for index in item.accepted]
    assert right == [MADE["completion"]]
    # What is not accepted plays no part in an exact match.
    assert len(item.continuations) == (1 if task.metric == "exact_match" else 3)


def test_text_that_is_made_here_is_read_as_it_is(folder):
    rows = [{"text": "a\n\nb"}, {"text": "c"}]
    task = load_task(
        "gcide", preset="corrected", data=folder(train=rows, validation=rows, test=rows)
    )
    assert task.report.records == ("a\n\nb", "c")
    assert (task.metric, task.length) == ("perplexity", 128)


def test_tasks_that_are_made_here_are_neither_of_the_papers_nor_on_the_hub(folder):
    data = folder(train=[MADE], validation=[MADE], test=[MADE])
    with pytest.raises(InputError, match="city: no task of the papers"):
        load_task("city", preset="paper", data=data)
    with pytest.raises(InputError, match=r"city: .*scripts/real_data.sh makes its data"):
        load_task("city", preset="corrected")
    wrong = [MADE | {"answer": 3}]
    with pytest.raises(InputError, match="column answer must be a number from 0 to 2, got 3"):
        load_task(
            "city", preset="corrected", data=folder(train=wrong, validation=wrong, test=wrong)
        )


def test_what_cannot_be_loaded_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"unknown task 'boolq', expected one of: openbookqa"):
        load_task("boolq", preset="paper")
    with pytest.raises(InputError, match="unknown preset 'best', expected one of: paper, corr"):
        load_task("piqa", preset="best")
    with pytest.raises(InputError, match="no such folder"):
        load_task("piqa", preset="paper", data=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    for name in ("openbookqa", "sciq"):
        with pytest.raises(InputError, match=rf"{name} train: cannot be loaded.*{name} needs no n"):
            load_task(name, preset="paper", data=tmp_path / "empty")
    data = folder(train=[ROWS["sciq"]], validation=[ROWS["sciq"]])
    with pytest.raises(InputError, match=r"sciq test: cannot be loaded.*allenai/sciq needs no net"):
        load_task("sciq", preset="paper", data=data)


def test_a_long_article_never_costs_the_answer(folder, tokenizer):
    row = ROWS["race"] | {"article": "the cat sat on the mat " * 300}
    data = folder(train=[row], validation=[row], test=[row])
    for preset, longest in (("paper", 599), ("corrected", 1024)):
        task = load_task("race", preset=preset, data=data)
        examples, cuts = task_examples(
            task, task.train, tokenizer, bos_id=BOS, eos_id=EOS, longest=2048
        )
        end = [EOS] if preset == "corrected" else []
        answer = encode(tokenizer, task.train.records[0].completion) + end
        assert cuts == 1 and examples.input_ids.shape == (1, longest)
        assert examples.input_ids[0, 0] == BOS
        assert examples.targets[0, -len(answer) :].tolist() == answer
        assert examples.loss_mask.sum() == len(answer)


def test_examples_are_no_longer_than_the_model_takes(folder, tokenizer):
    task = load("sciq", folder)
    sizes = {"bos_id": BOS, "eos_id": EOS, "longest": 16}
    examples, cuts = task_examples(task, task.train, tokenizer, **sizes)
    expected, _ = prompt_examples(tokenizer, task.train, BOS, 16)
    assert cuts == 20
    assert all(np.array_equal(a, b) for a, b in zip(examples, expected, strict=True))


def test_wikitext_is_cut_in_lines_or_read_in_articles(folder, tokenizer):
    lines = ["", " = The cat = \n", "", " = = The mat = = \n", " The cat sat . \n", " = Dog = \n"]
    rows = [{"text": line} for line in lines * 88]
    data = folder(train=rows, validation=rows, test=rows[:6])
    paper = load_task("wikitext-2", preset="paper", data=data)
    assert paper.train.records == tuple(lines * 88)
    sizes = {"bos_id": BOS, "eos_id": EOS, "longest": 15}
    examples, _ = task_examples(paper, paper.report, tokenizer, **sizes)
    group = [token for line in lines for token in (BOS, *encode(tokenizer, line))]
    count = len(group) // 16
    assert count and len(examples.input_ids) == 88 * count
    assert examples.input_ids[:count].reshape(-1).tolist() == [
        token for start in range(count) for token in group[16 * start : 16 * start + 15]
    ]

    corrected = load_task("wikitext-2", preset="corrected", data=data)
    assert corrected.report.records == ("".join(lines[:5]), lines[5])
    assert "".join(corrected.train.records) == "".join(lines * 88)
    examples, _ = task_examples(corrected, corrected.train, tokenizer, **sizes)
    expected = text_examples(tokenizer, corrected.train.records, 15, BOS)
    assert np.array_equal(examples.input_ids, expected.input_ids)
    assert not corrected.append_eos
