import dataclasses

import pytest

from benchmarks import growth
from benchmarks.growth import AXES, base, exponents, varied
from benchmarks.workloads import SUITES


def test_exponents_of_exact_powers_are_found():
    points = [
        {"quantity": "width", "value": v, "seconds": {"a": 3 * v**2, "b": 5 / v}} for v in (1, 2, 4)
    ]
    found = exponents([*points, {"quantity": "devices", "value": 1, "seconds": {"a": 1}}])
    assert found.keys() == {"width"}
    assert found["width"] == pytest.approx({"a": 2, "b": -1})


@pytest.mark.parametrize("suite", SUITES)
def test_one_quantity_at_a_time_is_varied(suite):
    shape = base(suite).describe()
    of = {"tokens": "batch_size", "layers": "num_middle", "width": "width"}
    for axis in AXES[suite]:
        for value in axis.values:
            changed = varied(base(suite), axis.name, value)
            differ = {k for k, v in changed.describe().items() if v != shape[k]}
            assert differ <= {of[axis.name]} | ({"ffn", "heads"} if axis.name == "width" else set())
            sizes = {"tokens": changed.tokens, "layers": changed.num_middle}
            assert (sizes | {"width": changed.config.hidden_size})[axis.name] == value
            assert changed.num_swept == changed.num_middle


def test_the_study_ends_with_exponents_for_every_quantity(monkeypatch):
    small = growth._workload(width=16, layers=1, tokens=16, length=8, dtype="float32")
    axes = tuple(
        axis._replace(values=values)
        for axis, values in zip(AXES["cpu"], ((16, 32), (1, 2), (16, 32)), strict=True)
    )
    monkeypatch.setattr(growth, "base", lambda suite: small)
    monkeypatch.setattr(growth, "AXES", {"cpu": axes})
    monkeypatch.setattr(growth, "run_times", lambda run, prepare, advance=None: [1.0, 2.0])
    monkeypatch.setattr(growth, "_apart", lambda suite, count: {"calibration": 1.0 * count})
    *_, last = growth.study("cpu")
    assert last["complete"]
    assert last["exponents"].keys() == {"tokens", "layers", "width", "devices"}
    assert last["exponents"]["devices"] == pytest.approx({"calibration": 1})
    assert last["exponents"]["width"].keys() >= {"factor_sweep", "decomposition"}


def test_work_is_spread_over_devices(monkeypatch):
    small = growth._workload(width=16, layers=1, tokens=16, length=8, dtype="float32")
    monkeypatch.setattr(growth, "base", lambda suite: dataclasses.replace(small))
    seconds = growth.spread("cpu", 2)
    assert min(seconds.values()) > 0 and seconds.keys() == {"calibration", "step_emulator"}
