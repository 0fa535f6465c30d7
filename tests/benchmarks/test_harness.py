import os
import subprocess
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks import harness
from benchmarks.floor import Cost
from benchmarks.harness import (
    MIN_RUNS,
    Phase,
    copy_rate,
    measure_phase,
    measure_rates,
    new_process,
    peak_bytes,
    product_rate,
    product_shapes,
    program_bytes,
    run_times,
    summary,
)
from benchmarks.workloads import WORKLOADS
from gradot_jax.memory.process import peak_rss_bytes

SMOKE = WORKLOADS["cpu"]["smoke"]
SAID = {"cost": Cost(flops=16, bytes=32), "batches": 1, "tokens": 4, "times": 3}


def test_a_jitted_phase_is_lowered_compiled_and_run_one_after_the_other():
    made = []

    def prepare():
        made.append(jnp.ones((8, 8)))
        return (made[-1],)

    # Donation would fail on the second run if its argument were not made anew.
    phase = Phase(run=jax.jit(lambda x: x @ x, donate_argnums=0), prepare=prepare, **SAID)
    record = measure_phase(phase)
    assert record["lower_seconds"] > 0 and record["compile_seconds"] > 0
    assert 0 < record["min_seconds"] <= record["median_seconds"]
    assert record["runs"] >= MIN_RUNS and len(made) == record["runs"] + 2
    assert record["program"]["flops"] >= 2 * 8**3
    assert record["program"]["output_bytes"] >= 4 * 8 * 8
    assert record["peak_bytes"] >= record["before_bytes"] > 2**20
    assert {name: record[name] for name in ("batches", "tokens", "times")} == {
        "batches": 1,
        "tokens": 4,
        "times": 3,
    }
    assert Cost(**record["cost"]) == SAID["cost"]


def test_a_phase_that_donates_its_state_hands_it_on():
    start = jnp.zeros(4)
    seen = []

    def advance(arguments, result):
        assert arguments[0].is_deleted()
        seen.append(float(result[0]))
        return (result,)

    run_times(jax.jit(lambda x: x + 1, donate_argnums=0), lambda: (start,), advance)
    assert seen == list(range(1, len(seen) + 1)) and len(seen) >= MIN_RUNS


def test_compiling_a_function_of_several_programs_is_its_first_run_less_the_median():
    calls = []

    def run():
        calls.append(time.sleep(0.2 if not calls else 0.002))
        return jnp.zeros(1)

    record = measure_phase(Phase(run=run, prepare=tuple, **SAID))
    assert record["lower_seconds"] is None and record["program"] is None
    assert record["compile_seconds"] >= 0.1 > record["median_seconds"]
    assert len(calls) == record["runs"] + 1


def test_the_program_of_such_a_function_is_analysed_where_it_is_given():
    double = jax.jit(lambda x: x @ x)
    one = jnp.ones((8, 8))
    phase = Phase(
        run=lambda: [double(one), double(one)],
        prepare=tuple,
        program=lambda: double.lower(one),
        **SAID,
    )
    assert measure_phase(phase)["program"]["argument_bytes"] == 4 * 8 * 8


def test_the_first_run_is_told_apart_from_those_that_count():
    calls = []

    def run():
        calls.append(time.sleep(0 if calls else 0.2))

    first, *others = seconds = run_times(run)
    assert first >= 0.2 > min(others) and len(others) >= MIN_RUNS
    assert summary(seconds)["runs"] == len(others)
    assert summary(seconds)["min_seconds"] == min(others)


def test_a_very_long_phase_is_run_less_often(monkeypatch):
    monkeypatch.setattr("benchmarks.harness._PATIENCE_SECONDS", 0.01)
    assert len(run_times(lambda: time.sleep(0.02))) == 2


def test_a_run_ends_when_its_results_are_there():
    class Late:
        def block_until_ready(self):
            time.sleep(0.05)
            return self

    assert min(run_times(Late)) >= 0.05


def test_short_phases_are_run_more_often(monkeypatch):
    monkeypatch.setattr(harness, "timed", lambda run, *arguments: (0.25, run(*arguments)))
    monkeypatch.setattr(harness, "_ENOUGH_SECONDS", 2.0)
    assert len(run_times(tuple)) == 1 + 8
    monkeypatch.setattr(harness, "_ENOUGH_SECONDS", 100.0)
    assert len(run_times(tuple)) == 1 + harness._MAX_RUNS


def test_peak_memory_is_that_of_the_accelerator_where_there_is_one(monkeypatch):
    assert peak_bytes() == pytest.approx(peak_rss_bytes(), rel=0.1)
    monkeypatch.setattr(harness, "peak_device_bytes", lambda: 7)
    assert peak_bytes() == 7


def test_a_donated_result_counts_once_in_what_a_program_needs():
    program = {"argument_bytes": 5, "output_bytes": 4, "temp_bytes": 3, "alias_bytes": 4}
    assert program_bytes(program) == 5 + 4 + 3 - 4


def test_what_a_process_of_its_own_is_told_first_is_known_to_nothing_else(monkeypatch):
    monkeypatch.delenv("SAID", raising=False)
    with new_process(os.putenv, "SAID", "1") as process:
        assert process.submit(os.getpid).result() != os.getpid()
        assert process.submit(subprocess.getoutput, "echo $SAID").result() == "1"
    assert subprocess.getoutput("echo $SAID") == ""


def test_rates_are_positive():
    assert product_rate((8, 4, 2), "float32") > 0
    assert product_rate((8, 4, 2), "bfloat16") > 0
    assert copy_rate(1024) > 0


def test_the_workloads_own_products_are_among_those_measured():
    assert (SMOKE.tokens, 16, 32) in product_shapes(SMOKE)
    assert (2048, 2048, 2048) in product_shapes(SMOKE)


@pytest.mark.parametrize(("suite", "once"), [("cpu", True), ("device", False)])
def test_exact_products_are_measured_once_more_in_another_dtype_alone(suite, once, small_rates):
    rates = measure_rates(WORKLOADS[suite]["smoke"])
    assert (rates["products"] == rates["exact_products"]) == once
    assert rates["products"].keys() == rates["exact_products"].keys() == {"8 x 8 x 8"}
    assert rates["flops_per_second"] == rates["products"]["8 x 8 x 8"]
    assert rates["exact_flops_per_second"] == rates["exact_products"]["8 x 8 x 8"]
    assert rates["peak_flops_per_second"] is None
