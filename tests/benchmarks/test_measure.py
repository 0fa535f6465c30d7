import sys
import time

import jax
import pytest

from benchmarks import measure
from benchmarks.measure import STUDIES, STUDY_SECONDS, Failed, Task, in_process, in_subprocess
from benchmarks.run import ORDER
from benchmarks.workloads import SUITES, WORKLOADS

TASK = Task("cpu", "smoke", "gradient")


def run_instead(monkeypatch, code: str) -> None:
    monkeypatch.setattr(measure, "_command", lambda task: [sys.executable, "-c", code])


def test_a_process_that_takes_too_long_is_ended_with_its_own_and_no_failure(monkeypatch):
    code = "import subprocess; print('{}', flush=True); subprocess.run(['sleep', '60'])"
    run_instead(monkeypatch, code)
    start = time.monotonic()
    assert list(in_subprocess(TASK, 3.0)) == [{}]
    assert time.monotonic() - start < 30


def test_a_process_that_fails_is_a_failure(monkeypatch):
    run_instead(monkeypatch, "exit(3)")
    with pytest.raises(Failed, match="code 3"):
        list(in_subprocess(TASK, 60.0))


def test_a_mistake_in_this_process_is_a_failure_of_that_phase_alone(monkeypatch, capsys):
    def records(task):
        raise ValueError("shapes differ")
        yield

    monkeypatch.setattr(measure, "records", records)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    with pytest.raises(Failed, match="ValueError: shapes differ"):
        list(in_process(TASK, 60.0))


def test_a_study_is_found_by_its_name_and_yields_as_it_grows(monkeypatch):
    monkeypatch.setattr("benchmarks.growth.study", lambda suite: iter([{"suite": suite}, {}]))
    records = list(measure.records(Task("device", "growth")))
    assert [found["record"] for found in records] == [{"suite": "device"}, {}]
    assert records[0]["environment"]["num_devices"] == jax.device_count()


@pytest.mark.parametrize("suite", SUITES)
def test_what_a_suite_measures_exists_and_every_study_has_its_time(suite):
    assert set(ORDER[suite]) <= {*WORKLOADS[suite], *STUDY_SECONDS[suite]}
    assert STUDY_SECONDS[suite].keys() <= STUDIES.keys()
    assert STUDY_SECONDS["cpu"].keys() == STUDIES.keys()
