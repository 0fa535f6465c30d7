import logging
import sys

import pytest

from gradot_jax import progress
from gradot_jax.progress import track


@pytest.fixture
def clock(monkeypatch):
    """A second passes between any two times that are read."""
    times = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(times)))


@pytest.mark.usefixtures("clock")
def test_lines_tell_rate_and_time_left(caplog):
    caplog.set_level(logging.INFO, "gradot_jax")
    assert list(track(range(200), "sweep")) == list(range(200))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "sweep: 20 of 200, 1 s, 20/s, ETA 00:09"
    assert lines[-1] == "sweep: 200 of 200, 10 s, 20/s, ETA 00:00"
    assert len(lines) == 10


@pytest.mark.usefixtures("clock")
def test_work_of_unknown_length_has_a_rate_and_no_end(caplog):
    caplog.set_level(logging.INFO, "gradot_jax")
    list(track(iter(range(10)), "sweep"))
    assert [record.getMessage() for record in caplog.records] == ["sweep: 10 of ?, 1 s, 10/s"]


def test_a_terminal_gets_a_bar(monkeypatch, capsys, caplog):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    caplog.set_level(logging.INFO, "gradot_jax")
    assert list(track(range(3), "sweep")) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
    assert not caplog.records


def test_work_that_reports_nothing_is_only_passed_on(caplog):
    caplog.set_level(logging.INFO, "gradot_jax")
    assert list(track(range(3), "sweep", enabled=False)) == [0, 1, 2]
    assert not caplog.records
