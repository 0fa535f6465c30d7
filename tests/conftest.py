"""Test settings, the one table of tolerances, and a model of the smallest size that is sharp.

Eight CPU devices, full matmul precision, no silent rank promotion. The tolerances are relative to
the largest entry expected; none is loosened to make a test pass.

A test's programs run for microseconds and compile for a tenth of a second: they are compiled
cheaply, once for all workers and commands of a run, and dropped at the end of their module.
"""

import atexit
import ctypes
import gc
import importlib.util
import mmap
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path

CHEAP_COMPILATION = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def _known_to_xla(flag: str) -> bool:
    """Whether this jaxlib has a flag: one it does not have would end the process."""
    folder = Path(importlib.util.find_spec("jaxlib").origin).parent
    for library in sorted(folder.glob("*.so"), key=lambda file: -file.stat().st_size):
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
            if m.find(flag.encode()) >= 0:
                return True
    return False


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The threads of a linear algebra library wait for each other in a loop.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ["JAX_PLATFORMS"] == "cpu":
    given = os.environ.get("XLA_FLAGS", "")
    cheap = {k: v for k, v in CHEAP_COMPILATION.items() if k not in given and _known_to_xla(k)}
    os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{k}={v}" for k, v in cheap.items())]).strip()
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Made by the first process of a run and handed to its workers and to every command they start.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gradot-tests-xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from gradot_jax import parallel
from gradot_jax.memory.process import resident_bytes
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import Params, init_params
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.linear import LowRank

# Commands keep all that they compile, too: no test's program takes long.
parallel.MIN_COMPILE_SECONDS = 0
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

TOLERANCES = {
    "float64": 1e-10,  # linear algebra on the host
    "float32": 2e-6,  # a product or two
    "float32_model": 2e-5,  # a pass through a model, forward or backward
    "bfloat16": 3e-2,
    "bfloat16_model": 0.15,  # a backward pass whose every activation is rounded
    "monte_carlo": 6e-2,  # four standard errors of the largest entry at 4,096 samples
}
PLATFORM_FACTOR = {"cpu": 1, "gpu": 4, "tpu": 16}


_CODE_BYTES = 512 * 2**20
_resident_after_drop = [resident_bytes()]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Drops compiled programs, megabytes each: at a module's end, and when they are many."""
    grown = (resident_bytes() or 0) - (_resident_after_drop[0] or 0) > _CODE_BYTES
    if grown or nextitem is None or nextitem.path != item.path:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        _resident_after_drop[0] = resident_bytes()


@pytest.fixture(scope="session")
def assert_close():
    """Asserts that trees agree within a named tolerance, relative to each leaf's largest entry.

    `rounding` is added for what is known to cancel: an estimate from eps and the terms' size.
    """

    def check(actual, expected, tolerance: str, rounding: float = 0.0) -> None:
        relative = (TOLERANCES[tolerance] + rounding) * PLATFORM_FACTOR[jax.default_backend()]
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
        for (path, got), wanted in pairs:
            got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
            scale = np.abs(wanted).max(initial=0) or 1.0
            np.testing.assert_allclose(
                got, wanted, rtol=0, atol=relative * scale, err_msg=jax.tree_util.keystr(path)
            )

    return check


@pytest.fixture(scope="session")
def with_signs_of():
    """Turns components of factors to the signs of others.

    A component's sign is that of its largest entry in the whitened space; where two entries are
    the largest, rounding chooses between them.
    """

    def turn(expected, got):
        if not isinstance(got, LowRank):
            return got
        sign = np.sign((np.asarray(got.left) * np.asarray(expected.left)).sum(-2, keepdims=True))
        return LowRank(got.left * sign, got.right * sign.swapaxes(-1, -2), got.bias)

    def align(expected, got):
        return jax.tree.map(turn, expected, got, is_leaf=lambda leaf: isinstance(leaf, LowRank))

    return align


