from benchmarks.rates import copy_rate, measure_rates, name, product_rate, product_shapes
from benchmarks.workloads import WORKLOADS

SMOKE = WORKLOADS["cpu"]["smoke"]


def test_rates_are_positive():
    assert product_rate(8, 4, 2, "float32") > 0
    assert product_rate(8, 4, 2, "bfloat16") > 0
    assert copy_rate(1024) > 0


def test_the_workloads_own_products_are_among_those_measured():
    assert (SMOKE.tokens, 16, 32) in product_shapes(SMOKE)
    assert (2048, 2048, 2048) in product_shapes(SMOKE)


def test_products_in_float32_are_measured_once(monkeypatch):
    monkeypatch.setattr("benchmarks.rates.product_shapes", lambda workload: [(16, 16, 16)])
    monkeypatch.setattr("benchmarks.rates.copy_rate", lambda: 1.0)
    rates = measure_rates(SMOKE)
    assert rates["products"] == rates["exact_products"]
    assert rates["products"].keys() == {name(16, 16, 16)}
    assert rates["flops_per_second"] == rates["exact_flops_per_second"]
    assert rates["peak_flops_per_second"] is None


def test_products_in_another_dtype_are_measured_apart_from_exact_ones(monkeypatch):
    monkeypatch.setattr("benchmarks.rates.product_shapes", lambda workload: [(16, 16, 16)])
    monkeypatch.setattr("benchmarks.rates.copy_rate", lambda: 1.0)
    rates = measure_rates(WORKLOADS["device"]["smoke"])
    assert rates["products"] != rates["exact_products"]
