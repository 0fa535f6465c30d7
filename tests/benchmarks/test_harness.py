import time

import jax
import jax.numpy as jnp

from benchmarks.floor import Cost
from benchmarks.harness import MIN_RUNS, Phase, measure, peak_rss_bytes, run_times

SAID = {"cost": Cost(flops=16, bytes=32), "batches": 1, "tokens": 4, "times": 3}


def test_a_jitted_phase_is_lowered_compiled_and_run_apart():
    made = []

    def prepare():
        made.append(jnp.ones((8, 8)))
        return (made[-1],)

    # Donation would fail on the second run if its argument were not made anew.
    phase = Phase(run=jax.jit(lambda x: x @ x, donate_argnums=0), prepare=prepare, **SAID)
    record = measure(phase)
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

    record = measure(Phase(run=run, prepare=tuple, **SAID))
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
    assert measure(phase)["program"]["argument_bytes"] == 4 * 8 * 8


def test_the_first_run_is_told_apart_from_those_that_count():
    calls = []

    def run():
        calls.append(time.sleep(0 if calls else 0.2))

    first, *others = run_times(run, tuple)
    assert first >= 0.2 > min(others) and len(others) >= MIN_RUNS


def test_a_very_long_phase_is_run_less_often(monkeypatch):
    monkeypatch.setattr("benchmarks.harness._PATIENCE_SECONDS", 0.01)
    assert len(run_times(lambda: time.sleep(0.02), tuple)) == 2


def test_a_run_ends_when_its_results_are_there():
    class Late:
        def block_until_ready(self):
            time.sleep(0.05)
            return self

    assert min(run_times(Late, tuple)) >= 0.05


def test_peak_memory_grows_with_what_is_held():
    before = peak_rss_bytes()
    block = b"x" * (before + 2**26)
    assert peak_rss_bytes() >= len(block) > before
