"""Every method on models with grouped queries and gated MLPs, to a checkpoint that torch loads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradot_jax as gj
from gradot_jax.errors import InputError
from gradot_jax.memory.forecast import kernel_parameters
from gradot_jax.methods.options import DistillationOptions, ScaleOTOptions
from gradot_jax.models.families import read_config

SIZES = {"vocab_size": 29, "intermediate_size": 20, "num_hidden_layers": 6}
SIZES |= {"max_position_embeddings": 32, "tie_word_embeddings": True, "initializer_range": 0.2}
MODELS = {
    "llama": {"hidden_size": 18, "num_attention_heads": 9, "num_key_value_heads": 3},
    "qwen3": {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
}
SPLIT = gj.AdapterSpec(1, 1)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """Configuration, weights as read from a file, and that file's folder."""
    values = {"model_type": request.param, **SIZES, **MODELS[request.param]}
    values |= {"architectures": [f"{request.param.capitalize()}ForCausalLM"]}
    values |= {"bos_token_id": None, "eos_token_id": [2, 3], "note": 0.5}
    folder = tmp_path_factory.mktemp(request.param)
    config = read_config(values)
    gj.save_model(folder / "model", config, gj.init_params(config, jax.random.key(1)))
    return *gj.load_model(folder / "model"), folder


def batch(seed, size=4, length=12):
    ids = np.random.default_rng(seed).integers(4, SIZES["vocab_size"], (size, length + 1))
    ones = jnp.ones((size, length))
    return gj.Batch(jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]), ones, ones)


def options_of(method):
    options = {"budget": 0.75 if method.startswith("crash") else 0.55}
    if method == "offsite-tuning":
        options["distillation"] = DistillationOptions(steps=1, warmup_steps=0)
    if method.startswith("scaleot"):
        options["scaleot"] = ScaleOTOptions(steps=1, harmonizer_rank=2, group_size=2)
    return options


def assert_torch_agrees(folder, config, params):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = batch(5).input_ids
    with torch.no_grad():
        expected = loaded(torch.tensor(np.asarray(ids))).logits.numpy()
    np.testing.assert_allclose(gj.forward(config, params, ids), expected, atol=1e-4, rtol=0)
    assert loaded.config.eos_token_id == [2, 3]


@pytest.mark.parametrize("method", gj.METHODS)
def test_a_model_goes_all_the_way_and_its_middle_comes_back_untouched(method, model):
    config, params, folder = model
    batches, options = [batch(0), batch(1)], options_of(method)
    plan, emulator = gj.compress(config, params, SPLIT, batches, method=method, **options)
    kept, whole = kernel_parameters(config, plan)
    assert kept <= options["budget"] * whole
    where = folder / method
    gj.ship(where / "bundle", config, plan, emulator)
    bundle = gj.receive(where / "bundle")
    assert bundle.config.to_hf()["note"] == 0.5
    optimizer = gj.make_optimizer(learning_rate=1e-2, num_steps=2)
    adapter = gj.finetune_adapter(bundle.config, bundle.emulator, batches, optimizer, num_steps=2)
    gj.save_adapter(where / "adapter", adapter, bundle)
    returned, manifest = gj.load_adapter(where / "adapter", config)
    gj.check_adapter(manifest, config, params)
    # Fields that shape nothing make no other model.
    lean = read_config({k: v for k, v in config.to_hf().items() if k != "note"})
    assert gj.load_adapter(where / "adapter", lean)[1].config == config
    tuned = gj.plug_in(params, returned)
    trained = returned.split.layers(6)
    for new, old in zip(
        jax.tree.leaves(tuned.segments), jax.tree.leaves(params.segments), strict=True
    ):
        same = [np.array_equal(new[layer], old[layer]) for layer in range(6)]
        assert all(same[layer] for layer in range(6) if layer not in trained)
    changed = jax.tree.map(
        lambda new, old: bool((new != old).any()), tuned.segments, params.segments
    )
    assert any(jax.tree.leaves(changed))
    gj.save_model(where / "tuned", config, tuned)
    assert_torch_agrees(where / "tuned", config, tuned)
    written = json.loads((where / "tuned" / "config.json").read_text())
    assert written == json.loads((folder / "model" / "config.json").read_text())
    if method.startswith("scaleot"):
        return
    dense, weights = gj.export_params(bundle.config, bundle.emulator.assemble(adapter))
    gj.save_model(where / "dense", dense, weights)
    assert_torch_agrees(where / "dense", bundle.config, bundle.emulator.assemble(adapter))


def test_a_configuration_that_would_cross_as_another_is_refused(model, tmp_path):
    config, params, _ = model
    rope = {"rope_type": "linear", "factor": 8.0, "note": "see our paper"}
    odd = read_config({**config.to_hf(), "rope_scaling": rope})
    plan, emulator = gj.compress(odd, params, SPLIT, [batch(0)], method="layer-drop", budget=0.5)
    with pytest.raises(InputError, match="of the configuration crosses"):
        gj.ship(tmp_path / "bundle", odd, plan, emulator)
    assert not (tmp_path / "bundle").exists()
