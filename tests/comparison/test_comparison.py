import itertools
import json

import pytest
from filelock import FileLock

from gradot_jax.comparison import compressing
from gradot_jax.comparison.comparison import Shard, run_comparison
from gradot_jax.comparison.stages import Plan, Stage, single
from gradot_jax.errors import InputError

METHODS = ("full-finetune", "layer-drop", "empty")


def plan_of(methods=METHODS, seeds=2, rates=(0.5, 2.0), **more):
    return single(methods, (0.6,), ("toy",), seeds=seeds, rates=rates, **more)


PLAN = plan_of()
PLOTS = ("frontier.png", "gradient_error.png", "kept.png")


def cells_of(out, kind):
    return list((out / "cells").glob(f"{kind}-*.json"))


def stamps(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}


@pytest.fixture
def interrupted(toy_bed, toy_task, tmp_path):
    """A run that is stopped as it measures for the seventh time, and its folder."""
    calls = []

    def watch():
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_comparison(toy_bed(toy_task(watch)), PLAN, tmp_path / "stopped")
    return tmp_path / "stopped"


def test_a_run_that_was_stopped_loses_one_cell_and_ends_like_any_other(
    interrupted, toy_bed, tmp_path
):
    before = stamps(interrupted)
    assert before and not (interrupted / "frontier.png").exists()
    resumed = run_comparison(toy_bed(), PLAN, interrupted)
    after = stamps(interrupted)
    assert before.items() < after.items()
    fresh = run_comparison(toy_bed(), PLAN, tmp_path / "fresh")
    assert stamps(tmp_path / "fresh").keys() == after.keys()
    quantities = ("plug_in", "emulator_finetuned", "full_finetuned", "learning_rate")
    for ours, theirs in zip(resumed["rows"], fresh["rows"], strict=True):
        assert {q: ours.get(q) for q in quantities} == {q: theirs.get(q) for q in quantities}


def test_a_finished_run_is_not_run_again_and_more_seeds_run_what_is_new(toy_bed, tmp_path):
    first = run_comparison(toy_bed(), PLAN, tmp_path)
    cells = stamps(tmp_path)
    again = run_comparison(toy_bed(), PLAN, tmp_path)
    assert stamps(tmp_path) == cells
    assert again["rows"] == first["rows"]

    # Of every case the trials and two runs, the winning trial being the first run.
    trials = {tuple(row["trials"]) for row in first["rows"] if not row["seed"]}
    assert len(list((tmp_path / "curves").iterdir())) == len(cells_of(tmp_path, "trial")) + 3
    assert all(len(tried) >= 3 for tried in trials)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    written = json.loads((tmp_path / "result.json").read_text())
    assert {"V1", "V2", "V3"} == set(written["validity"]["toy"])
    for row in first["rows"]:
        best = row["learning_rate"] / 1e-2
        assert row["bracketed"] and row["trials"][f"{best:g}"] == min(row["trials"].values())

    run_comparison(toy_bed(), plan_of(seeds=3), tmp_path)
    assert stamps(tmp_path).keys() - cells.keys() == {
        name for name in stamps(tmp_path) if "-toy-2-" in name
    }
    assert cells.items() < stamps(tmp_path).items()


def test_every_row_has_every_quantity_and_delta_is_their_difference(toy_bed, tmp_path):
    methods = ("full-finetune", "full-finetune-all", "magnitude")
    plan = plan_of(methods, seeds=1, rates=(1.0,))
    result = run_comparison(toy_bed(), plan, tmp_path, drop_bundles=True)
    full, everything, magnitude = result["rows"]
    values = {name: v["perplexity"] for name, v in magnitude.items() if isinstance(v, dict) and v}
    assert values["full_finetuned"] == full["full_finetuned"]["perplexity"]
    assert everything["full_finetuned"] != full["full_finetuned"]
    delta = magnitude["delta"]["perplexity"]
    assert delta == pytest.approx(values["emulator_finetuned"] - values["plug_in"])
    (compression,) = result["compressions"]
    assert 0 < compression["share_verbatim"] <= compression["share_shipped"] < 1
    assert [kept["layer"] for kept in compression["kept"]] == [1, 2, 3]
    assert not list((tmp_path / "bundles").iterdir())
    assert (magnitude["trials"], result["missing"]) == ({}, 0)


