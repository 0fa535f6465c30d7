import json

import numpy as np
import pytest

from benchmarks.ragged import ARRANGEMENTS, CHOSEN, SPREAD, Shape, arrange, layers, measure, sizes
from benchmarks.workloads import model
from gradot_jax.models.opt.params import count_params, depth


def test_every_arrangement_is_measured_and_written(tmp_path):
    path = tmp_path / "record.json"
    record = measure(Shape(8, 1, 4, (2,)), ("unrolled", "largest"), 60.0, path)
    assert record["complete"] and json.loads(path.read_text())["points"] == record["points"]
    found = [(p["sizes"], p["arrangement"], p["stacks"]) for p in record["points"]]
    cases = (*CHOSEN, SPREAD)
    assert found == [(c, a, n) for c in cases for a, n in (("unrolled", 2), ("largest", 1))]
    assert all(p["zeros"] == 0 for p in record["points"] if p["arrangement"] == "unrolled")
    assert all(p["median_seconds"] > 0 < p["compile_seconds"] for p in record["points"])


def test_cases_that_are_late_are_left_out():
    record = measure(Shape(8, 1, 4, (2,)), ("largest",), 0.0)
    assert len(record["left_out"]) == len((*CHOSEN, SPREAD)) and not record["complete"]


@pytest.mark.parametrize("name", [*CHOSEN, SPREAD])
def test_arrangements_hold_the_same_layers_and_say_how_many_zeros(name):
    config = model(12, 128, 2, vocabulary=16)
    blocks = layers(config, sizes(name, 12))
    weights = count_params(blocks)
    for arrangement in ARRANGEMENTS:
        stacks = arrange(blocks, arrangement)
        assert sum(map(depth, stacks)) == 12
        zeros = count_params(stacks) / weights - 1
        kind, _, value = arrangement.partition("-")
        if kind == "waste":
            assert 0 <= zeros <= float(value)
        assert (zeros == 0) == (kind in ("unrolled", "segments"))


def test_sizes_of_more_layers_lie_between_those_that_were_chosen():
    few, many = sizes("global-0.3", 12), sizes("global-0.3", 23)
    np.testing.assert_allclose(many[::2], few)
    np.testing.assert_allclose(many[1::2], (few[1:] + few[:-1]) / 2)
