"""The harness on the bundled model and on it plugged in, against our own evaluators."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.special

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from gradot_jax.data.examples import choice_examples, eval_batches, text_examples
from gradot_jax.data.records import read_records
from gradot_jax.data.tokenizer import encode, load_tokenizer
from gradot_jax.demo.corpus import bundled_model
from gradot_jax.errors import InputError
from gradot_jax.evaluation.lm_eval import HarnessModel
from gradot_jax.evaluation.multiple_choice import multiple_choice
from gradot_jax.evaluation.perplexity import perplexity
from gradot_jax.evaluation.scores import sequence_scores
from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.families import read_config
from gradot_jax.models.run import forward
from gradot_jax.models.split import AdapterSpec, adapter_of
from gradot_jax.offsite.plug_in import plug_in
from gradot_jax.parallel import make_mesh

MODULES = "os json random string tarfile logging".split()
QUESTIONS = "Where do I find {0}? | Which module defines {0}? | {0} belongs to? | See {0}.".split(
    "|"
)
TEXT = "The module named json reads and writes text. " * 4


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(bundled_model())


@pytest.fixture(scope="module")
def models():
    """The bundled model, and the same around a tuned adapter."""
    config, params = load_model(bundled_model())
    adapter = adapter_of(params, AdapterSpec(2, 2))
    tuned = jax.tree.map(lambda leaf: leaf + 0.05 * np.abs(leaf).max() * np.sign(leaf), adapter)
    return {"full": (config, params), "plugged_in": (config, plug_in(params, tuned))}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Twenty questions with two to four answers; the last is longer than the model's context."""
    rows = []
    for number in range(20):
        name = f"{MODULES[number % 6]}_{number}"
        question = QUESTIONS[number % 4].strip().format(name)
        choices = [*MODULES[: 2 + number % 3], "a longer answer"][: 2 + number % 3]
        rows.append({"question": question, "choices": choices, "answer": number % 2})
    rows[-1]["question"] = "one two three " * 60 + rows[-1]["question"]
    file = tmp_path_factory.mktemp("items") / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def tasks(records):
    """A harness task over the same file."""
    folder = records.parent / "tasks"
    folder.mkdir()
    task = {
        "task": "items",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(records)},
            "cache_dir": str(records.parent / "cache"),
        },
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 3.0},
    }
    (folder / "items.yaml").write_text(json.dumps(task))
    return folder


def harness(model, tasks, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(
        model=model, tasks=["items"], task_manager=manager, bootstrap_iters=0, **options
    )


@pytest.mark.parametrize("name", ["full", "plugged_in"])
def test_each_choice_scores_as_in_our_own_evaluator(models, tokenizer, records, tasks, name):
    config, params = models[name]
    found = harness(HarnessModel(config, params, tokenizer), tasks)
    samples = sorted(found["samples"]["items"], key=lambda sample: sample["doc_id"])
    theirs = [float(score) for sample in samples for ((score, _),) in sample["resps"]]

    items = read_records(str(records))
    examples, cut = choice_examples(tokenizer, items, config.bos_token_id, 128)
    batches = list(eval_batches(examples, 8))
    ours = np.concatenate([sequence_scores(config, params, b).log_likelihood for b in batches])
    assert cut == len(items.records[-1].choices)
    np.testing.assert_allclose(theirs, ours[: len(theirs)], rtol=1e-5, atol=1e-5)

    expected = multiple_choice(config, params, tokenizer, items, batch_size=8)
    metrics = found["results"]["items"]
    assert metrics["acc,none"] == expected.accuracy
    assert metrics["acc_norm,none"] == expected.accuracy_normalised


def rolling(model, *texts):
    return model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)],
        disable_tqdm=True,
    )