def test_a_damaged_cell_is_named_and_the_others_are_written(toy_bed, tmp_path):
    plan = plan_of(("layer-drop", "empty"), seeds=1, rates=(1.0,))
    bed = toy_bed()
    held = run_comparison(bed, plan, tmp_path)["compressions"]
    assert [c["method"] for c in held] == ["layer-drop", "empty"]
    (cell,) = (tmp_path / "cells").glob("compression-layer-drop*.json")
    cell.write_text("damaged")
    with pytest.raises(InputError, match=r"not run: layer-drop-0\.6: not a cell"):
        run_comparison(bed, plan, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "layer-drop-0.6 was not run" in table and "| empty" in table


def test_a_method_that_cannot_run_is_named_and_the_others_are_run(toy_bed, tmp_path):
    plan = single(("layer-drop", "empty"), (0.1,), ("toy",), rates=(1.0,))
    with pytest.raises(InputError, match=r"not run: layer-drop-0\.1: .*budget"):
        run_comparison(toy_bed(), plan, tmp_path, probes=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["empty"]
    assert "layer-drop-0.1 was not run" in (tmp_path / "table.md").read_text()


def test_a_bundle_is_dropped_when_its_last_stage_is_over(toy_bed, tmp_path):
    stages = [
        Stage(methods=("layer-drop", "empty"), budgets=(0.6,), tasks=("toy",), seeds=seeds)
        for seeds in (1, 2)
    ]
    plan, made = Plan(stages=tuple(stages), rates=(1.0,)), []
    bed = toy_bed()
    run = compressing.run_compression

    def watched(*args, **settings):
        made.append(args[4].method)
        return run(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressing, "run_compression", watched)
        run_comparison(bed, plan, tmp_path, drop_bundles=True)
    assert made == ["layer-drop", "empty"]
    assert not list((tmp_path / "bundles").iterdir())


def test_shards_share_a_plan_and_a_folder(toy_bed, tmp_path):
    plan = plan_of(seeds=1, rates=(1.0,))
    shards = [Shard(index, 3) for index in (1, 2, 3)]
    taken = [[unit for unit in plan.units if shard.takes(unit)] for shard in shards]
    assert sorted(map(str, itertools.chain(*taken))) == sorted(map(str, plan.units))
    assert all(plan.units != part for part in taken)
    for shard in shards:
        result = run_comparison(toy_bed(), plan, tmp_path, shard=shard)
    assert result["missing"] == 0 and len(result["rows"]) == 3


def test_what_another_process_is_at_is_left_to_it(toy_bed, tmp_path):
    plan = plan_of(("layer-drop", "empty"), seeds=1, rates=(1.0,))
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / "group-empty-None-toy.lock"):
        result = run_comparison(toy_bed(), plan, tmp_path, again=True, probes=True)
    assert [row["method"] for row in result["rows"]] == ["layer-drop"]
    assert result["missing"] == 1
    assert "1 of the planned runs are missing" in (tmp_path / "table.md").read_text()


def test_probes_measure_what_a_few_steps_do_to_the_plugged_in_model(toy_bed, tmp_path):
    plan = plan_of(("layer-drop", "empty"), 1, (1.0,))
    result = run_comparison(toy_bed(), plan, tmp_path, probes=True)
    assert len(cells_of(tmp_path, "probe")) == 2
    drop, empty = result["compressions"]
    assert drop["probe_steps"] == 1 and drop["emulator_gain"] > 0
    assert drop["plug_in_gain"] != empty["plug_in_gain"]
    assert run_comparison(toy_bed(), plan, tmp_path)["compressions"] == result["compressions"]


def test_the_report_is_made_of_what_is_there(toy_bed, tmp_path):
    first = run_comparison(toy_bed(), plan_of(("layer-drop",), 1, (1.0,)), tmp_path)
    before = stamps(tmp_path)
    wider = run_comparison(toy_bed(), plan_of(rates=(1.0,)), tmp_path, work=False)
    assert stamps(tmp_path) == before
    assert wider["missing"] == 5
    (row,) = wider["rows"]
    assert row == first["rows"][0]


def test_cells_of_other_code_are_taken_and_said_to_be(toy_bed, tmp_path):
    plan = plan_of(("layer-drop",), rates=(1.0,))
    run_comparison(toy_bed(), plan, tmp_path)
    (cell,) = (tmp_path / "cells").glob("run-*-toy-1-*.json")
    values = json.loads(cell.read_text())
    values["environment"]["code"] = "0123456789abcdef"
    cell.write_text(json.dumps(values))
    result = run_comparison(toy_bed(), plan, tmp_path)
    assert set(result["codes"].values()) == {1} and "0123456789abcdef" in result["codes"]
    assert "versions of the code" in (tmp_path / "table.md").read_text()


def test_what_other_code_measured_is_measured_again_beside_it(toy_bed, tmp_path):
    plan = plan_of(("full-finetune", "layer-drop"), 1, (1.0,))
    run_comparison(toy_bed(), plan, tmp_path)
    (cell,) = (tmp_path / "cells").glob("run-layer-drop-*.json")
    values = json.loads(cell.read_text())
    values["environment"]["code"] = "0123456789abcdef"
    values["result"]["plug_in"]["perplexity"] += 1
    cell.write_text(json.dumps(values))
    (found,) = run_comparison(toy_bed(), plan, tmp_path, again=True)["again"]
    assert (found["method"], found["quantity"]) == ("layer-drop", "plug_in")
    assert found["then"] - found["now"] == pytest.approx(1, abs=1e-4)
    assert "again by the code as it is" in (tmp_path / "table.md").read_text()
