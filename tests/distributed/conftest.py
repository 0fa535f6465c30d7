"""A checkpoint whose sizes divide over four devices, text, and several processes of a command."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers

from gradot_jax.models.checkpoint import save_model
from gradot_jax.models.families import read_config
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import init_params

WORDS = "the cat dog sat ran on under a mat log and then home it was red green big old new".split()
CONFIG = OPTConfig(
    vocab_size=4 + len(WORDS),
    hidden_size=16,
    num_hidden_layers=4,
    ffn_dim=32,
    num_attention_heads=2,
    max_position_embeddings=16,
    word_embed_proj_dim=16,
)
GROUPED = read_config(
    {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 4 + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 16,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
)
"""Of which two devices split the queries and both have the keys."""

PROGRAM = """
import functools
from jaxlib import _jax
# Left to themselves, the collectives of XLA for CPUs look up the name of the machine.
collectives = functools.partial(_jax.make_gloo_tcp_collectives, hostname="127.0.0.1")
_jax.make_gloo_tcp_collectives = collectives
from gradot_jax.cli.main import program
program()
"""


def write_checkpoint(folder, config):
    """Random weights, gains and biases too, and a tokenizer of whole words."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        gain = path[-1].name == "scale"
        return (gain + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    save_model(folder, config, jax.tree.map_with_path(fill, shapes))
    vocabulary = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *WORDS])
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", CONFIG)


@pytest.fixture(scope="session")
def grouped_checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("grouped") / "checkpoint", GROUPED)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(900)))
    return file


@pytest.fixture
def start_together():
    """Starts a command as two processes of two devices each; returns the processes."""
    running = []

    def start(arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        cluster = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
        program = [sys.executable, "-c", PROGRAM, *map(str, arguments), *cluster]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
        for process_id in ("0", "1"):
            process = subprocess.Popen(
                [*program, "--process-id", process_id],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            running.append(process)
        return running[-2:]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def run_together(start_together):
    """Runs a command as two processes of two devices each; returns what each printed."""

    def run(arguments):
        processes = start_together(arguments)
        printed = [process.communicate(timeout=120) for process in processes]
        for process, (_, errors) in zip(processes, printed, strict=True):
            assert process.returncode == 0, errors
        return [output for output, _ in printed]

    return run
