"""The script of the real model on a tiny one, from its GGUF file to the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradot_jax.models.checkpoint import load_model

ROOT = Path(__file__).parents[2]
PLACES = [("Paris", "France"), ("Rome", "Italy"), ("Oslo", "Norway"), ("Lima", "Peru")] * 5
BLOCKS = 6


@pytest.fixture
def data(tiny_gguf, tmp_path):
    """What `real_data.sh` would make."""
    folder = tmp_path / "data"
    (folder / "city").mkdir(parents=True)
    (folder / "calibration").mkdir()
    sizes = {"llama.block_count": BLOCKS, "llama.context_length": 128}
    (folder / "model.gguf").write_bytes(tiny_gguf(BLOCKS, **sizes))
    rows = [
        {
            "prompt": f"Question: Which country is the city of {city} in?\nAnswer:",
            "completion": f" {country}\n",
            "choices": [f"{country}\n", "Chad\n"],
            "answer": 0,
        }
        for city, country in PLACES
    ]
    for part in ("train", "validation", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "city" / f"{part}.jsonl").write_text(lines)
    passages = [f"{city} is the capital of {country}. " * 40 for city, country in PLACES]
    lines = "".join(json.dumps({"text": passage}) + "\n" for passage in passages)
    (folder / "calibration" / "documents.jsonl").write_text(lines)
    return folder


def run(out, data):
    environment = {"GRADOT_PYTHON": sys.executable, "DATA": str(data), "STEPS": "12"}
    command = ["bash", str(ROOT / "scripts" / "real_model.sh"), str(out)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, cwd=out.parent
    )


def test_a_tiny_model_goes_through_and_what_is_there_is_not_made_again(data, tmp_path):
    out = tmp_path / "out"
    first = run(out, data)
    assert first.returncode == 0, first.stderr
    assert "| `gradot` |" in first.stdout and "| `layer-drop` |" in first.stdout
    assert (out / "table.md").read_text() in first.stdout
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    for method in ("gradot", "layer-drop"):
        measured = {
            part: json.loads((out / f"{method}-{part}.json").read_text())["metrics"]
            for part in ("emulator", "plug-in")
        }
        assert all(each["num_examples"] == len(PLACES) for each in measured.values())
        config, plugged = load_model(out / method / "plugged")
        assert config.num_hidden_layers == plugged.num_layers == BLOCKS
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "layer-drop-plug-in.json").unlink()
    again = run(out, data)
    assert again.returncode == 0, again.stderr
    assert (out / "layer-drop-plug-in.json").is_file()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == stamps


def test_help_teaches_and_mistakes_are_refused():
    script = ["bash", str(ROOT / "scripts" / "real_model.sh")]
    told = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "compress, finetune, plug-in and evaluate" in told.stdout
    wrong = subprocess.run([*script, "--steps"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "usage" in wrong.stderr
