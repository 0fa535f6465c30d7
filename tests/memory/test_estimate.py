"""The estimate covers what XLA and the system count, and little more."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.calibration.passes import Cotangents, layer_function, sweep_layer
from gradot_jax.compression.channel_set import channel_set_costs
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.curvature.tap import zero_taps
from gradot_jax.memory.estimate import ARENAS, estimate_memory
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.table import METHODS
from gradot_jax.models.checkpoint import save_model
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import count_params, init_params
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.layout import maps, shaped

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
BLOCK = CONFIG.family.block_shapes(CONFIG)
SIZES = {"batch_size": 2, "num_batches": 3, "length": 64}

MEASURE = """
import json, sys
import jax
import numpy as np
from gradot_jax.calibration.fidelity import gradient_fidelity
from gradot_jax.memory.estimate import estimate_memory
from gradot_jax.memory.process import peak_resident_bytes, reset_peak, resident_bytes
from gradot_jax.methods.compress import run_compression
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch

sizes, options, split = json.loads(sys.argv[2]), CompressionOptions(), AdapterSpec(2, 2)
config, params = load_model(sys.argv[1], memory_map=True)
shape = sizes["batch_size"], sizes["length"]
draw = np.random.default_rng(0).integers
ones = np.ones(shape, np.float32)
batches = [
    Batch(draw(0, config.vocab_size, shape), draw(0, config.vocab_size, shape), ones, ones)
    for _ in range(sizes["num_batches"])
]
jax.device_put(ones).block_until_ready()
assert reset_peak()
before = resident_bytes()
result = run_compression(config, params, split, batches, options, dtype="float32")
gradient_fidelity(config, params, result.emulator, batches[:2], dtype="float32")
estimate = estimate_memory(
    config, "float16", split, options=options, compute_dtype="float32", **sizes
)
print(peak_resident_bytes() - before, estimate.checkpoint + estimate.shared_host(1))
"""
TESTS_OWN = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
"""Settings of the tests under which programs compile, or are read back, in less memory."""


def estimate(config=CONFIG, **changes):
    asked = {"options": CompressionOptions(), "compute_dtype": "float32", **SIZES} | changes
    return estimate_memory(config, "float16", SPLIT, **asked)


def test_parts_that_are_arrays_are_counted_exactly():
    parts = estimate()
    params = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    assert parts.checkpoint == 2 * count_params(params)
    assert parts.shell == 2 * count_params(params.shell)
    assert parts.layer == (2 + 4) * count_params(BLOCK)
    assert parts.adapter == 4 * 2 * count_params(BLOCK)
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


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_has_an_estimate_and_only_streaming_ones_hold_no_model(method):
    parts = estimate(options=CompressionOptions(method=method.name))
    assert (parts.model == 0) == (parts.training == 0) == method.streams
    assert (parts.sums > 0) == (parts.factors > 0) == (method.reads in ("factors", "inputs"))
    assert (parts.decomposition > 0) == method.scores


def test_a_global_allocation_keeps_what_it_will_cut():
    later = estimate(options=CompressionOptions(allocation="global"))
    assert later.finished > estimate().finished + 4 * 8 * 256**2 * 4


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_sweep_takes_no_more_than_estimated(compute_dtype):
    parts = estimate(compute_dtype=compute_dtype)
    block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float16"), BLOCK)
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


@pytest.mark.parametrize("count", [None, 512])
def test_a_search_for_channels_takes_no_more_than_estimated(count):
    channels = BLOCK.layout.channels
    layer = {site: maps(BLOCK)[site] for site in (*channels.into, channels.out)}
    factors = {
        site: KroneckerFactors(shaped(i, i), shaped(i), shaped(o, o), None)
        for site, (i, o) in {site: weights.shape for site, weights in layer.items()}.items()
    }
    counted = channel_set_costs.lower(channels, layer, factors, 0.0, count).compile()
    used = counted.memory_analysis().temp_size_in_bytes
    parts = estimate(options=CompressionOptions(channel_score="gcs-set"))
    assert used <= parts.decomposition < 4 * used


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_compression_grows_to_the_estimate_and_not_to_half_of_it(tmp_path):
    draw = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.02 * draw(leaf.shape, np.float32), shapes)
    save_model(tmp_path / "model", CONFIG, params, dtype="float16")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), json.dumps(SIZES)]
    environment = {name: value for name, value in os.environ.items() if name not in TESTS_OWN}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, estimated = map(int, output.stdout.split())
    assert grown <= estimated < 2 * grown
