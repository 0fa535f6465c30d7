"""Parity with the torch models of transformers, where torch is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.files.safetensors import iterate_tensors
from gradot_jax.models.checkpoint import load_model, save_model
from gradot_jax.models.run import forward

torch = pytest.importorskip("torch")

LOGITS = 1e-4
SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4, "head_dim": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 6, "tie_word_embeddings": True},
}
IDS = np.random.default_rng(0).integers(6, 29, (2, 11))
MASK = np.ones_like(IDS)
MASK[0, :2] = MASK[1, 8:] = 0


def fresh(model_type, dtype="float32"):
    """A model of transformers whose every parameter is random, gains and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SIZES, **FAMILIES[model_type])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            drawn = float("norm.weight" in name) + 0.3 * drawn
            # Parameters alone: rotary frequencies are float32 in every model that is loaded.
            parameter.data = drawn.to(getattr(torch, dtype))
    return model.eval()


def with_float32_norms(model):
    for name, parameter in model.named_parameters():
        if "norm.weight" in name:
            parameter.data = parameter.data.float() + 1e-4
    return model


def torch_logits(model):
    with torch.no_grad():
        return model.float()(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits.numpy()


def stored(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: array for file in files for name, array in iterate_tensors(file)}


def assert_same_logits(folder, model):
    config, params = load_model(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    real, got = MASK == 1, np.asarray(forward(config, params, IDS, MASK))
    np.testing.assert_allclose(got[real], torch_logits(model)[real], rtol=0, atol=LOGITS)


def assert_same_files(folder, source):
    got, expected = stored(folder), stored(source)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name].view(np.uint8), array.view(np.uint8), name)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, source)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "shard"),
    [("float32", "1GB"), ("float32", 4096), ("bfloat16", "1GB"), ("float16", 2048)],
)
def test_what_torch_saves_is_read_with_the_same_logits_and_written_back_bit_for_bit(
    tmp_path, model_type, dtype, shard
):
    model = fresh(model_type, dtype)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs" / "model.safetensors").exists() == (shard == "1GB")
    config, params = load_model(tmp_path / "theirs", dtype=None)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    save_model(tmp_path / "ours", config, params)
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert_same_logits(tmp_path / "theirs", model)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_norms_of_a_wider_dtype_stay_wider(tmp_path, model_type):
    model = with_float32_norms(fresh(model_type, "bfloat16"))
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_model(tmp_path / "theirs", dtype=None)
    block = params.segments[0]
    norms = [getattr(block, field) for field, _ in block.layout.norms]
    wide = jax.tree.leaves((norms, params.shell.norm))
    assert {leaf.dtype for leaf in wide} == {jnp.dtype("float32")}
    assert block.down_proj.kernel.dtype == params.shell.embed_tokens.dtype == jnp.bfloat16
    save_model(tmp_path / "ours", config, params)
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    assert_same_logits(tmp_path / "theirs", model)


def test_frequencies_that_old_checkpoints_store_are_dropped(tmp_path):
    from safetensors.torch import load_file, save_file

    model = fresh("llama")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    save_file(load_file(file) | {name: torch.ones(2) for name in names}, file, {"format": "pt"})
    assert_same_logits(tmp_path / "model", model)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_torch_loads_what_is_saved_and_computes_the_same(tmp_path, model_type):
    from transformers import AutoModelForCausalLM

    fresh(model_type).save_pretrained(tmp_path / "theirs")
    config, params = load_model(tmp_path / "theirs")
    doubled = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    save_model(tmp_path / "ours", config, doubled, max_shard_bytes=4096)
    options = {"output_loading_info": True, "attn_implementation": "eager"}
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **options)
    assert not any(report.values()), report
    assert_same_logits(tmp_path / "ours", model.eval())