@pytest.fixture(scope="session")
def toy_model():
    """Builds `(config, params)`: D 8, H 2, F 12, V 13, L 5; options are fields of the config."""

    @functools.cache
    def build(dtype: str = "float32", **changes) -> tuple[OPTConfig, Params]:
        sizes = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 5, "ffn_dim": 12}
        sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
        config = OPTConfig(**(sizes | {"word_embed_proj_dim": 8} | changes))
        rng = np.random.default_rng(0)

        def fill(path, leaf) -> jax.Array:
            # Biases and gains vary too: constant ones would hide a mistake in them.
            gain = path[-1].name == "scale"
            return jnp.asarray(gain + 0.4 * rng.normal(size=leaf.shape), dtype)

        shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
        return config, jax.tree.map_with_path(fill, shapes)

    return build


@pytest.fixture(scope="session")
def toy_batch():
    """Builds a `Batch` of random tokens for `toy_model`, every token counted, `[B, 6]`."""

    def build(seed: int = 0, size: int = 8) -> Batch:
        tokens = np.random.default_rng(seed).integers(0, 13, (size, 7))
        ones = np.ones((size, 6), np.float32)
        return Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], ones, ones)))

    return build


@pytest.fixture(scope="session")
def gguf_bytes():
    """Packs metadata and `(name, shape, number of the type, data)` of tensors as a GGUF file."""
    numbers = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11}

    def text(value: str | bytes) -> bytes:
        data = value.encode() if isinstance(value, str) else value
        return struct.pack("<Q", len(data)) + data

    def value(given) -> bytes:
        if isinstance(given, str | bytes):
            return struct.pack("<I", 8) + text(given)
        if isinstance(given, list):
            return struct.pack("<IIQ", 9, 8, len(given)) + b"".join(map(text, given))
        if isinstance(given, np.ndarray):
            kind = numbers[given.dtype.char]
            return struct.pack("<IIQ", 9, kind, given.size) + given.tobytes()
        code = {bool: "?", int: "I" if given >= 0 else "q", float: "f"}[type(given)]
        return struct.pack(f"<I{code}", numbers[code], given)

    def pack(metadata, tensors=(), *, version=3, alignment=32) -> bytes:
        pairs = metadata.items() if isinstance(metadata, dict) else metadata
        head, data = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(pairs)), b""
        head += b"".join(text(key) + value(given) for key, given in pairs)
        for name, shape, number, own in tensors:
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
            head += text(name) + dimensions + struct.pack("<IQ", number, len(data))
            data += own + bytes(-len(own) % alignment)
        return head + bytes(-len(head) % alignment) + data

    return pack


@pytest.fixture(scope="session")
def tiny_gguf(gguf_bytes):
    """A GGUF file of a Llama of 32 features in Q8_0, of so many blocks of weights."""
    words = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "the"]
    metadata = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": np.array([3] + [1] * (len(words) - 1), np.int32),
        "tokenizer.ggml.merges": ["h e", "t he"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    shapes = {"attn_norm": (32,), "ffn_norm": (32,)}
    maps = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    shapes |= dict.fromkeys(maps, (32, 32))

    def stored(blocks: int):
        rng = np.random.default_rng(0)
        every = {"token_embd.weight": (len(words), 32), "output_norm.weight": (32,)}
        every |= {
            f"blk.{i}.{name}.weight": shape for i in range(blocks) for name, shape in shapes.items()
        }
        for name, shape in every.items():
            if len(shape) == 1:
                yield name, shape, 0, rng.normal(size=shape).astype(np.float32).tobytes()
            else:  # Q8_0: a half float and 32 whole numbers
                scales = np.full((shape[0], 1), 0.01, np.float16).view(np.uint8)
                quants = rng.integers(0, 256, shape, np.uint8)
                yield name, shape, 8, np.concatenate([scales, quants], 1).tobytes()

    def build(blocks: int = 2, **change) -> bytes:
        return gguf_bytes(metadata | change, list(stored(blocks)))

    return build
