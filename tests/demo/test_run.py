import dataclasses
import json

from gradot_jax.demo import run


def test_demo_measures_between_the_floor_and_the_full_model(tmp_path, monkeypatch):
    quick = {n: dataclasses.replace(s, steps=4, warmup=1) for n, s in run.FINE_TUNING.items()}
    monkeypatch.setattr(run, "FINE_TUNING", quick)
    out = tmp_path / "demo"
    run.run_demo(out, budget=0.3, methods=("magnitude",), tasks=("top",))
    result = json.loads((out / "result.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["full-finetune", "magnitude", "empty"]
    magnitude, empty = result["compressions"]
    assert magnitude["gradient_relative_error"] < empty["gradient_relative_error"]
    assert empty["share_shipped"] < magnitude["share_shipped"] < 1
    assert {"V1", "V2", "V3"} == set(result["validity"]["top"])
    assert "magnitude" in (out / "table.md").read_text()
