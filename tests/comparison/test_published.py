import json

import pytest

from gradot_jax.comparison.measured import AVERAGE, FULL_MODEL
from gradot_jax.comparison.published import PATH, load_published, table
from gradot_jax.errors import InputError

ENTRY = {
    "model": "OPT-1.3B",
    "system": "gradot",
    "setting": "plug-in",
    "task": "average of 8",
    "metric": "accuracy",
    "value": 49.8,
    "source": "note",
}
SOURCE = {"kind": "third party", "paper": "2507.04455", "where": "a page", "note": ""}


def write(path, *entries, sources=None):
    content = {
        "protocol": "one seed",
        "sources": {"note": SOURCE} if sources is None else sources,
        "entries": entries,
    }
    path.write_text(json.dumps(content))
    return path


def test_every_number_has_a_source_and_every_other_is_not_available():
    published = load_published()
    for entry in published.entries:
        assert (entry.value is None) == (entry.source is None)
        assert entry.source is None or entry.source in published.sources
    for phrase in ("lm-eval 0.3", "acc (not acc_norm)", "no BOS", "one seed"):
        assert phrase in published.protocol


@pytest.mark.parametrize(
    ("system", "setting", "value"),
    [
        (FULL_MODEL, "full fine-tuned", 49.9),
        ("offsite-tuning", "plug-in", 49.0),
        ("layer-drop", "plug-in", 46.5),
        ("crash", "plug-in - emulator fine-tuned", 4.8),
        ("scaleot", "plug-in", 49.9),
        ("gradot", "plug-in", 49.8),
        ("gradot", "emulator fine-tuned", None),
    ],
)
def test_averages_are_those_of_the_sources(system, setting, value):
    (entry,) = load_published().find(model="OPT-1.3B", system=system, setting=setting, task=AVERAGE)
    assert entry.value == value


def test_a_number_whose_meaning_is_inferred_says_so():
    published = load_published()
    (entry,) = (entry for entry in published.entries if entry.note)
    assert (entry.system, entry.setting, entry.value) == ("gradot", "emulator zero-shot", 27.3)
    assert "lowest zero-shot performance (27.3)" in entry.note and "inferred" in entry.note
    (line,) = [line for line in table(published).splitlines() if "| 27.3 |" in line]
    assert line.endswith(f"| gradot-note: {entry.note} |")


def test_sources_that_overlap_agree_within_a_standard_error_of_the_harness():
    published = load_published()
    for model in ("OPT-1.3B", "OPT-6.7B"):
        for task in ("piqa", "arc-easy", "arc-challenge", "sciq"):
            first, second = published.find(model=model, setting="zero-shot", task=task)
            assert first.source != second.source
            assert abs(first.value - second.value) < 0.9


def test_the_table_says_what_is_not_available(tmp_path):
    entries = (ENTRY, ENTRY | {"setting": "emulator fine-tuned", "value": None, "source": None})
    assert table(load_published(write(tmp_path / "numbers.json", *entries))).splitlines() == [
        "one seed",
        "",
        "| model | system | setting | task | value | source |",
        "|---|---|---|---|---:|---|",
        "| OPT-1.3B | gradot | plug-in | average of 8 | 49.8 | note |",
        "| OPT-1.3B | gradot | emulator fine-tuned | average of 8 | not available |  |",
    ]
    assert len(table(load_published()).splitlines()) == 4 + len(load_published(PATH).entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "OPT-2.7B"}, "model is 'OPT-2.7B', expected one of: OPT-1.3B, OPT-6.7B"),
        ({"system": "llama"}, "system is 'llama'"),
        ({"setting": "zero-shot"}, "zero-shot is no setting of the system gradot"),
        ({"system": "full model"}, "plug-in is no setting of the system full model"),
        ({"task": "boolq"}, "unknown task 'boolq'"),
        ({"task": "wikitext-2"}, "metric is accuracy, expected perplexity"),
        ({"metric": "points"}, "metric is points, expected accuracy"),
        ({"source": None}, "a value and its source go together"),
        ({"value": None}, "a value and its source go together"),
        ({"source": "memory"}, "unknown source 'memory'"),
        ({"value": 498}, r"value must lie in \(0, 100\], got 498"),
        ({"value": "49.8"}, "value must lie in"),
        ({"extra": 1}, "expected the keys model, system"),
        ({}, "given twice: OPT-1.3B, gradot, plug-in"),
    ],
)
def test_malformed_entries_are_refused_with_their_place(tmp_path, change, message):
    path = write(tmp_path / "numbers.json", ENTRY, ENTRY | change)
    with pytest.raises(InputError, match=rf"numbers\.json entry 2: .*{message}"):
        load_published(path)


def test_sources_are_complete_and_used(tmp_path):
    path = tmp_path / "numbers.json"
    with pytest.raises(InputError, match="no entry is from rumour"):
        load_published(write(path, ENTRY, sources={"note": SOURCE, "rumour": SOURCE}))
    with pytest.raises(InputError, match="source note: kind is 'memory', expected one of"):
        load_published(write(path, ENTRY, sources={"note": SOURCE | {"kind": "memory"}}))
