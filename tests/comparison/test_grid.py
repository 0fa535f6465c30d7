import json

import pytest

from gradot_jax.comparison.grid import Grid, run_comparison
from gradot_jax.errors import InputError

GRID = Grid(
    methods=("full-finetune", "layer-drop", "empty"),
    budgets=(0.6,),
    seeds=(0, 1),
    rates=(0.5, 2.0),
)
PLOTS = ("utility_privacy.png", "gradient_error.png", "kept.png")


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
        run_comparison(toy_bed(toy_task(watch)), GRID, tmp_path / "stopped")
    return tmp_path / "stopped"


def test_a_run_that_was_stopped_loses_one_cell_and_ends_like_any_other(
    interrupted, toy_bed, tmp_path
):
    before = stamps(interrupted)
    assert before and not (interrupted / "utility_privacy.png").exists()
    resumed = run_comparison(toy_bed(), GRID, interrupted)
    after = stamps(interrupted)
    assert before.items() < after.items()
    fresh = run_comparison(toy_bed(), GRID, tmp_path / "fresh")
    assert stamps(tmp_path / "fresh").keys() == after.keys()
    quantities = ("plug_in", "emulator_finetuned", "full_finetuned", "learning_rate")
    for ours, theirs in zip(resumed["rows"], fresh["rows"], strict=True):
        assert {q: ours.get(q) for q in quantities} == {q: theirs.get(q) for q in quantities}


def test_a_finished_run_is_not_run_again_and_more_seeds_run_what_is_new(toy_bed, tmp_path):
    first = run_comparison(toy_bed(), GRID, tmp_path)
    cells = stamps(tmp_path)
    again = run_comparison(toy_bed(), GRID, tmp_path)
    assert stamps(tmp_path) == cells
    assert again["rows"] == first["rows"]

    # Two trials and two runs of three cases, the winning trial being the first run.
    assert len(list((tmp_path / "curves").iterdir())) == 3 * (2 + 1)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    written = json.loads((tmp_path / "result.json").read_text())
    assert {"V1", "V2", "V3"} == set(written["validity"]["toy"])
    losses = {r["learning_rate"]: r["development_loss"] for r in first["rows"] if not r["seed"]}
    assert set(losses) <= {0.5e-2, 2e-2}

    more = Grid(methods=GRID.methods, budgets=(0.6,), seeds=(0, 1, 2), rates=GRID.rates)
    run_comparison(toy_bed(), more, tmp_path)
    assert stamps(tmp_path).keys() - cells.keys() == {
        name for name in stamps(tmp_path) if "-seed2-" in name
    }
    assert cells.items() < stamps(tmp_path).items()


def test_every_row_has_every_quantity_and_delta_is_their_difference(toy_bed, tmp_path):
    grid = Grid(
        methods=("full-finetune", "full-finetune-all", "magnitude"),
        budgets=(0.6,),
        seeds=(0,),
        rates=(1.0,),
    )
    result = run_comparison(toy_bed(), grid, tmp_path, drop_bundles=True)
    full, everything, magnitude = result["rows"]
    values = {name: v["perplexity"] for name, v in magnitude.items() if isinstance(v, dict)}
    assert values["full_finetuned"] == full["full_finetuned"]["perplexity"]
    assert everything["full_finetuned"] != full["full_finetuned"]
    delta = magnitude["delta"]["perplexity"]
    assert delta == pytest.approx(values["emulator_finetuned"] - values["plug_in"])
    (compression,) = result["compressions"]
    assert 0 < compression["share_verbatim"] <= compression["share_shipped"] < 1
    assert [kept["layer"] for kept in compression["kept"]] == [1, 2, 3]
    assert not list((tmp_path / "cells").glob("*/bundle"))


def test_a_method_that_cannot_run_is_named_and_the_others_are_written(toy_bed, tmp_path):
    grid = Grid(methods=("layer-drop", "empty"), budgets=(0.6,), seeds=(0,), rates=(1.0,))
    bed = toy_bed()
    held = run_comparison(bed, grid, tmp_path)["compressions"]
    assert [c["method"] for c in held] == ["layer-drop", "empty"]
    (cell,) = (tmp_path / "cells").glob("compression-layer-drop*.json")
    cell.write_text("damaged")
    with pytest.raises(InputError, match=r"not run: layer-drop-0\.6: .*not a cell"):
        run_comparison(bed, grid, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "layer-drop-0.6 was not run" in table and "| empty" in table


@pytest.mark.parametrize("changes", [{"seeds": ()}, {"rates": (0.0,)}, {"budgets": (0.6, 0.6)}])
def test_grids_out_of_range_are_refused(changes):
    fields = {"methods": ("gradot",), "budgets": (0.6,), "seeds": (0,)}
    with pytest.raises(InputError):
        Grid(**(fields | changes))
