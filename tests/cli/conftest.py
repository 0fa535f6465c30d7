"""Real Flax checkpoints with a tokenizer of as many words as they have embeddings, and text."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

GOLDEN = Path(__file__).parents[1] / "models" / "opt" / "golden"
WORDS = "the cat dog sat ran on under a mat log and then home it was red green big old".split()


@pytest.fixture(params=["pre_ln/flax", "pre_ln/flax_sharded", "post_ln_projection/flax_sharded"])
def any_checkpoint(request, tmp_path):
    return make_checkpoint(tmp_path / "model", request.param)


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "model", "pre_ln/flax")


def make_checkpoint(folder, variant):
    shutil.copytree(GOLDEN / variant, folder)
    vocabulary = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *WORDS])
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(400)))
    return file


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"the {w} ran", "completion": " home"} for w in ("cat", "dog", "log", "mat")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
