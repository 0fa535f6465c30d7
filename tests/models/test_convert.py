"""Checkpoints out of GGUF files against those that the files were made of."""

import json
import math
import os

import gguf
import huggingface_hub
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.gguf_file import open_gguf
from gradot_jax.files.safetensors import iterate_tensors
from gradot_jax.models import convert
from gradot_jax.models.checkpoint import load_model, save_model
from gradot_jax.models.convert import find_gguf, write_config, write_weights
from gradot_jax.models.families import read_config
from gradot_jax.models.run import forward

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "llama": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True, "bos_token_id": None},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "wide heads": {"model_type": "llama", "head_dim": 16, "num_key_value_heads": 1},
    "linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama3": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "head_dim": 16,
        "rope_scaling": {**LLAMA_3, "original_max_position_embeddings": 8192},
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "yarn": {
        "model_type": "qwen2",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3 biases": {"model_type": "qwen3", "attention_bias": True},
}


def permuted(weights, heads):
    """The rows of q and k as llama.cpp's converter lays them."""
    halves = weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def frequency_divisors(config):
    """The tensor that llama.cpp's converter writes for a Llama 3."""
    scaling, size = config["rope_scaling"], config["head_dim"]
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    divisors = []
    for plane in range(0, size, 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (plane / size)
        smooth = min(max((length / wavelength - low) / (high - low), 0), 1)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def described(config):
    """The metadata of a configuration, but for the tokenizer's."""
    name = config["model_type"]
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if name == "llama":
        values |= {"vocab_size": config["vocab_size"], "rope.dimension_count": config["head_dim"]}
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        values |= {"rope.scaling.type": scaling["rope_type"]}
        values |= {"rope.scaling.factor": scaling["factor"]}
    if scaling.get("rope_type") == "yarn":
        length = scaling["original_max_position_embeddings"]
        values |= {"rope.scaling.original_context_length": length}
    metadata = {"general.architecture": name, "general.name": "somebody's"}
    metadata |= {f"{name}.{key}": value for key, value in values.items()}
    metadata["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(config["vocab_size"])]
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if config[f"{role}_token_id"] is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = config[f"{role}_token_id"]
    return metadata


def packed(config, tensors, kind):
    """The tensors of a checkpoint as llama.cpp's converter writes them."""
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    stored = []
    for name, array in tensors.items():
        site = name.split(".")[-2]
        if config["model_type"] == "llama" and site in heads:
            array = permuted(array, heads[site])
        own = kind if array.ndim == 2 else F32
        data = gguf.quantize(np.ascontiguousarray(array), own).tobytes()
        stored.append((names.get_name(name, (".weight", ".bias")), array.shape, own.value, data))
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        divisors = frequency_divisors(config)
        stored.append(("rope_freqs.weight", divisors.shape, 0, divisors.tobytes()))
    return stored


def read_all(folder):
    return {n: a for f in sorted(folder.glob("*.safetensors")) for n, a in iterate_tensors(f)}


@pytest.fixture
def original(random_params, tmp_path):
    """Makes a checkpoint of a variant; gives its configuration and tensors."""

    def make(variant):
        values = {**SIZES, **VARIANTS[variant]}
        config = read_config(values)
        save_model(tmp_path / "original", config, random_params(config))
        return values, read_all(tmp_path / "original")

    return make


@pytest.fixture
def convert_file(gguf_bytes, tmp_path):
    """Writes a GGUF file and converts it."""

    def run(metadata, tensors, dtype="float32", **options):
        (tmp_path / "model.gguf").write_bytes(gguf_bytes(metadata, tensors))
        folder = tmp_path / "converted"
        folder.mkdir(exist_ok=True)
        file = open_gguf(tmp_path / "model.gguf")
        write_weights(folder, file, write_config(folder, file, dtype), **options)
        return folder

    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_model_is_the_original(variant, original, convert_file, tmp_path):
    config, tensors = original(variant)
    folder = convert_file(described(config), packed(config, tensors, F32))
    got = read_all(folder)
    assert got.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    ids = np.random.default_rng(0).integers(0, 40, (2, 12))
    expected = forward(*load_model(tmp_path / "original"), ids)
    np.testing.assert_allclose(forward(*load_model(folder), ids), expected, rtol=1e-6, atol=1e-6)
    values = json.loads((folder / "config.json").read_text())
    for name, value in config.items():
        if name != "rope_scaling":
            assert values[name] == value, name
    assert values["dtype"] == "float32"


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_it_as_the_original(variant, original, convert_file, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, tensors = original(variant)
    folder = convert_file(described(config), packed(config, tensors, F32))
    ids = torch.tensor(np.random.default_rng(0).integers(0, 40, (2, 12)))
    logits = []
    for path in (tmp_path / "original", folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        assert model.dtype == torch.float32
        with torch.no_grad():
            logits.append(model(ids).logits.numpy())
    np.testing.assert_allclose(*logits, rtol=1e-6, atol=1e-6)
    ours = forward(*load_model(folder), ids.numpy())
    scale = np.abs(logits[0]).max()
    np.testing.assert_allclose(ours, logits[0], rtol=0, atol=2e-5 * scale)


def test_quantised_rows_are_put_back_too(original, convert_file):
    config, tensors = original("llama")
    folder = convert_file(described(config), packed(config, tensors, Q8_0))
    for name, array in read_all(folder).items():
        expected = tensors[name]
        if expected.ndim == 2:
            expected = gguf.dequantize(gguf.quantize(expected, Q8_0), Q8_0)
        np.testing.assert_array_equal(array, expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_dtype_rounds(dtype, original, convert_file):
    config, tensors = original("qwen3")
    folder = convert_file(described(config), packed(config, tensors, F32), dtype)
    for name, array in read_all(folder).items():
        assert array.dtype.name == dtype
        np.testing.assert_array_equal(array, tensors[name].astype(array.dtype))
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_large_weights_go_to_shards(original, convert_file):
    config, tensors = original("llama")
    folder = convert_file(described(config), packed(config, tensors, F32), max_shard_bytes=20000)
    assert len([*folder.glob("model-*-of-*.safetensors")]) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for path in folder.glob("*.safetensors"):
        size = sum(array.nbytes for _, array in iterate_tensors(path))
        assert size <= 20000
    load_model(folder)


def test_what_was_written_is_compared_with_the_file(original, convert_file, monkeypatch):
    config, tensors = original("llama")
    rename = convert.name_shards

    def damage(folder, *rest):
        (path,) = rename(folder, *rest)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return [path]

    monkeypatch.setattr(convert, "name_shards", damage)
    with pytest.raises(OSError, match=r"differs from what .*model\.gguf says"):
        convert_file(described(config), packed(config, tensors, F32))


def test_every_token_that_ends_a_text_is_named(original, convert_file):
    config, tensors = original("qwen2")
    metadata = described(config) | {"tokenizer.ggml.eot_token_id": 7}
    folder = convert_file(metadata, packed(config, tensors, F32))
    values = json.loads((folder / "generation_config.json").read_text())
    assert values == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, 7]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma2"}, "architecture is 'gemma2', expected llama or qwen2"),
        ({"general.architecture": None}, "general.architecture is absent"),
        ({"general.architecture": 5}, "general.architecture is 5, expected text"),
        ({"general.type": "adapter"}, "general.type is 'adapter', expected model"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, expected 0 or none"),
        ({"llama.attention.sliding_window": 4096}, "attention.sliding_window is 4096"),
        ({"llama.attention.causal": False}, "llama.attention.causal is False"),
        ({"llama.rope.scale_linear": 2.0}, "llama.rope.scale_linear is 2.0"),
        ({"llama.rope.scaling.type": "longrope"}, "type is 'longrope', expected none, linear or"),
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.factor is absent"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "'llama.rope.scaling.attn_factor'"),
        ({"llama.logit_scale": 2.0}, "cannot carry: 'llama.logit_scale'"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4, expected 8"),
        ({"llama.attention.value_length": 4}, "attention.value_length is 4, expected 8"),
        ({"llama.vocab_size": 41}, "llama.vocab_size is 41, expected 40"),
        ({"llama.block_count": None}, "llama.block_count is absent"),
        ({"llama.block_count": 2**31 - 1}, "num_hidden_layers is 2147483647, expected at most"),
        ({"llama.block_count": 3}, "missing: blk.2.attn_k.weight"),
        ({"llama.block_count": 1}, "unexpected: blk.1.attn_k.weight"),
        ({"llama.attention.head_count": 0}, "num_attention_heads is 0"),
        ({"llama.attention.head_count_kv": np.array([2, 2], np.int32)}, "expected a whole number"),
        ({"llama.embedding_length": 64}, "wrong shape: blk.0.attn_k.weight"),
        ({"llama.embedding_length": 2**31 - 1}, "wrong shape"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base is inf, expected a finite number"),
        ({"llama.rope.freq_base": 0.5}, "rope_theta is 0.5"),
        ({"tokenizer.ggml.eos_token_id": 40}, "eos_token_id is 40, expected a token"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is absent"),
        ({"tokenizer.ggml.tokens": ["a"]}, "llama.vocab_size is 40, expected 1"),
    ],
)
def test_metadata_that_is_not_carried_over_is_refused(change, message, original, convert_file):
    config, tensors = original("llama")
    metadata = {k: v for k, v in (described(config) | change).items() if v is not None}
    with pytest.raises(InputError, match=message) as refused:
        convert_file(metadata, packed(config, tensors, F32))
    assert "model.gguf" in str(refused.value)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "rope_freqs.weight", "x" * 999])
def test_tensors_beyond_those_of_the_model_are_refused(name, original, convert_file):
    config, tensors = original("qwen2")
    stored = [*packed(config, tensors, F32), (name, (4,), 0, bytes(16))]
    with pytest.raises(InputError, match=rf"unexpected: '?{name[:200]}"):
        convert_file(described(config), stored)


@pytest.mark.parametrize("variant", ["llama3", "linear"])
def test_another_stretching_of_the_rotary_embedding_is_refused(variant, original, convert_file):
    config, tensors = original(variant)
    stored = [each for each in packed(config, tensors, F32) if each[0] != "rope_freqs.weight"]
    size = config["head_dim"] // 2
    for divisors in (np.linspace(1, 8, size), np.ones(size + 1), np.full(size, 1e-30)):
        odd = ("rope_freqs.weight", divisors.shape, 0, divisors.astype(np.float32).tobytes())
        with pytest.raises(InputError, match=r"rope_freqs\.weight"):
            convert_file(described(config), [*stored, odd])


def test_numbers_not_finite_are_refused(original, convert_file):
    config, tensors = original("llama")
    tensors["model.norm.weight"][3] = np.nan
    with pytest.raises(InputError, match=r"output_norm\.weight holds NaN"):
        convert_file(described(config), packed(config, tensors, F32))


def test_a_file_is_found_by_path_folder_and_name(tmp_path):
    one, folder = tmp_path / "one.gguf", tmp_path / "folder"
    folder.mkdir()
    one.touch()
    assert find_gguf(str(one)) == one
    with pytest.raises(InputError, match="found none"):
        find_gguf(str(folder))
    (folder / "a.gguf").touch()
    assert find_gguf(str(folder)) == folder / "a.gguf"
    (folder / "b.gguf").touch()
    assert find_gguf(str(folder), "b.gguf") == folder / "b.gguf"
    for path, name, revision, message in (
        (folder, None, None, r"found a\.gguf, b\.gguf"),
        (folder, "c.gguf", None, "missing"),
        (folder, "../one.gguf", None, "not the plain name"),
        (one, "one.gguf", None, "is a file"),
        (one, None, "main", "has no revision"),
        (tmp_path / "gone", None, None, "no such file or folder"),
    ):
        with pytest.raises(InputError, match=message):
            find_gguf(str(path), name, revision)


def test_a_file_is_found_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--some--model-GGUF", "a" * 40
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)

    def add(name):
        (repository / "blobs" / name[0]).write_text(name)
        (snapshot / name).symlink_to(os.path.relpath(repository / "blobs" / name[0], snapshot))

    add("a.gguf")
    add("README.md")
    assert find_gguf("some/model-GGUF").read_text() == "a.gguf"
    add("b.gguf")
    assert find_gguf("some/model-GGUF", "b.gguf", "main").read_text() == "b.gguf"
    with pytest.raises(InputError, match=r"found a\.gguf, b\.gguf"):
        find_gguf("some/model-GGUF")
    with pytest.raises(InputError, match=r"no file 'c\.gguf'"):
        find_gguf("some/model-GGUF", "c.gguf")
    with pytest.raises(InputError, match="some/other is neither"):
        find_gguf("some/other")
