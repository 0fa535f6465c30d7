import json

import pytest

from benchmarks import report
from benchmarks.run import Benchmark, derive, main
from gradot_jax.errors import InputError


def test_a_run_writes_what_the_report_prints(tmp_path, capsys, monkeypatch):
    main(Benchmark(workloads=("smoke",), phases=("step_full",), out=tmp_path))
    result = json.loads((tmp_path / "smoke.json").read_text())
    assert list(result["phases"]) == ["gradient", "step_full"]
    assert result["environment"]["platform"] == result["suite"] == "cpu"
    assert result["phases"]["gradient"]["gradients"] == 1
    step = result["phases"]["step_full"]
    assert step["runs"] >= 5 and step["program"]["temp_bytes"] > 0
    assert 0 < step["fraction_of_floor"] < 1.5
    monkeypatch.setattr("sys.argv", ["report", "--results", str(tmp_path)])
    capsys.readouterr()
    report.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("**smoke**: 1 + 2 + 1 blocks, D 16")
    assert lines[-1].startswith("| step full |")
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_what_the_time_did_not_allow_is_named(tmp_path, capsys):
    main(Benchmark(workloads=("smoke",), phases=("compress",), out=tmp_path, time_limit=0))
    assert "left out: rates, gradient, compress" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_time_is_told_in_gradients_per_batch_and_as_a_fraction_of_the_floor():
    def record(seconds, batches):
        return {"median_seconds": seconds, "batches": batches, "tokens": 6 * batches} | {
            "flops": 10,
            "bytes": 1,
        }

    rates = {"flops_per_second": 10.0, "bytes_per_second": 10.0}
    phases = derive({"gradient": record(2, 1), "two": record(8, 2), "none": record(4, 0)}, rates)
    assert [phases[name]["gradients"] for name in phases] == [1, 2, 2]
    assert [phases[name]["tokens_per_second"] for name in phases] == [3, 1.5, None]
    assert phases["two"]["fraction_of_floor"] == 1 / 8


@pytest.mark.parametrize("options", [{"workloads": ("huge",)}, {"phases": ("sleep",)}])
def test_an_unknown_name_is_refused_with_those_that_exist(options, tmp_path):
    with pytest.raises(InputError, match=r"unknown (workload|phase) .*; there are"):
        main(Benchmark(**options, out=tmp_path))
    assert not list(tmp_path.iterdir())
