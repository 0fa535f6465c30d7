import json

import datasets
import pytest

from gradot_jax.data.records import (
    Choice,
    ChoiceRecords,
    Prompt,
    PromptRecords,
    TextRecords,
    read_records,
)
from gradot_jax.errors import InputError

CHOICE = {"question": "Which?", "choices": ["this", "that"], "answer": 1}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("one\r\ntwo\u2028é\n\n".encode())
    records = read_records(str(path))
    assert records == TextRecords(("one\r\ntwo\u2028é\n\n",), "book.txt")


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_fields_decide_the_kind_and_others_are_ignored(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    assert read_records(write(path, {"text": "a", "id": 1}, {"text": ""})).records == ("a", "")
    records = read_records(write(path, {"prompt": "", "completion": " b"}))
    assert records == PromptRecords((Prompt("", " b"),), path.name)
    records = read_records(write(path, CHOICE, CHOICE | {"answer": "this"}))
    assert records == ChoiceRecords(
        (Choice("Which?", ("this", "that"), 1), Choice("Which?", ("this", "that"), 0)), path.name
    )


def test_only_a_newline_separates_records(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}', encoding="utf-8", newline="")
    assert read_records(str(path)).records == ("a\u2028b\x85c", "d")


def test_the_digest_depends_on_content_and_kind_alone(tmp_path):
    one = read_records(write(tmp_path / "one.jsonl", {"text": "é", "id": 3}))
    (tmp_path / "two.txt").write_text("é", encoding="utf-8")
    two = read_records(str(tmp_path / "two.txt"))
    assert one.digest == two.digest and len(one.digest) == 64
    other = read_records(write(tmp_path / "one.jsonl", {"text": "e"}))
    pair = read_records(write(tmp_path / "one.jsonl", {"prompt": "é", "completion": "é"}))
    assert len({one.digest, other.digest, pair.digest}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ('{"text": ""}\n', "empty"),
        ('{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
        ('{"text": "a"}\n\n{"text": "b"}\n', "line 2: not valid JSON"),
        ('{"text": "a"}\n["b"]\n', "line 2: expected a JSON object"),
        ('{"text": NaN}\n', "line 1: not valid JSON"),
        ('{"text": "a", "text": "b"}\n', "line 1: .*twice"),
        ("[" * 100_000 + "\n", "line 1: nested too deeply"),
        ('{"body": "a"}\n', "line 1: got the fields body, expected one of: text; or prompt"),
        ("{}\n", "line 1: got the fields none"),
        ('{"text": "a", "prompt": "b", "completion": "c"}\n', "line 1: got the fields"),
        ('{"text": "a"}\n{"prompt": "b", "completion": "c"}\n', "line 2: has the fields prompt"),
        ('{"text": 3}\n', "line 1: text must be a string, got 3"),
        ('{"text": null}\n', "line 1: text must be a string, got None"),
        ('{"text": "\\ud800"}\n', "line 1: text holds half of a surrogate pair"),
        ('{"prompt": "b"}\n', "line 1: got the fields prompt"),
        ('{"prompt": "b", "completion": ""}\n', "line 1: the completion is empty"),
        ('{"prompt": "b", "completion": ["c"]}\n', "line 1: completion must be a string"),
    ],
)
def test_malformed_lines_are_refused_with_their_place(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=f"data.jsonl.*{message}"):
        read_records(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "index from 0 to 1"),
        ({"answer": -1}, "index from 0 to 1"),
        ({"answer": True}, "got True"),
        ({"answer": "A"}, "the text of exactly one choice, got 'A'"),
        ({"answer": "this", "choices": ["this", "this"]}, "exactly one choice"),
        ({"choices": ["this"]}, "two or more"),
        ({"choices": "this"}, "two or more"),
        ({"choices": ["this", 4]}, "choices must be a string"),
        ({"choices": ["this", ""]}, "empty string"),
        ({"question": 5}, "question must be a string"),
    ],
)
def test_malformed_choices_are_refused_with_their_line(tmp_path, change, message):
    source = write(tmp_path / "data.jsonl", CHOICE, CHOICE | change)
    with pytest.raises(InputError, match=f"data.jsonl line 2: .*{message}"):
        read_records(source)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_bad_utf8_is_refused(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"(?i)utf-8"):
        read_records(str(path))


def test_missing_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read: No such file"):
        read_records(str(tmp_path / "none.jsonl"))
    (tmp_path / "data.csv").write_text("text\na\n")
    with pytest.raises(InputError, match=r"unknown extension '\.csv', expected \.txt"):
        read_records(str(tmp_path / "data.csv"))


def test_a_file_has_no_splits(tmp_path):
    with pytest.raises(InputError, match="no splits"):
        read_records(write(tmp_path / "data.jsonl", {"text": "a"}), split="train")


@pytest.mark.usefixtures("dataset_cache")
def test_a_folder_of_data_files_is_read_by_split(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", CHOICE | {"id": 1})
    write(folder / "test.jsonl", CHOICE | {"id": 2, "answer": 0}, CHOICE | {"id": 3})
    assert read_records(str(folder)).records == (Choice("Which?", ("this", "that"), 1),)
    test = read_records(f"{folder}@test")
    assert test.source == "set@test"
    assert [item.answer for item in test.records] == [0, 1]
    assert read_records(str(folder), split="test") == test
    same = read_records(write(tmp_path / "same.jsonl", CHOICE | {"answer": 0}, CHOICE))
    assert same.digest == test.digest
    with pytest.raises(InputError, match=r"set@nope: .*nope.*network"):
        read_records(f"{folder}@nope")
    with pytest.raises(InputError, match="names the split 'test', but split 'train'"):
        read_records(f"{folder}@test", split="train")


@pytest.mark.usefixtures("dataset_cache")
def test_a_table_of_parquet_is_read_and_its_rows_are_checked(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    table = {"text": ["a", "b"], "other": [1, 2]}
    datasets.Dataset.from_dict(table).to_parquet(folder / "train.parquet")
    assert read_records(str(folder)).records == ("a", "b")
    datasets.Dataset.from_dict({"text": ["a", None]}).to_parquet(folder / "test.parquet")
    with pytest.raises(InputError, match="set@test row 2: text must be a string, got None"):
        read_records(f"{folder}@test")


@pytest.mark.usefixtures("dataset_cache")
def test_a_table_of_other_columns_or_of_unequal_splits_is_refused(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", {"body": "a"})
    with pytest.raises(InputError, match="set@train: got the fields body"):
        read_records(str(folder))
    write(folder / "test.jsonl", {"text": "a"})
    with pytest.raises(InputError, match=r"set@test: cannot be loaded .*cast"):
        read_records(f"{folder}@test")


@pytest.mark.parametrize("source", ["nobody-has-this", "nobody/has:this@train"])
@pytest.mark.usefixtures("dataset_cache")
def test_an_unreachable_name_is_refused(source):
    with pytest.raises(InputError, match=r"cannot be loaded as a data set: .*network"):
        read_records(source)
