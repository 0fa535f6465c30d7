import json

import numpy as np
import pytest
import tokenizers

pytest.importorskip("lm_eval")

from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.errors import InputError
from gradot_jax.evaluation.harness_tasks import PAPER_TASKS, evaluate_tasks, harness_tasks
from gradot_jax.evaluation.lm_eval import HarnessModel


@pytest.fixture(scope="module")
def model(config, params, tmp_path_factory):
    """A tiny model over words, with a tokenizer that adds nothing."""
    words = {word: i for i, word in enumerate("<unk> </s> which one is it left right".split())}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return HarnessModel(config, params, load_tokenizer(folder), batch_size=4)


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "items.jsonl"
    data.write_text("".join(f'{{"text": "which one {n}", "gold": {n % 2}}}\n' for n in range(5)))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    choice = {
        "task": "sides",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["left", "right"],
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 2.0},
    }
    text = {
        "task": "texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
        "metadata": {"version": 1.0},
    }
    (tmp_path / "tasks").mkdir()
    for task in (choice, text):
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return tmp_path / "tasks"


def test_a_result_records_what_it_depends_on(model, folder):
    found = evaluate_tasks(model, ["sides", "texts"], include=folder, num_fewshot=1, limit=4)
    assert found["lm_eval"].startswith("0.")
    assert found["task_versions"] == {"sides": 2.0, "texts": 1.0}
    assert (found["bos"], found["bos_token"], found["max_length"]) == ("tokenizer", None, 40)
    assert found["num_fewshot"]["sides"] == 1 and found["limit"] == 4
    assert found["num_items"] == {"sides": 4, "texts": 4}
    assert 0 <= found["metrics"]["sides"]["acc"] <= 1
    assert np.isfinite(found["metrics"]["texts"]["word_perplexity"])
    json.dumps(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0, got -1"),
        ({"include": "no/such/folder"}, "no/such/folder: not a folder"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        evaluate_tasks(model, ["sides"], **options)


def test_data_that_is_not_there_is_named(model, folder):
    (folder.parent / "items.jsonl").unlink()
    with pytest.raises(InputError, match="the data of sides cannot be loaded"):
        evaluate_tasks(model, ["sides"], include=folder)


def test_names_are_split_at_commas_and_paper_stands_for_eight():
    assert harness_tasks(["piqa, sciq", "race"]) == ("piqa", "sciq", "race")
    assert harness_tasks(["piqa,paper,wikitext"]) == (
        "piqa",
        *(task for task in PAPER_TASKS if task != "piqa"),
        "wikitext",
    )
    assert len(PAPER_TASKS) == 8
    with pytest.raises(InputError, match="no harness task is named"):
        harness_tasks([" , "])
