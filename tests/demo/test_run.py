import dataclasses
import json

import pytest

from gradot_jax.demo import run
from gradot_jax.demo.report import bench_validity

QUANTITIES = (
    "zero_shot",
    "full_finetuned",
    "emulator_zero_shot",
    "emulator_finetuned",
    "plug_in",
    "delta",
)


def quick(settings):
    return dataclasses.replace(settings, steps=4, warmup=1)


def test_demo_reports_every_quantity_of_every_method(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "FINE_TUNING", {name: quick(s) for name, s in run.FINE_TUNING.items()})
    out = tmp_path / "demo"
    run.run_demo(out, methods=("magnitude",), tasks=("api",), seeds=(0,))
    result = json.loads((out / "result.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["magnitude", "empty"]
    for row in result["rows"]:
        for quantity in QUANTITIES:
            assert {"perplexity", "exact_match"} <= set(row[quantity])
        emulator, plugged = row["emulator_finetuned"], row["plug_in"]
        delta = row["delta"]
        assert delta["perplexity"] == pytest.approx(emulator["perplexity"] - plugged["perplexity"])
        assert delta["exact_match"] == pytest.approx(
            plugged["exact_match"] - emulator["exact_match"]
        )
    magnitude, empty = result["rows"]
    assert magnitude["gradient_relative_error"] < empty["gradient_relative_error"]
    assert empty["share_shipped"] < magnitude["share_shipped"] < 1
    assert {"V1", "V2", "V3"} == set(result["bench"])
    assert result["seconds"] > 0 and result["environment"]["jax"]
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "magnitude" in (out / "table.md").read_text()


def row(method, plug_in, emulator, zero=40.0, full=28.0, seed=0):
    quantities = dict(zip(QUANTITIES, (zero, full, 60.0, emulator, plug_in, 0.0), strict=True))
    quantities["delta"] = emulator - plug_in
    return {
        "method": method,
        "budget": 0.3,
        "seed": seed,
        "share_shipped": 0.5,
        "gradient_cosine": 0.9,
        "gradient_relative_error": 0.4,
        "loss_gap": 0.1,
        **{name: {"perplexity": value} for name, value in quantities.items()},
    }


def test_validity_checks_hold_and_fail_where_they_should():
    empty = row("empty", 45.0, 60.0)
    good = bench_validity([row("gradot", 30.0, 33.0), row("magnitude", 32.0, 34.0), empty])
    assert good["V1"]["holds"] and good["V2"]["holds"] and good["V3"]["holds"]
    assert not good["V3"]["noise_tested"]
    assert good["V3"]["plug_in_perplexity_above_gradot"]["magnitude"][0] == pytest.approx(2.0)
    weak = [row("gradot", 38.0, 37.0, full=36.0), row("empty", 38.0, 40.0, full=36.0)]
    checks = bench_validity(weak)
    assert not any(checks[name]["holds"] for name in ("V1", "V2", "V3"))


def test_methods_closer_than_seed_noise_fail_v3():
    noisy = [row("gradot", 30.0 + s, 35.0, seed=s) for s in range(3)]
    noisy += [row("magnitude", 32.1 - s, 35.0, seed=s) for s in range(3)]
    checks = bench_validity([*noisy, row("empty", 45.0, 60.0)])
    assert checks["V3"]["noise_tested"] and not checks["V3"]["holds"]
