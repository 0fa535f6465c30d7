"""Every command on a Llama as people have them: no BOS, several end tokens, norms in float32."""

import json
import re
import shutil

import numpy as np
import pytest

from gradot_jax.cli.main import main
from gradot_jax.files.safetensors import iterate_tensors
from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.run import forward

DONE, REFUSED = 0, 3
WORDS = "the cat dog sat ran on under a mat log and then home it was red green big old".split()


@pytest.fixture(scope="module", params=["no token", "<|im_start|>"])
def start(request):
    return request.param


@pytest.fixture(scope="module")
def folder(start, make_llama, tmp_path_factory):
    """With a model in shards, mostly bfloat16, its data, and what the commands will write."""
    root = tmp_path_factory.mktemp("llama")
    make_llama(root / "model", bos=start != "no token")
    text = " ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(800))
    (root / "text.txt").write_text(text)
    rows = [{"prompt": f"the {w} ran", "completion": " home"} for w in ("cat", "dog", "log", "mat")]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    question = {"question": "the cat", "choices": ["sat", "ran"], "answer": 1}
    (root / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return root


def run(folder, *command):
    words = [str(folder / word[1:]) if word.startswith("@") else word for word in command]
    return main(words)


COMPRESS = ["compress", "--model", "@model", "--calibration", "@text.txt", "--num-bottom", "1"]
COMPRESS += ["--num-top", "1", "--sequence-length", "16", "--num-sequences", "8", "--out", "@run"]


def test_the_model_goes_through_all_commands(folder, start, capsys):
    devices = ["--mesh", "1", "1"]
    assert run(folder, *COMPRESS, *devices, "--dry-run") == DONE
    assert run(folder, *COMPRESS, *devices, "--checkpoints", "@layers") == DONE
    said = capsys.readouterr().err
    assert f"document and prompt: {'none' if start == 'no token' else repr(start)}" in said
    tuning = ["finetune", "--bundle", "@run/bundle", "--train", "@prompts.jsonl", "--out", "@tuned"]
    rate = ["--learning-rate", "1e-2", "--num-steps", "3", "--batch-size", "2"]
    assert run(folder, *tuning, *rate, *devices) == DONE
    plug_in = ["plug-in", "--model", "@model", "--adapter", "@tuned/adapter", "--out", "@out"]
    assert run(folder, *plug_in, "--owner", "@run/owner") == DONE
    export = ["export", "--bundle", "@run/bundle", "--adapter", "@tuned/adapter", "--out", "@dense"]
    assert run(folder, *export) == DONE
    capsys.readouterr()
    assert run(folder, "inspect", "@run/bundle") == DONE
    shown = capsys.readouterr().out
    assert "k_proj" in shown and "mixed" in shown and "heads of 2 on 3 keys" in shown
    for data in ("text.txt", "prompts.jsonl", "questions.jsonl"):
        for what in (
            ["--model", "@out"],
            ["--bundle", "@run/bundle", "--adapter", "@tuned/adapter"],
        ):
            evaluate = ["evaluate", *what, "--data", f"@{data}", "--sequence-length", "16"]
            assert run(folder, *evaluate, *devices, "--out", "@x.json", "--overwrite") == DONE
            values = json.loads((folder / "x.json").read_text())
            assert values["bos_token"] == (None if start == "no token" else 1)
    capsys.readouterr()
    generate = ["generate", "--max-tokens", "5", "--prompt", "the cat", "a mat and"]
    assert run(folder, *generate, "--model", "@out", *devices) == DONE
    assert re.search(r"\nthe cat( [a-z]+)*\n", capsys.readouterr().out)
    drawn = ["--temperature", "2", "--top-p", "0.9", "--seed", "3"]
    assert run(folder, *generate, "--bundle", "@run/bundle", *drawn) == DONE
    check_written(folder)


def check_written(folder):
    """The middle came back bit for bit, and all of the configuration, tokenizer and template."""
    before, after = (
        {n: a for f in (folder / name).glob("*.safetensors") for n, a in iterate_tensors(f)}
        for name in ("model", "out")
    )
    assert before.keys() == after.keys()
    changed = {n.split(".")[2] for n in before if not np.array_equal(before[n], after[n])}
    assert changed == {"0", "3"}
    assert {n: a.dtype for n, a in before.items()} == {n: a.dtype for n, a in after.items()}
    original = json.loads((folder / "model" / "config.json").read_text())
    names = ("_name_or_path", "prefix", "transformers.js_config", "wandb_run", "_secret")
    at_home = {name: original[name] for name in names}
    for name, own in (("out", at_home), ("dense", {})):
        written = json.loads((folder / name / "config.json").read_text())
        crossed = {key: value for key, value in original.items() if key not in at_home}
        assert written == crossed | own | {"dtype": "bfloat16"}
    for name in ("out", "dense"):
        for file in ("chat_template.jinja", "tokenizer.json"):
            assert (folder / name / file).read_bytes() == (folder / "model" / file).read_bytes()
        settings = json.loads((folder / name / "generation_config.json").read_text())
        assert settings == {"eos_token_id": [2, 3]}
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for name in ("out", "dense"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32
        )
        ids = np.array([[4, 8, 15, 16, 23, 5]])
        with torch.no_grad():
            expected = model(torch.tensor(ids)).logits.numpy()
        got = forward(*load_model(folder / name), ids)
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_what_was_begun_goes_on(folder, start):
    devices, out = ["--mesh", "1", "1"], ["--overwrite", "--checkpoints", "@layers"]
    before = (folder / "run" / "bundle" / "manifest.json").read_bytes()
    assert run(folder, *COMPRESS, *devices, *out) == DONE
    assert (folder / "run" / "bundle" / "manifest.json").read_bytes() == before
    tuning = ["finetune", "--bundle", "@run/bundle", "--train", "@prompts.jsonl", *devices]
    settings = ["--learning-rate", "1e-2", "--batch-size", "2", "--schedule", "constant"]
    settings += ["--warmup-steps", "0", "--evaluate-every", "1"]
    for steps, where, more in (("3", "@a", []), ("1", "@b", []), ("3", "@b", ["--resume"])):
        command = [*tuning, *settings, "--num-steps", steps, "--out", where, *more]
        assert run(folder, *command) == DONE
    adapters = [(folder / name / "adapter" / "adapter.safetensors").read_bytes() for name in "ab"]
    assert adapters[0] == adapters[1]


def test_a_prompt_of_nothing_is_refused_where_nothing_begins_it(folder, start, capsys):
    code = run(folder, "generate", "--model", "@model", "--prompt", "", "--max-tokens", "2")
    assert code == (REFUSED if start == "no token" else DONE)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-tokens", "0"], "at least 1"),
        (["--temperature", "-1"], "temperature must"),
        (["--top-p", "0", "--temperature", "1"], "top_p must"),
        (["--top-p", "0.5"], "--top-p goes with"),
        (["--seed", "-1"], "seed must"),
        (["--max-tokens", "64"], "at most the 64 that the model can decode"),
        (["--adapter", "x"], "--adapter goes with --bundle"),
    ],
)
def test_generation_that_makes_no_sense_is_refused(options, reason, folder, capsys):
    command = ["generate", "--model", "@model", "--prompt", "the cat", *options]
    assert run(folder, *command) == REFUSED
    assert reason in capsys.readouterr().err


