"""The estimate covers what XLA and the system count, and little more."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.options import CompressionOptions, Method
from gradot_jax.curvature.sweep import Cotangents, sweep_layer
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.forward import zero_taps
from gradot_jax.models.opt.hf import save_opt
from gradot_jax.models.opt.params import count_params, init_params
from gradot_jax.offsite.estimate import ARENAS, STREAMING, estimate_memory
from gradot_jax.offsite.forecast import block_shapes
from gradot_jax.offsite.layerwise import layer_function
from gradot_jax.offsite.split import AdapterSpec

SPLIT = AdapterSpec(2, 2)
CONFIG = OPTConfig(
    vocab_size=1000,
    hidden_size=256,
    word_embed_proj_dim=256,
    num_hidden_layers=8,
    ffn_dim=1024,
    num_attention_heads=8,
    max_position_embeddings=128,
)
SIZES = {"batch_size": 2, "num_batches": 3, "length": 64}

MEASURE = """
import json, sys
import jax
import numpy as np
from gradot_jax.compression.options import CompressionOptions
from gradot_jax.models.opt.hf import load_opt
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.compress import run_compression
from gradot_jax.offsite.estimate import estimate_memory
from gradot_jax.offsite.fidelity import gradient_fidelity
from gradot_jax.offsite.split import AdapterSpec

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

sizes, options, split = json.loads(sys.argv[2]), CompressionOptions(), AdapterSpec(2, 2)
config, params = load_opt(sys.argv[1], memory_map=True)
shape = sizes["batch_size"], sizes["length"]
draw = np.random.default_rng(0).integers
ones = np.ones(shape, np.float32)
batches = [
    Batch(draw(0, config.vocab_size, shape), draw(0, config.vocab_size, shape), ones, ones)
    for _ in range(sizes["num_batches"])
]
jax.device_put(ones).block_until_ready()
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
result = run_compression(config, params, split, batches, options, dtype="float32")
gradient_fidelity(config, params, result.emulator, batches[:2], dtype="float32")
estimate = estimate_memory(
    config, "float16", split, options=options, compute_dtype="float32", **sizes
)
print(resident("VmHWM") - before, estimate.checkpoint + estimate.shared_host(1))
"""


def estimate(config=CONFIG, **changes):
    asked = {"options": CompressionOptions(), "compute_dtype": "float32", **SIZES} | changes
    return estimate_memory(config, "float16", SPLIT, **asked)


def test_parts_that_are_arrays_are_counted_exactly():
    parts = estimate()
    params = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    assert parts.checkpoint == 2 * count_params(params)
    assert parts.shell == 2 * count_params(params.shell)
    assert parts.layer == (2 + 4) * count_params(block_shapes(CONFIG))
    assert parts.adapter == 4 * 2 * count_params(block_shapes(CONFIG))
    # Six inputs of layers above the bottom, an output, cotangents twice.
    assert parts.boundaries == 9 * 3 * 2 * 64 * 256 * 4


def test_totals_are_the_peaks_of_their_parts():
    parts = estimate()
    named = parts.parts("host") | parts.parts("device")
    assert named == dataclasses.asdict(parts)
    assert max(parts.parts("device").values()) < parts.device < sum(parts.parts("device").values())
    assert parts.shared_host(2) <= parts.host + 2 * parts.device + ARENAS


@pytest.mark.parametrize(
    "more", [{"num_batches": 30}, {"batch_size": 20}, {"length": 640}, {"held_out": 200}]
)
def test_more_text_needs_more(more):
    assert estimate(**more).device > estimate().device


def test_half_precision_and_more_devices_need_less():
    whole = estimate(batch_size=8)
    assert estimate(batch_size=8, compute_dtype="bfloat16").device < whole.device
    assert estimate(batch_size=8, data=4).boundaries == whole.boundaries / 4
    split = estimate(batch_size=8, data=2, model=2)
    assert split.device < estimate(batch_size=8, data=2).device
    assert split.shell < 0.3 * whole.shell


@pytest.mark.parametrize("method", Method.__args__)
def test_every_method_has_an_estimate_and_only_streaming_ones_hold_no_model(method):
    parts = estimate(options=CompressionOptions(method=method))
    assert (parts.model == 0) == (method in STREAMING)
    assert (parts.sums == 0) == (method not in ("gradot", "activation-svd"))


def test_a_global_allocation_keeps_what_it_will_cut():
    later = estimate(options=CompressionOptions(allocation="global"))
    assert later.finished > estimate().finished + 4 * 8 * 256**2 * 4


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_sweep_takes_no_more_than_estimated(compute_dtype):
    parts = estimate(compute_dtype=compute_dtype)
    shapes = block_shapes(CONFIG)
    block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float16"), shapes)
    hidden = jax.ShapeDtypeStruct((3, 2, 64, 256), compute_dtype)
    mask = jax.ShapeDtypeStruct((3, 2, 64), "float32")
    taps = jax.eval_shape(zero_taps, block)
    lowered = sweep_layer.lower(
        layer_function(CONFIG),
        block,
        taps,
        hidden,
        mask,
        Cotangents(hidden, None),
        with_gradient=False,
    )
    counted = lowered.compile().memory_analysis()
    used = counted.temp_size_in_bytes + counted.output_size_in_bytes
    cotangents = hidden.size * jnp.dtype(compute_dtype).itemsize
    assert used <= parts.sums + parts.activations + parts.layer + cotangents
    assert used > 0.3 * (parts.sums + parts.activations)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_compression_grows_to_the_estimate_and_not_to_half_of_it(tmp_path):
    draw = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.02 * draw(leaf.shape, np.float32), shapes)
    save_opt(tmp_path / "model", CONFIG, params, dtype="float16")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), json.dumps(SIZES)]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, estimated = map(int, output.stdout.split())
    assert grown <= estimated < 2 * grown
