import math

import numpy as np
import pytest

from gradot_jax.comparison.frontier import dominated_area, frontiers, worth


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([], 0),
        ([(0, 1)], 1),
        ([(1, 1)], 0),
        ([(0.5, 0.5)], 0.25),
        ([(0.2, 0.5), (0.6, 0.9)], 0.4 * 0.5 + 0.4 * 0.9),
        # What another point dominates adds nothing, in whatever order they come.
        ([(0.6, 0.4), (0.2, 0.5)], 0.8 * 0.5),
    ],
)
def test_the_area_is_of_the_union(points, area):
    assert dominated_area(points) == pytest.approx(area)


def test_the_area_is_what_throwing_darts_gives():
    rng = np.random.default_rng(0)
    points, darts = rng.random((4, 2)), rng.random((200_000, 2))
    hit = ((darts[:, None, 0] >= points[:, 0]) & (darts[:, None, 1] <= points[:, 1])).any(1)
    assert dominated_area(list(map(tuple, points))) == pytest.approx(hit.mean(), abs=5e-3)


def test_worth_is_a_share_of_what_tuning_gains():
    assert worth(30.0, 20.0, 40.0, higher=True) == 0.5
    assert worth(10.0, 20.0, 40.0, higher=True) == 0
    assert worth(50.0, 20.0, 40.0, higher=True) == 1
    # Half of the nats between 100 and 25.
    assert worth(50.0, 100.0, 25.0, higher=False) == pytest.approx(0.5)
    assert worth(math.nan, 20.0, 40.0, higher=True) == 0


def result(rows):
    task = {"metric": "score", "higher_is_better": True}
    planned = dict.fromkeys((r["task"], r["method"], r["budget"]) for r in rows)
    keys = ("task", "method", "budget")
    return {
        "tasks": {"toy": task},
        "rows": rows,
        "planned": [dict(zip(keys, values, strict=True)) for values in planned],
    }


def row(method, budget, emulator, plugged, seed=0):
    values = {"zero_shot": 0.0, "full_finetuned": 100.0}
    values |= {"emulator_finetuned": emulator, "plug_in": plugged}
    row = {"task": "toy", "method": method, "budget": budget, "seed": seed, "draw": 0}
    return row | {name: {"score": value} for name, value in values.items()}


def test_a_method_has_the_mean_over_the_runs_that_have_all_its_budgets():
    rows = [row("gradot", 0.6, 60.0, 90.0, s) for s in (0, 1, 2)]
    rows += [row("gradot", 0.3, 20.0, 50.0 + 10 * s, s) for s in (0, 1)]
    rows += [row("layer-drop", 0.6, 90.0, 90.0), row("empty", None, 0.0, 0.0)]
    first, second = frontiers(result(rows))
    assert (first["method"], first["budgets"], first["area"].count) == ("gradot", [0.6, 0.3], 2)
    # 0.4 * 0.5 + 0.4 * 0.9 and 0.4 * 0.6 + 0.4 * 0.9
    assert first["area"].mean == pytest.approx(0.58)
    assert first["area"].low < 0.58 < first["area"].high
    assert (second["method"], second["area"].mean) == ("layer-drop", pytest.approx(0.09))
