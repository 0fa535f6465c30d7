import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks import measure, run
from benchmarks.measure import Failed
from benchmarks.run import run_study, run_suite, run_workload
from gradot_jax.errors import InputError

ROOT = Path(__file__).parents[2]


SMALL_RATES = """
from functools import partial
from benchmarks import harness, measure
harness.product_shapes = lambda workload: [(512, 512, 512)]
harness.copy_rate = partial(harness.copy_rate, 2**20)
measure.main()
"""


def test_each_phase_of_the_cpu_suite_has_its_own_process_and_is_written_as_it_goes(
    tmp_path, monkeypatch, capsys
):
    command = measure._command

    def with_small_rates(task):
        own = command(task)
        return [own[0], "-c", SMALL_RATES, *own[3:]] if task.phase == "rates" else own

    monkeypatch.setattr(measure, "_command", with_small_rates)
    assert not run_suite("cpu", ["smoke"], ["step_full"], tmp_path, 300.0)
    result = json.loads((tmp_path / "smoke.json").read_text())
    assert list(result["phases"]) == ["gradient", "step_full"]
    assert result["environment"]["platform"] == result["suite"] == "cpu"
    # This process has eight virtual devices, those that measure have one.
    assert result["environment"]["num_devices"] == 1
    assert result["phases"]["gradient"]["gradients"] == 1
    step = result["phases"]["step_full"]
    assert step["runs"] >= 5 and step["program"]["temp_bytes"] > 0
    assert 0 < step["fraction_of_floor"] < 1.5
    assert result["totals"]["tuning"]["step_full"]["tokens_per_second"] > 0
    assert json.loads((tmp_path / "targets.json").read_text())["targets"]
    assert "smoke: step_full measured" in capsys.readouterr().out


def test_the_device_suite_runs_in_one_process(tmp_path, monkeypatch, small_rates):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    monkeypatch.setattr(run, "in_subprocess", None)
    assert not run_suite("device", ["smoke"], ["decomposition"], tmp_path, 300.0)
    result = json.loads((tmp_path / "smoke.json").read_text())
    assert result["environment"]["num_devices"] == 8
    assert result["workload"]["dtype"] == "bfloat16"


def test_without_an_accelerator_the_device_suite_runs_smoke_alone(tmp_path):
    with pytest.raises(InputError, match="only smoke runs without one"):
        run_suite("device", ["opt-1.3b"], [], tmp_path, 300.0)


@pytest.mark.parametrize("names", [{"names": ["huge"]}, {"phases": ["sleep"]}])
def test_an_unknown_name_is_refused_with_those_that_exist(names, tmp_path):
    asked = {"names": ["smoke"], "phases": []} | names
    with pytest.raises(InputError, match=r"unknown (workload|phase) .*; there are"):
        run_suite("cpu", **asked, folder=tmp_path, time_limit=300.0)
    assert not list(tmp_path.iterdir())


def test_what_the_time_did_not_allow_is_named(tmp_path, capsys):
    run_suite("cpu", ["smoke"], ["compress"], tmp_path, 0.0)
    assert "left out: rates, gradient, compress" in capsys.readouterr().out
    assert not (tmp_path / "smoke.json").exists()


def _measured(seconds: float):
    cost = {"flops": 1, "exact_flops": 0, "symmetric_flops": 0, "bytes": 1}
    record = {"median_seconds": seconds, "batches": 1, "tokens": 1, "times": 1, "cost": cost}
    rates = {"flops_per_second": 1, "exact_flops_per_second": 1, "bytes_per_second": 1}
    return {"environment": {}, "record": record | rates}


def test_a_phase_that_fails_is_named_and_the_others_are_measured(tmp_path):
    def fails(task, seconds):
        if task.phase == "compress":
            raise Failed("ended with code 1")
        yield _measured(1.0)

    path = tmp_path / "smoke.json"
    phases = ["compress", "packaging"]
    run_workload("cpu", "smoke", phases, path, time.monotonic() + 60, fails)
    result = json.loads(path.read_text())
    assert result["phases"]["compress"] == {"failed": "ended with code 1"}
    assert result["phases"]["packaging"]["gradients"] == 1


def test_a_study_is_written_as_it_grows_and_its_end_is_told(tmp_path):
    seen = []

    def grows(task, seconds):
        for count in range(3):
            yield {"environment": {}, "record": {"count": count, "complete": count == 2}}
            seen.append(json.loads((tmp_path / "growth.json").read_text())["count"])

    deadline = time.monotonic() + 60
    assert run_study("cpu", "growth", tmp_path / "growth.json", deadline, grows)
    assert seen == [0, 1, 2]


def test_the_suite_loads_nothing_but_numerical_libraries():
    code = (
        "import sys, benchmarks.run, benchmarks.growth, benchmarks.decomposition\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    unwanted = {"transformers", "datasets", "orbax", "tyro", "huggingface_hub", "matplotlib"}
    assert not (unwanted | {"torch", "tokenizers"}) & set(loaded.stdout.split())
