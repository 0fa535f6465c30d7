"""The reproduction script on a checkpoint, data and text that are made here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tokenizers

from gradot_jax.models.checkpoint import save_model
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import init_params

ROOT = Path(__file__).parents[2]
WORDS = "the cat dog sat ran on under a mat log and then home it was red green big old".split()
LINE = " ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(60))


@pytest.fixture
def checkpoint(tmp_path):
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    source = tmp_path / "tokenizer"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    config = OPTConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=6,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    folder = tmp_path / "opt"
    save_model(folder, config, init_params(config, jax.random.key(0)), tokenizer_from=source)
    return folder


@pytest.fixture
def data(tmp_path):
    choices = {"text": ["red", "old"], "label": ["A", "B"]}
    question = {"choices": choices, "answerKey": "B"}
    rows = {
        "openbookqa": [{"question_stem": f"the {w} is", **question} for w in WORDS],
        "wikitext-2": [{"text": LINE}] * len(WORDS),
    }
    for task, lines in rows.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / "data" / task / f"{split}.jsonl").write_text(text)
    return tmp_path / "data"


def reproduce(script, *arguments, cwd=ROOT, **variables):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "reproduce" / script), *arguments],
        env=os.environ | {"GRADOT_PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def test_it_goes_from_a_checkpoint_to_the_published_table(checkpoint, data, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join([LINE] * 12))
    smaller = ["--limit", "8", "--batch-size", "4", "--steps", "2", "--seeds", "1"]
    smaller += ["--learning-rates", "1", "--methods", "gradot", "--budgets", "0.5"]
    smaller += ["--sequence-length", "16", "--num-sequences", "8", "--dtype", "float32"]
    run = reproduce(
        "opt-1.3b.sh",
        *smaller,
        cwd=tmp_path,
        MODEL="opt",
        DATA="data",
        CALIBRATION="text.txt",
        OUT="out",
        QUESTIONS="openbookqa",
        HF_HOME=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="1",
    )
    assert run.returncode == 0, run.stderr
    published = (tmp_path / "out" / "published.md").read_text()
    assert run.stdout.endswith(published)
    parts = (("questions", "openbookqa", "accuracy"), ("wikitext-2", "wikitext-2", "perplexity"))
    for part, task, metric in parts:
        result = json.loads((tmp_path / "out" / part / "result.json").read_text())
        (row,) = result["rows"]
        assert row["plug_in"][metric] > 0
        assert result["settings"]["split"]["num_bottom"] == 2
        (line,) = [x for x in published.splitlines() if f"| full model | zero-shot | {task} |" in x]
        assert line.endswith(f"| {row['zero_shot'][metric]:.1f} (1) |")
    assert "| gradot | plug-in | average of 8 | 49.8 [gradot-note] | not run |" in published
    assert "| text | - | paper |" in published
    assert "| items | - | 8 |" in published


@pytest.mark.parametrize("script", ["opt-1.3b.sh", "opt-6.7b.sh"])
def test_help_says_what_is_not_known_and_runs_nothing(script, tmp_path):
    run = reproduce(script, "--help", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "Cost: it has not been measured." in run.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--tasks", "piqa"], {}, "set QUESTIONS, OUT or MODEL, not --tasks"),
        (["--out=x"], {}, "set QUESTIONS, OUT or MODEL, not --out"),
        ([], {"ACCELERATOR": "abacus"}, "ACCELERATOR must be cpu, cuda or tpu"),
    ],
)
def test_what_would_mix_up_results_is_refused(arguments, variables, message, tmp_path):
    run = reproduce("opt-6.7b.sh", *arguments, cwd=tmp_path, **variables)
    assert run.returncode == 2
    assert message in run.stderr
    assert not list(tmp_path.iterdir())
