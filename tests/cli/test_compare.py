import json

import datasets
import pytest

from gradot_jax.cli.main import main

DONE, USAGE, REFUSED = 0, 2, 3
ROWS = [
    {"question": f"{w} ran", "answers": [a, "mat"], "url": ""}
    for w, a in (("cat", "home"), ("dog", "on"), ("log", "big"), ("mat", "red"))
]
CHOICES = [
    {
        "question_stem": f"the {w} is",
        "choices": {"text": ["red", "old"], "label": ["A", "B"]},
        "answerKey": "B",
        "id": w,
    }
    for w in ("cat", "dog", "log", "mat")
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    for name, rows in (("webqs", ROWS * 5), ("openbookqa", CHOICES)):
        (folder / name).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(lines)
    return folder


def compare(checkpoint, data, text, out, *more):
    model = ["--model", str(checkpoint), "--num-bottom", "1", "--num-top", "0"]
    where = ["--data", str(data), "--calibration", str(text), "--out", str(out)]
    sizes = ["--steps", "2", "--batch-size", "2", "--seeds", "2", "--num-sequences", "8"]
    return main(["compare", *model, *where, *sizes, *more])


def test_question_sets_on_a_checkpoint_go_through_and_go_on(make_llama, data, text, tmp_path):
    checkpoint, out = make_llama(tmp_path / "model", bos=False), tmp_path / "out"
    tasks = ["--tasks", "webqs,openbookqa", "--budgets", "0.5", "--learning-rates", "1"]
    methods = ["--methods", "full-finetune,gradot,empty"]
    assert compare(checkpoint, data, text, out, *tasks, *methods) == DONE
    result = json.loads((out / "result.json").read_text())
    assert result["failures"] == {}
    assert result["tasks"]["webqs"]["metric"] == "exact_match"
    assert result["tasks"]["openbookqa"]["metric"] == "accuracy"
    assert len(result["rows"]) == 3 * 2 * 2
    for row in result["rows"]:
        metric = result["tasks"][row["task"]]["metric"]
        assert 0 <= row["full_finetuned"][metric] <= 100
    cells = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    more = ["--methods", "full-finetune,gradot,empty,magnitude"]
    assert compare(checkpoint, data, text, out, *tasks, *more) == DONE
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in cells.items())
    assert "| magnitude" in (out / "table.md").read_text()


def test_a_plan_says_what_is_run_and_a_report_runs_nothing(
    make_llama, data, text, tmp_path, capsys
):
    checkpoint, out = make_llama(tmp_path / "model", bos=False), tmp_path / "out"
    stages = [
        {"methods": ["dense"], "budgets": [0.5], "tasks": ["webqs"]},
        {"methods": ["layer-drop"], "budgets": [0.5], "tasks": ["webqs"], "seeds": 2},
    ]
    variants = {"dense": {"method": "magnitude", "budget": 1.0, "attention_budget": "$budget"}}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"stages": stages, "variants": variants, "rates": [1.0]}))
    sizes = ["--steps", "2", "--batch-size", "2", "--num-sequences", "8"]
    where = ["--model", str(checkpoint), "--num-bottom", "1", "--num-top", "0", "--data", str(data)]
    command = ["compare", *where, *sizes, "--calibration", str(text), "--plan", str(plan)]
    assert main([*command, "--out", str(out), "--report-only"]) == DONE
    assert "3 of the planned runs are missing" in (out / "table.md").read_text()
    assert main([*command, "--out", str(out)]) == DONE
    result = json.loads((out / "result.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["dense", "layer-drop", "layer-drop"]
    assert result["systems"]["dense"] == "magnitude" and result["missing"] == 0
    assert "| dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sparse"], "unknown: sparse"),
        (["--budgets", "much"], "expected numbers"),
        (["--budgets", "0"], "budgets must lie in"),
        (["--seeds", "0"], "seeds must be a whole number, at least 1"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--learning-rates", "1,1"], "rates: expected some, each once"),
        (["--shard", "3/2"], "expected I/N with I from 1 to N, got '3/2'"),
        (["--plan", "plan.json", "--budgets", "0.5"], "budgets: said by the plan plan.json"),
        (["--plan", "absent.json"], "absent.json: cannot be read"),
        (["--tasks", "piqa"], "need --model"),
        (["--calibration", "text.txt"], "only with --model"),
        (["--model", "opt"], "needs --tasks and --calibration"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", "--out", str(out), *arguments]) == REFUSED
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["compare", "--out", str(tmp_path)]) == REFUSED
    assert "no comparison to go on with" in capsys.readouterr().err
