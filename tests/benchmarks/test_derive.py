import pytest

from benchmarks.derive import derive, totals

RATES = {"flops_per_second": 10.0, "exact_flops_per_second": 5.0, "bytes_per_second": 10.0}


def record(seconds, *, batches=0, times=1, flops=10, exact=0, symmetric=0):
    cost = {"flops": flops, "exact_flops": exact, "symmetric_flops": symmetric, "bytes": 1}
    program = {"argument_bytes": 5, "output_bytes": 4, "temp_bytes": 3, "alias_bytes": 4}
    return {"median_seconds": seconds, "batches": batches, "tokens": 6 * batches} | {
        "times": times,
        "cost": cost,
        "program": program,
        "peak_bytes": 10 * seconds,
    }


def test_time_is_told_in_gradients_per_batch_and_as_a_fraction_of_the_floor():
    phases = derive(
        {
            "gradient": record(2, batches=1),
            "two": record(8, batches=2),
            "none": record(4),
            "layer": record(4, times=3),
        },
        RATES,
    )
    assert [phase["gradients"] for phase in phases.values()] == [1, 2, 2, 6]
    assert [phase["tokens_per_second"] for phase in phases.values()] == [3, 1.5, None, None]
    assert phases["two"]["fraction_of_floor"] == 1 / 8
    assert phases["two"]["utilisation"] is None


def test_the_floor_of_pairs_counted_once_is_told_apart():
    phases = {"gradient": record(2, batches=1), "sweep": record(8, exact=20, symmetric=10)}
    sweep = derive(phases, RATES)["sweep"]
    assert (sweep["floor_seconds"], sweep["symmetric_floor_seconds"]) == (5, 3)
    assert sweep["fraction_of_symmetric_floor"] == 3 / 8


def test_the_share_of_a_published_peak_counts_the_methods_own_arithmetic():
    rates = RATES | {"peak_flops_per_second": 20.0}
    assert derive({"gradient": record(2, batches=1)}, rates)["gradient"]["utilisation"] == 0.25


def test_a_phase_that_failed_stays_as_it_is():
    phases = derive({"gradient": record(2, batches=1), "two": {"failed": "code 1"}}, RATES)
    assert phases["two"] == {"failed": "code 1"}
    assert totals(phases) == {}
    phases = derive({"gradient": {"failed": "code 1"}, "two": record(1)}, RATES)
    assert phases["two"]["gradients"] is None


def test_a_calibration_and_a_compression_are_the_sums_of_their_parts():
    phases = {
        "gradient": record(2, batches=1),
        "calibration_forward": record(4, batches=2),
        "factor_sweep": record(3, batches=2, times=2, exact=10, symmetric=5),
        "decomposition": record(2, times=4),
        "selection": record(0.5, times=4),
    }
    found = totals(derive(phases, RATES))
    assert found["calibration"] == {
        "seconds": 10,
        "over_floor": 10 / (1 + 2 * 3),
        "over_symmetric_floor": 10 / (1 + 2 * 2),
    }
    assert found["compression"] == {"parts_seconds": 20, "decomposition": 0.4}


def test_steps_are_compared_with_that_of_all_weights():
    phases = {
        "gradient": record(2, batches=1),
        "step_emulator": record(1, batches=1),
        "step_all": record(5, batches=1),
    }
    tuning = totals(derive(phases, RATES))["tuning"]
    assert tuning["step_emulator"]["speedup"] == pytest.approx(5)
    assert tuning["step_emulator"]["memory_reduction"] == tuning["step_all"]["speedup"] == 1
