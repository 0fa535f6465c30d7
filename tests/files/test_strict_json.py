import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import parse_json, read_json, write_json


def test_what_is_written_is_read_back(tmp_path):
    value = {"a": [1, 2.5, None], "ä": {"b": "c"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' occurs twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b"", "not valid JSON"),
    ],
)
def test_ambiguous_unbounded_or_broken_text_is_refused(text, reason):
    with pytest.raises(InputError, match=f"here: .*{reason}"):
        parse_json(text, "here")


def test_a_file_over_the_limit_is_refused_and_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path, max_bytes=8) == {"a": 1}
    with pytest.raises(InputError, match=r"x\.json: larger than the 7 bytes"):
        read_json(path, max_bytes=7)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"x\.json: cannot be read"):
        read_json(tmp_path / "x.json")


def test_numbers_json_has_not_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
