import json

import pytest

from gradot_jax.comparison.measured import load_measured
from gradot_jax.comparison.published import beside, load_published, main
from gradot_jax.errors import InputError

QUESTION_SETS = "openbookqa piqa arc-easy arc-challenge hellaswag sciq webqs race".split()
CUT = {"train": 3, "development": 0, "report": 1}
PROTOCOL = {"preset": "paper", "split": "test", "items": 500, "bos": False, "cut": CUT}


def task(name, **protocol):
    metric = {"webqs": "exact_match", "wikitext-2": "perplexity"}.get(name, "accuracy")
    tuning = {"steps": 2, "batch_size": 4, "learning_rate": 1e-4}
    return {"metric": metric, "tuning": tuning, "protocol": PROTOCOL | protocol}


def row(name, seed, plug_in, method="gradot", budget=0.4, draw=0):
    metric = task(name)["metric"]
    values = {"zero_shot": 40.0, "emulator_zero_shot": 25.0, "emulator_finetuned": 30.0}
    values |= {"plug_in": plug_in, "delta": plug_in if plug_in == "nan" else plug_in - 30}
    values = {quantity: {metric: value} for quantity, value in values.items()}
    return {"method": method, "budget": budget, "draw": draw, "task": name, "seed": seed, **values}


def result(*rows, digest="d1", budgets=(0.4,), **tasks):
    names = dict.fromkeys(r["task"] for r in rows)
    settings = {"seeds": [0, 1], "draws": [0], "rates": [1.0], "compute_dtype": "bfloat16"}
    return {
        "model": {"name": "facebook/opt-1.3b", "digest": digest, "width": 2048},
        "settings": settings | {"split": {"num_bottom": 2, "num_top": 2, "inner": []}},
        "planned": [{"task": "race", "method": "gradot", "budget": b} for b in budgets],
        "tasks": {name: task(name) for name in names} | tasks,
        "rows": rows,
        "failures": {"crash-0.4": "too few layers"},
        "environment": {"gradot_jax": "0.1.0", "jax": "0.10.2", "device_kind": "TPU v4"},
    }


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def lines(tmp_path, *results):
    paths = [write(tmp_path / f"{i}.json", each) for i, each in enumerate(results)]
    return beside(load_published(), load_measured(paths), "OPT-1.3B").splitlines()


def cells(table, *first):
    (line,) = [line for line in table if line.startswith(f"| {' | '.join(first)} |")]
    return [cell.strip() for cell in line.split("|")[1 + len(first) : -1]]


def test_the_average_is_over_the_runs_that_all_question_sets_have(tmp_path):
    rows = [row(name, seed, 50.0 + seed) for name in QUESTION_SETS for seed in (0, 1)]
    alone = row("race", 2, 99.0)
    table = lines(tmp_path, result(*rows, alone))
    assert cells(table, "gradot", "plug-in", "average of 8") == [
        "49.8 [gradot-note]",
        "50.5 ± 0.5 (2)",
    ]
    gap = cells(table, "gradot", "plug-in - emulator fine-tuned", "average of 8")
    assert gap == ["4.8 [gradot-note]", "20.5 ± 0.5 (2)"]


def test_what_no_run_measured_is_not_run_and_never_guessed(tmp_path):
    rows = [row(name, 0, 50.0) for name in QUESTION_SETS[1:]]
    table = lines(tmp_path, result(*rows))
    assert cells(table, "gradot", "plug-in", "average of 8")[1] == "not run"
    assert cells(table, "crash", "plug-in", "average of 8")[1] == "not run"
    assert cells(table, "full model", "full fine-tuned", "average of 8")[1] == "not run"
    assert cells(table, "full model", "zero-shot", "openbookqa") == ["not available", "not run"]
    assert cells(table, "full model", "zero-shot", "piqa")[1] == "40.0 (1)"
    assert "- crash-0.4 was not run: too few layers" in table


def test_budgets_are_columns_and_a_run_that_diverged_says_so(tmp_path):
    good = [row(name, 0, 50.0) for name in QUESTION_SETS]
    lost = [row(name, 0, "nan", budget=0.2) for name in QUESTION_SETS]
    table = lines(tmp_path, result(*good, *lost, budgets=(0.4, 0.2)))
    assert cells(table, "system", "setting", "task")[1:] == ["ours, budget 0.4", "ours, budget 0.2"]
    assert cells(table, "gradot", "plug-in", "average of 8")[1:] == ["50.0 (1)", "diverged (1)"]


def test_the_protocol_is_what_the_results_record_and_is_told_where_tasks_differ(tmp_path):
    first = result(row("piqa", 0, 50.0), piqa=task("piqa", split="validation"))
    old = {"metric": "perplexity"}
    second = result(row("wikitext-2", 0, 9.0), **{"wikitext-2": old})
    table = lines(tmp_path, first, second)
    assert cells(table, "seeds") == ["1", "2"]
    assert cells(table, "measured by") == [
        "lm-eval 0.3 or older",
        "gradot_jax 0.1.0, jax 0.10.2, TPU v4, no lm-eval",
    ]
    assert cells(table, "BOS before a prompt") == ["no", "piqa no, wikitext-2 not recorded"]
    assert cells(table, "prompts that lost their beginning")[1].startswith(
        "piqa train 3, development 0, report 1"
    )
    assert "- gradot, emulator zero-shot, average of 8: the source says only" in "\n".join(table)
    assert cells(table, "split measured")[1] == "piqa validation, wikitext-2 not recorded"
    assert cells(table, "full model", "zero-shot", "wikitext-2")[1] == "40.0 (1)"


def test_results_that_do_not_belong_together_are_refused(tmp_path):
    first = write(tmp_path / "a.json", result(row("piqa", 0, 50.0)))
    other = write(tmp_path / "b.json", result(row("race", 0, 50.0), digest="d2"))
    with pytest.raises(InputError, match=r"b\.json: of another model"):
        load_measured([first, other])
    with pytest.raises(InputError, match=r"a\.json: has piqa, as an earlier file has"):
        load_measured([first, first])
    with pytest.raises(InputError, match="no result of a comparison, lacks environment, failures"):
        load_measured([write(tmp_path / "c.json", {})])


def test_the_command_finds_the_model_by_its_name_or_asks(tmp_path, capsys):
    content = result(row("piqa", 0, 50.0))
    main(["--result", str(write(tmp_path / "a.json", content))])
    assert capsys.readouterr().out.startswith("**OPT-1.3B**")
    content["model"]["name"] = "bundled"
    path = write(tmp_path / "b.json", content)
    with pytest.raises(SystemExit, match="2"):
        main(["--result", str(path)])
    assert "bundled is no model of the papers; --model says" in capsys.readouterr().err
    main(["--result", str(path), "--model", "OPT-6.7B"])
    assert "| model | OPT-6.7B | bundled, width 2048 |" in capsys.readouterr().out
