"""`gradot convert` on a whole file, and the commands on what it writes."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from gradot_jax.cli.main import main
from gradot_jax.models.checkpoint import load_model

DONE, USAGE, REFUSED = 0, 2, 3


@pytest.fixture
def write(tiny_gguf, tmp_path):
    def save(name="tiny.gguf", **change):
        path = tmp_path / name
        path.write_bytes(tiny_gguf(**change))
        return path

    return save


def test_a_file_becomes_a_model_that_the_commands_take(write, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["convert", str(write()), "--out", str(out)]) == DONE
    said = capsys.readouterr().out
    assert f"{out}: llama, 2 blocks" in said and "from F32, Q8_0 to float32 (exact)" in said
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    _, params = load_model(out)
    assert params.shell.embed_tokens.dtype == np.float32
    assert AutoTokenizer.from_pretrained(out).tokenize("the cat") == ["the", "Ġ", *"cat"]
    ask = ["generate", "--model", str(out), "--prompt", "the", "--max-tokens", "3"]
    assert main([*ask, "--mesh", "1", "1"]) == DONE
    assert main(["inspect", str(out)]) == DONE


def test_a_narrower_dtype_is_said(write, tmp_path, capsys):
    out = tmp_path / "model"
    command = ["convert", str(write().parent), "--out", str(out), "--dtype", "bfloat16"]
    assert main(command) == DONE
    assert "to bfloat16 (rounded)" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_one_of_several_is_chosen_by_its_name(write, tmp_path, capsys):
    folder, out = write("a.gguf").parent, tmp_path / "model"
    write("b.gguf", **{"llama.context_length": 32})
    assert main(["convert", str(folder), "--out", str(out)]) == REFUSED
    assert "found a.gguf, b.gguf" in capsys.readouterr().err
    assert main(["convert", str(folder), "--file", "b.gguf", "--out", str(out)]) == DONE
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 32


def test_what_is_there_stays_without_overwrite(write, tmp_path, capsys):
    path, out = write(), tmp_path / "model"
    out.mkdir()
    (out / "mine").touch()
    assert main(["convert", str(path), "--out", str(out)]) == REFUSED
    assert "--overwrite" in capsys.readouterr().err and (out / "mine").exists()
    assert main(["convert", str(path), "--out", str(out), "--overwrite"]) == DONE
    assert not (out / "mine").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"general.architecture": "mamba"}, "general.architecture"),
        ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre"),
        ({"llama.expert_count": 2}, "llama.expert_count"),
        ({"llama.block_count": 3}, "blk.2.attn_q.weight"),
        ({"general.name": b"\xff\xfe"}, "general.name"),
    ],
)
def test_a_refusal_is_one_paragraph_and_writes_nothing(change, word, write, tmp_path, capsys):
    path = write(**change)
    assert main(["convert", str(path), "--out", str(tmp_path / "model")]) == REFUSED
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and word in said
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_truncated_file_writes_nothing(write, tmp_path, capsys):
    path = write()
    path.write_bytes(path.read_bytes()[:-40])
    assert main(["convert", str(path), "--out", str(tmp_path / "model")]) == REFUSED
    assert "goes beyond the end of the file" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("source", [".", "tiny.gguf"])
def test_the_folder_of_the_file_is_never_replaced(source, write, tmp_path, capsys):
    path = write()
    command = ["convert", str(tmp_path / source), "--out", str(tmp_path), "--overwrite"]
    assert main(command) == REFUSED
    assert "holds the file to convert" in capsys.readouterr().err and path.is_file()
