import pytest

from gradot_jax.cli.main import main

REFUSED = 3


@pytest.mark.parametrize(
    ("out", "more", "message"),
    [
        ("", ["--model", "nowhere"], "a folder, expected the name of a JSON file"),
        ("", ["--model", "nowhere", "--overwrite"], "a folder, expected the name of a JSON file"),
        ("old.json", ["--model", "nowhere"], "exists; --overwrite replaces it"),
        ("new.json", ["--bundle", "nowhere", "--revision", "main"], "--revision goes with --model"),
    ],
)
def test_what_could_not_be_written_or_read_is_refused_at_once(tmp_path, capsys, out, more, message):
    (tmp_path / "old.json").write_text("{}")
    # The data is not there either, and would be missed next.
    command = ["evaluate", "--data", "absent.jsonl", "--out", str(tmp_path / out), *more]
    assert main(command) == REFUSED
    assert message in capsys.readouterr().err
    assert (tmp_path / "old.json").read_text() == "{}"
