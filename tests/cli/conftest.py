"""Checkpoints with a tokenizer of as many words as they have embeddings, and text.

Those of OPT are as Flax wrote them; a Llama is as people have them, in shards, mostly bfloat16.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from gradot_jax.files.safetensors import iterate_tensors, write_tensors
from gradot_jax.models.checkpoint import save_model
from gradot_jax.models.families import read_config
from gradot_jax.models.params import init_params

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


SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 18,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "rope_theta": 1000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "_name_or_path": "somebody/a-model",
    "prefix": "</s>",
    "wandb_run": "k3j4",
    "_secret": 123,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}


def write_tokenizer(folder, *, bos):
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))


@pytest.fixture(scope="session")
def make_llama():
    """Makes a Llama in a folder, whose tokenizer puts a token in front of texts or none."""

    def make(folder, *, bos):
        params = init_params(read_config(LLAMA), jax.random.key(3), jnp.bfloat16)
        save_model(folder, read_config(LLAMA), params, max_shard_bytes=8000)
        for file in folder.glob("*.safetensors"):
            tensors = dict(iterate_tensors(file))
            norms = {n: 1 + 1e-3 * np.arange(18, dtype=np.float32) for n in tensors if "norm" in n}
            write_tensors(file, {**tensors, **norms}, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(LLAMA))
        write_tokenizer(folder, bos=bos)
        return folder

    return make
