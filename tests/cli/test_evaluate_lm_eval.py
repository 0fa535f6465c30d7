import json
import sys

import pytest

pytest.importorskip("lm_eval")

from gradot_jax.cli.main import main

DONE, REFUSED = 0, 3


@pytest.fixture
def tasks(tmp_path):
    data = tmp_path / "items.jsonl"
    data.write_text("".join(f'{{"text": "the cat ran", "gold": {n % 2}}}\n' for n in range(5)))
    task = {
        "task": "homes",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(tmp_path / "cache"),
        },
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["home", "under a mat"],
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 2.0},
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "homes.yaml").write_text(json.dumps(task))
    return folder


def test_harness_tasks_measure_models_and_emulators(
    checkpoint, text, prompts, tasks, tmp_path, capsys
):
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    one = ["--mesh", "1", "1"]
    split = ["--num-bottom", "1", "--num-top", "0", "--budget", "0.5"]
    model = ["--model", str(checkpoint)]
    where = ["--calibration", str(text), "--out", str(run)]
    assert main(["compress", *model, *where, *split, *one]) == DONE
    bundle = ["--bundle", str(run / "bundle")]
    train = ["--train", str(prompts), "--num-steps", "2", "--batch-size", "2"]
    assert main(["finetune", *bundle, *train, "--out", str(tuned), *one]) == DONE

    harness = ["--lm-eval", "homes", "--lm-eval-include", str(tasks), "--limit", "4"]
    adapter = ["--adapter", str(tuned / "adapter")]
    for number, measured in enumerate((model, bundle, [*bundle, *adapter])):
        out = tmp_path / f"{number}.json"
        code = main(["evaluate", *measured, *harness, "--out", str(out), "--mesh", "2", "1"])
        assert code == DONE, capsys.readouterr().err
        result = json.loads(out.read_text())
        assert 0 <= result["metrics"]["homes"]["acc"] <= 1
        assert (result["num_items"], result["limit"]) == ({"homes": 4}, 4)
        assert (result["bos"], result["dtype"]) == ("tokenizer", "float32")
        assert result["task_versions"] == {"homes": 2.0} and result["num_fewshot"] == {"homes": 0}
        assert result["lm_eval"] and result["environment"]["jax"]
        assert "homes acc: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give either --data or --lm-eval"),
        (["--data", "a.jsonl", "--lm-eval", "piqa"], "give either --data or --lm-eval"),
        (["--data", "a.jsonl", "--limit", "3"], "go with --lm-eval"),
        (["--data", "a.jsonl", "--lm-eval-bos", "never"], "go with --lm-eval"),
        (["--lm-eval", ","], "no harness task is named"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(tmp_path, capsys, more, message):
    out = tmp_path / "out.json"
    assert main(["evaluate", "--model", "nowhere", "--out", str(out), *more]) == REFUSED
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_harness_is_named_with_its_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    command = ["evaluate", "--model", "nowhere", "--lm-eval", "piqa"]
    assert main([*command, "--out", str(tmp_path / "out.json")]) == REFUSED
    assert "gradot_jax[eval]" in capsys.readouterr().err
