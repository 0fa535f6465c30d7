import pytest

from benchmarks import growth
from benchmarks.growth import VALUES, exponents, shape
from benchmarks.workloads import SUITES

SMALL = {"width": 16, "layers": 1, "tokens": 16, "length": 8, "dtype": "float32"}


def test_exponents_of_exact_powers_are_found():
    points = [
        {"quantity": "width", "value": v, "seconds": {"a": 3 * v**2, "b": 5 / v}} for v in (1, 2, 4)
    ]
    found = exponents([*points, {"quantity": "devices", "value": 1, "seconds": {"a": 1}}])
    assert found.keys() == {"width"}
    assert found["width"] == pytest.approx({"a": 2, "b": -1})


@pytest.mark.parametrize("suite", SUITES)
def test_one_quantity_at_a_time_is_varied(suite):
    base = shape(suite).describe()
    of = {"tokens": "batch_size", "layers": "num_middle", "width": "width"}
    for quantity, values in VALUES[suite].items():
        for value in values:
            changed = shape(suite, **{quantity: value})
            differ = {k for k, v in changed.describe().items() if v != base[k]}
            assert differ <= {"model", of[quantity], *(["ffn", "heads"] * (quantity == "width"))}
            sizes = {"tokens": changed.tokens, "layers": changed.num_middle}
            assert (sizes | {"width": changed.config.hidden_size})[quantity] == value
            assert changed.num_swept == changed.num_middle


def test_the_study_ends_with_exponents_for_every_quantity(monkeypatch):
    monkeypatch.setattr(growth, "BASE", {"cpu": SMALL})
    values = {"tokens": (16, 32), "layers": (1, 2), "width": (16, 32)}
    monkeypatch.setattr(growth, "VALUES", {"cpu": values})
    monkeypatch.setattr(growth, "run_times", lambda run, prepare, advance=None: [1.0, 2.0])
    monkeypatch.setattr(growth, "_over_devices", lambda suite, count: {"calibration": 1.0 * count})
    *_, last = growth.study("cpu")
    assert last["complete"]
    assert last["exponents"].keys() == {"tokens", "layers", "width", "devices"}
    assert last["exponents"]["devices"] == pytest.approx({"calibration": 1})
    assert last["exponents"]["width"].keys() >= {"factor_sweep", "decomposition"}


def test_work_is_spread_over_devices(monkeypatch):
    monkeypatch.setattr(growth, "BASE", {"cpu": SMALL})
    seconds = growth.spread("cpu", 2)
    assert min(seconds.values()) > 0 and seconds.keys() == {"calibration", "step_emulator"}