def test_rolling_log_likelihood_of_a_window_is_that_of_our_perplexity(models, tokenizer):
    config, params = models["full"]
    length = len(encode(tokenizer, TEXT))
    examples = text_examples(tokenizer, [TEXT], length, config.bos_token_id)
    expected = perplexity(config, params, eval_batches(examples, 1))
    (total,) = rolling(HarnessModel(config, params, tokenizer), TEXT)
    assert expected.num_tokens == length
    np.testing.assert_allclose(-total / length, expected.nats_per_token, rtol=1e-5)


def test_rolling_log_likelihood_predicts_every_token_once(models, tokenizer):
    config, params = models["full"]
    model = HarnessModel(config, params, tokenizer, max_length=24)
    ids = [config.bos_token_id, *encode(tokenizer, TEXT)]
    expected = 0.0
    for start in range(0, len(ids) - 1, 24):
        end = min(start + 24, len(ids) - 1)
        first = max(end - 24, 0)
        logits = np.asarray(forward(config, params, np.array([ids[first:end]])), np.float64)[0]
        table = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
        expected += sum(table[at - first, ids[at + 1]] for at in range(start, end))
    assert (len(ids) - 1) % 24 and len(ids) > 48
    np.testing.assert_allclose(rolling(model, TEXT, "", TEXT), [expected, 0, expected], rtol=1e-5)


def score(model, *pairs):
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return model.loglikelihood(requests, disable_tqdm=True)


def test_each_bucket_of_lengths_compiles_once(models, tokenizer):
    config, params = models["full"]
    model = HarnessModel(config, params, tokenizer, batch_size=3)
    pairs = [("word " * count, " end") for count in (1, 2, 3, 5, 30, 4, 31, 70, 29, 400)]
    before = sequence_scores._cache_size()
    first = score(model, *pairs)
    assert sequence_scores._cache_size() == before + 3
    assert score(model, *reversed(pairs)) == first[::-1]
    assert sequence_scores._cache_size() == before + 3


def test_long_prompts_lose_their_beginning_and_keep_bos(models, tokenizer):
    config, params = models["full"]
    model = HarnessModel(config, params, tokenizer, max_length=16)
    start = [model.bos_token]
    row = model._row(("p", "c"), start + list(range(100, 140)), [7, 8, 9])
    assert row == (start + list(range(127, 140)), [7, 8, 9])
    bare = HarnessModel(config, params, tokenizer, bos="never", max_length=16)
    row = bare._row(("p", "c"), list(range(100, 140)), [7, 8, 9])
    assert row == (list(range(126, 140)), [7, 8, 9])
    with pytest.raises(InputError, match="has 17 tokens, expected 1 to the sequence length 16"):
        model._row(("p", "c"), start, list(range(17)))


def test_bos_is_the_tokenizers_or_none(models, tokenizer):
    config, params = models["full"]
    asked = {
        bos: HarnessModel(config, params, tokenizer, bos=bos) for bos in ("tokenizer", "never")
    }
    assert asked["tokenizer"].tok_encode("a") == tokenizer("a").input_ids
    assert asked["never"].tok_encode("a") == encode(tokenizer, "a")
    assert (asked["tokenizer"].bos_token, asked["never"].bos_token) == (config.bos_token_id, None)
    (with_bos,), (without,) = (score(model, ("import", " json")) for model in asked.values())
    assert abs(with_bos[0] - without[0]) > 1e-3
    assert score(asked["tokenizer"], ("", " json")) == score(asked["never"], ("", " json"))


def test_a_mesh_changes_no_score(models, tokenizer):
    config, params = models["plugged_in"]
    pairs = [("import", " json"), ("from os import", " path"), ("The", " module is long")]
    single = score(HarnessModel(config, params, tokenizer, batch_size=2), *pairs)
    meshed = HarnessModel(config, params, tokenizer, batch_size=3, mesh=make_mesh(2, 2))
    assert meshed.batch_size == 4
    found = score(meshed, *pairs)
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in single], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in single]