def test_what_is_generated_ends_at_any_of_the_end_tokens(folder):
    from gradot_jax.models.checkpoint import end_tokens

    config, _ = load_model(folder / "model")
    assert config.end_token_ids == (2,) and end_tokens(folder / "model", config) == (2, 3)


@pytest.mark.parametrize("ends", [24, [2, 99], "two", [-1]])
def test_an_end_token_that_the_model_has_not_is_refused(ends, folder, capsys):
    file = folder / "model" / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps({"eos_token_id": ends}))
    command = ["generate", "--model", "@model", "--prompt", "the cat", "--max-tokens", "2"]
    assert run(folder, *command) == REFUSED
    assert "generation_config.json: eos_token_id is" in capsys.readouterr().err
    file.write_text(before)


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json"])
def test_an_altered_bundle_meets_a_hash_and_not_a_parser(file, folder, tmp_path, capsys):
    shutil.copytree(folder / "run" / "bundle", tmp_path / "bundle")
    altered = tmp_path / "bundle" / file
    altered.write_bytes(b"?" * altered.stat().st_size)
    command = ["generate", "--bundle", str(tmp_path / "bundle"), "--prompt", "the cat"]
    assert run(folder, *command) == REFUSED
    assert f"{file}: altered or damaged" in capsys.readouterr().err
