import dataclasses
import functools
import json

from gradot_jax.data.examples import take
from gradot_jax.demo import bundled, bundled_tasks
from gradot_jax.demo.bundled_tasks import Parts, load_tasks


def a_few(*given):
    """The tasks, with eight windows in each part."""

    def cut(parts):
        return Parts(*(take(examples, slice(8)) for examples in vars(parts).values()))

    loaded = load_tasks(*given).items()
    return {name: dataclasses.replace(task, parts=cut(task.parts)) for name, task in loaded}


def test_demo_measures_between_the_floor_and_the_full_model(tmp_path, monkeypatch):
    few = {"steps": 4, "warmup": 1, "batch_size": 4}
    quick = {n: dataclasses.replace(s, **few) for n, s in bundled.FINE_TUNING.items()}
    monkeypatch.setattr(bundled, "FINE_TUNING", quick)
    monkeypatch.setattr(bundled, "load_tasks", a_few)
    sources = dict(list(bundled_tasks.stdlib_sources().items())[:40])
    monkeypatch.setattr(bundled_tasks, "stdlib_sources", lambda: sources)
    for batch in ("_EVALUATION_BATCH", "_CALIBRATION_BATCH"):
        monkeypatch.setattr(bundled, batch, 8)
    small = functools.partial(bundled.bundled_testbed, num_sequences=8)
    monkeypatch.setattr(bundled, "bundled_testbed", small)
    out = tmp_path / "demo"
    bundled.run_demo(out, budget=0.3, methods=("magnitude",), tasks=("top",))
    result = json.loads((out / "result.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["full-finetune", "magnitude", "empty"]
    magnitude, empty = result["compressions"]
    assert magnitude["gradient_relative_error"] < empty["gradient_relative_error"]
    assert empty["share_shipped"] < magnitude["share_shipped"] < 1
    assert {"V1", "V2", "V3"} == set(result["validity"]["top"])
    assert "magnitude" in (out / "table.md").read_text()