def generate(model, *pairs):
    requests = [Instance("generate_until", {}, pair, i) for i, pair in enumerate(pairs)]
    return model.generate_until(requests, disable_tqdm=True)


def test_generated_text_is_the_likeliest_token_after_token(models, tokenizer):
    config, params = models["full"]
    model = HarnessModel(config, params, tokenizer, batch_size=2)
    prompts = ["from json import", "import os", "The module"]
    expected = []
    for prompt in prompts:
        ids = model.tok_encode(prompt)
        start = len(ids)
        for _ in range(4):
            # What follows a token does not reach it.
            padded = np.array([ids + [0] * (16 - len(ids))])
            token = int(forward(config, params, padded)[0, len(ids) - 1].argmax())
            if token == config.eos_token_id:
                break
            ids.append(token)
        expected.append(tokenizer.decode(ids[start:]))
    assert generate(model, *((prompt, {"max_gen_toks": 4}) for prompt in prompts)) == expected
    whole = expected[0]
    stop = whole[len(whole) // 2 :][:2]
    settings = {"max_gen_toks": 4, "until": ["\x00", stop]}
    assert generate(model, (prompts[0], settings)) == [whole[: whole.index(stop)]]


def test_generated_text_ends_at_any_of_the_end_tokens(models, tokenizer):
    config, params = models["full"]
    request = ("import os", {"max_gen_toks": 6})
    (text,) = generate(HarnessModel(config, params, tokenizer), request)
    second = encode(tokenizer, text)[1]
    model = HarnessModel(config, params, tokenizer, end_ids=(2, second))
    (shorter,) = generate(model, request)
    assert shorter and text.startswith(shorter) and len(shorter) < len(text)


def test_a_model_without_begin_or_end_is_refused(models, tokenizer):
    _, params = models["full"]
    bare = dataclasses.replace(
        read_config({"model_type": "qwen2", "vocab_size": 2048}), num_hidden_layers=2
    )
    with pytest.raises(InputError, match="neither bos_token_id nor eos_token_id"):
        HarnessModel(bare, params, tokenizer)
    assert HarnessModel(bare, params, tokenizer, end_ids=(7,)).prefix_token_id == 7


def test_generation_refuses_what_it_cannot_do(models, tokenizer):
    model = HarnessModel(*models["full"], tokenizer)
    with pytest.raises(InputError, match="generates greedily"):
        generate(model, ("a", {"do_sample": True}))
    with pytest.raises(InputError, match=r"max_gen_toks must lie in \[1, 128\)"):
        generate(model, ("a", {"max_gen_toks": 128}))


def test_a_diverged_model_is_refused_by_the_request_that_shows_it(models, tokenizer):
    config, params = models["full"]
    lost = jax.tree.map(lambda leaf: leaf * np.float32("nan"), params)
    model = HarnessModel(config, lost, tokenizer, batch_size=2)
    with pytest.raises(InputError, match="likelihood of ' json' after 'import' is NaN: the model"):
        score(model, ("import", " json"))
    with pytest.raises(InputError, match="likelihood of the text 'The module named"):
        rolling(model, TEXT)
    with pytest.raises(InputError, match=r"no token is likeliest after '.*import os'"):
        generate(model, ("import os", {"max_gen_toks": 4}))


def test_runs_where_torch_is_not_installed(tasks):
    code = f"""
import sys
from importlib.machinery import PathFinder

class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] == "torch"
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.demo.corpus import bundled_model
from gradot_jax.evaluation.lm_eval import HarnessModel
from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.families import read_config
model = HarnessModel(*load_model(bundled_model()), load_tokenizer(bundled_model()))
manager = TaskManager(include_path={str(tasks)!r}, include_defaults=False)
found = simple_evaluate(model=model, tasks=["items"], task_manager=manager, limit=2)
assert 0 <= found["results"]["items"]["acc,none"] <= 1
assert "torch" not in sys.modules
"""
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ)
    assert done.returncode == 0, done.stderr
