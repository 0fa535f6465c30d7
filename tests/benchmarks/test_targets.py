import json

from benchmarks.targets import TARGETS, Target, find, load_results, measured


def test_a_figure_is_found_by_its_place():
    results = {"opt-1.3b": {"totals": {"share": 0.5, "name": "x"}}}
    assert find(results, "opt-1.3b.totals.share") == 0.5
    for missing in ("opt-1.3b.totals.other", "opt-1.3b.totals.share.deeper", "other.x", ""):
        assert find(results, missing) is None
    assert find(results, "opt-1.3b.totals.name") is None


def test_a_limit_is_reached_from_its_side_and_no_limit_never():
    assert Target("t", limit=1.0).reached(1.0) and not Target("t", limit=1.0).reached(1.1)
    assert Target("t", limit=2.0, at_least=True).reached(3.0)
    assert Target("t").reached(3.0) is None
    assert Target("t", limit=1.25).demanded == "≤ 1.25 x"


def test_what_was_not_measured_is_neither_reached_nor_missed():
    rows = measured("device", {})
    assert len(rows) == len(TARGETS)
    assert all(row["measured"] is None and row["reached"] is None for row in rows)


def test_results_of_a_folder_do_not_hold_the_targets_themselves(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"suite": "cpu"}))
    (tmp_path / "targets.json").write_text(json.dumps({"targets": []}))
    assert load_results(tmp_path).keys() == {"a"}
