"""Weights left in the file, or placed array by array, are the same and take the memory they say."""

import json
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.safetensors import iterate_tensors, read_specs, write_tensors
from gradot_jax.models.checkpoint import load_model, save_model
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import (
    concatenate_blocks,
    get_block,
    init_params,
    unstack_blocks,
)
from gradot_jax.models.run import forward
from gradot_jax.parallel import make_mesh

LAYOUTS = [
    *("pre_ln", "post_ln_projection", "no_final_norm", "untied", "no_bias", "no_affine", "gelu"),
    "pre_ln/flax",
    "post_ln_projection/flax",
    "pre_ln/flax_sharded",
    "post_ln_projection/flax_sharded",
]

MEASURE = """
import json, sys
from gradot_jax.models.checkpoint import load_model

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

options = json.loads(sys.argv[3])
load_model(sys.argv[1], **options)
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS"), resident("RssAnon")
kept = load_model(sys.argv[2], **options)
print(resident("VmHWM") - before[0], resident("RssAnon") - before[1])
"""


def assert_same(mapped, loaded):
    assert mapped[0] == loaded[0]
    jax.tree.map(np.testing.assert_array_equal, mapped[1].shell, loaded[1].shell)
    pairs = zip(*(unstack_blocks(m[1].segments) for m in (mapped, loaded)), strict=True)
    for block, expected in pairs:
        jax.tree.map(np.testing.assert_array_equal, block, expected)
    dtypes = ({leaf.dtype for leaf in jax.tree.leaves(m[1])} for m in (mapped, loaded))
    assert next(dtypes) == next(dtypes)


def assert_mapped(params):
    for leaf in jax.tree.leaves(params):
        assert isinstance(leaf, np.ndarray) and not leaf.flags.writeable
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params.segments)} == {1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_memory_mapped_model_has_the_weights_of_a_loaded_one(golden, layout):
    mapped = load_model(golden / layout, memory_map=True)
    assert_same(mapped, load_model(golden / layout, dtype=None))
    assert_mapped(mapped[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 1500])
def test_a_memory_mapped_model_has_the_dtype_of_its_shards(
    golden, tmp_path, dtype, max_shard_bytes
):
    config, params = load_model(golden / "pre_ln")
    save_model(tmp_path / "half", config, params, dtype=dtype, max_shard_bytes=max_shard_bytes)
    mapped = load_model(tmp_path / "half", memory_map=True)
    assert mapped[1].shell.embed_tokens.dtype == jnp.dtype(dtype)
    assert_same(mapped, load_model(tmp_path / "half", dtype=dtype))
    assert_mapped(mapped[1])


def test_arrays_that_flax_wrote_in_chunks_are_put_together(golden, tmp_path, monkeypatch):
    source = golden / "pre_ln" / "flax" / "flax_model.msgpack"
    tree = flax.serialization.msgpack_restore(source.read_bytes())
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    (tmp_path / source.name).write_bytes(flax.serialization.msgpack_serialize(tree))
    (tmp_path / "config.json").write_bytes((golden / "pre_ln" / "config.json").read_bytes())
    expected = load_model(golden / "pre_ln")
    assert_same(load_model(tmp_path), expected)
    assert_same(load_model(tmp_path, memory_map=True), expected)


def test_a_memory_mapped_model_runs_as_it_is(golden):
    config, params = load_model(golden / "pre_ln")
    _, mapped = load_model(golden / "pre_ln" / "flax", memory_map=True)
    ids = jnp.arange(5)[None]
    np.testing.assert_array_equal(forward(config, mapped, ids), forward(config, params, ids))


def test_nothing_is_copied_by_taking_single_blocks(golden):
    _, mapped = load_model(golden / "pre_ln", memory_map=True)
    block = get_block(mapped.segments[1], 0)
    for leaf, stored in zip(*map(jax.tree.leaves, (block, mapped.segments[1])), strict=True):
        assert np.shares_memory(leaf, stored)


def test_numbers_not_finite_are_refused_in_mapped_files_too(golden, tmp_path):
    tensors = dict(iterate_tensors(golden / "pre_ln" / "model.safetensors"))
    tensors["model.decoder.layers.1.fc2.bias"][-1] = np.nan
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_bytes((golden / "pre_ln" / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"layers\.1\.fc2\.bias holds NaN or Inf"):
        load_model(tmp_path, memory_map=True)


def test_mixed_dtypes_are_left_in_the_file_as_they_are(golden, tmp_path):
    tensors = dict(iterate_tensors(golden / "pre_ln" / "model.safetensors"))
    half, embedding = "model.decoder.layers.1.fc2.bias", "model.decoder.embed_tokens.weight"
    tensors[half] = tensors[half].astype(np.float16)
    tensors[embedding] = tensors[embedding].astype(jnp.bfloat16)
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_bytes((golden / "pre_ln" / "config.json").read_bytes())
    config, params = load_model(tmp_path, memory_map=True)
    assert_mapped(params)
    np.testing.assert_array_equal(params.segments[1].fc2.bias[0], tensors[half])
    np.testing.assert_array_equal(params.shell.embed_tokens, tensors[embedding])
    assert params.segments[1].fc2.bias.dtype == np.float16
    assert params.shell.embed_tokens.dtype == jnp.bfloat16
    dtypes = [leaf.dtype.name for leaf in jax.tree.leaves(params)]
    assert dtypes.count("float32") == len(dtypes) - 2
    save_model(tmp_path / "again", config, params)
    assert dict(read_specs(tmp_path / "again" / "model.safetensors")) == read_specs(
        tmp_path / "model.safetensors"
    )


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float16", "bfloat16")])
def test_mapped_layers_of_unlike_dtypes_are_joined_in_the_least_that_holds_both(
    golden, tmp_path, dtypes
):
    tensors = dict(iterate_tensors(golden / "pre_ln" / "model.safetensors"))
    for layer, dtype in enumerate(dtypes):
        name = f"model.decoder.layers.{layer}.fc1.weight"
        tensors[name] = tensors[name].astype(jnp.dtype(dtype))
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_bytes((golden / "pre_ln" / "config.json").read_bytes())
    _, mapped = load_model(tmp_path, memory_map=True)
    _, placed = load_model(tmp_path, dtype=None)
    joined = concatenate_blocks(mapped.segments)
    assert joined.fc1.kernel.dtype == placed.segments[0].fc1.kernel.dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, joined, placed.segments[0])


def test_every_device_has_its_part_and_equal_parts_are_read_once(golden, monkeypatch):
    from gradot_jax.files.mapped import StoredTensor

    read = []
    original = StoredTensor.read_into

    def record(tensor, target, index=()):
        read.append(target.size)
        original(tensor, target, index)

    _, params = load_model(golden / "pre_ln")
    monkeypatch.setattr(StoredTensor, "read_into", record)
    _, sharded = load_model(golden / "pre_ln", mesh=make_mesh(4, 2))
    monkeypatch.undo()
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, sharded)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of about 100 MB and its number of parameters."""
    config = OPTConfig(
        vocab_size=4000,
        hidden_size=512,
        word_embed_proj_dim=512,
        num_hidden_layers=8,
        ffn_dim=2048,
        num_attention_heads=8,
        max_position_embeddings=256,
    )
    draw = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: draw(leaf.shape, np.float32), shapes)
    folder = tmp_path_factory.mktemp("large") / "model"
    save_model(folder, config, params)
    return folder, sum(leaf.size for leaf in jax.tree.leaves(params))


def measure(golden, folder, **options) -> tuple[int, int]:
    """Growth of resident memory at its peak, and of anonymous memory at the end, in bytes."""
    command = [sys.executable, "-c", MEASURE, golden / "pre_ln", folder, json.dumps(options)]
    output = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    peak, anonymous = map(int, output.stdout.split())
    return peak, anonymous


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_loading_takes_little_more_than_the_weights(golden, large, dtype, itemsize):
    folder, size = large
    peak, anonymous = measure(golden, folder, dtype=dtype)
    assert 0.9 * size * itemsize < anonymous <= peak < 1.3 * size * itemsize


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapping_takes_next_to_nothing(golden, large):
    folder, size = large
    peak, anonymous = measure(golden, folder, memory_map=True)
    assert anonymous < 0.05 * size * 4
    assert peak < 0.3 * size * 4
