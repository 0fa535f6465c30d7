"""Export: an emulator as a dense OPT computes what the emulator computes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.models.checkpoint import load_model, save_model
from gradot_jax.models.params import count_params
from gradot_jax.models.run import forward
from gradot_jax.offsite.export import export_params

IDS = np.array([[2, 5, 7, 11, 3, 9], [2, 4, 4, 20, 23, 0]])
TOLERANCE = 2e-5

VARIANTS = {
    "relu": {},
    "gelu": {"activation_function": "gelu"},
    "post_norm_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    "bare": {"enable_bias": False, "layer_norm_elementwise_affine": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_model_has_the_logits_of_the_emulator(variant, make_case):
    case = make_case(**VARIANTS[variant])
    emulator = case.emulator.assemble()
    config, params = export_params(case.config, emulator)
    assert config.num_hidden_layers == 5
    assert len(params.segments) == 1
    assert count_params(params) == count_params(case.params)
    chex.assert_trees_all_close(
        forward(config, params, IDS), forward(case.config, emulator, IDS), atol=TOLERANCE
    )


def test_export_of_an_original_changes_nothing(case):
    config, params = export_params(case.config, case.params)
    assert config == case.config
    chex.assert_trees_all_equal(params, case.params)


def test_exported_emulator_of_fewer_layers_has_their_number(case):
    shorter = case.emulator.replace(middle=case.emulator.middle[1:])
    config, params = export_params(case.config, shorter.assemble())
    assert config.num_hidden_layers == params.num_layers == 3


def test_product_of_half_precision_factors_is_rounded_once(make_case):
    case = make_case(dtype="bfloat16")
    emulator = case.emulator.assemble()
    _, params = export_params(case.config, emulator)
    factors = emulator.segments[1].v_proj
    exact = np.asarray(factors.left, np.float64) @ np.asarray(factors.right, np.float64)
    exported = params.segments[0].v_proj.kernel[1:3]
    assert exported.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(exported, np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised while torch is imported
@pytest.mark.parametrize("variant", ["relu", "post_norm_projected"])
def test_torch_reads_the_export_and_agrees(variant, make_case, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    case = make_case(**VARIANTS[variant])
    emulator = case.emulator.assemble()
    save_model(tmp_path / "dense", *export_params(case.config, emulator))
    model, report = transformers.OPTForCausalLM.from_pretrained(
        tmp_path / "dense", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        theirs = model.eval()(torch.as_tensor(IDS)).logits.numpy()
    ours = forward(case.config, emulator, IDS)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4)


def test_export_survives_its_files(case, tmp_path):
    exported = export_params(case.config, case.emulator.assemble())
    save_model(tmp_path / "dense", *exported)
    config, params = load_model(tmp_path / "dense")
    assert config == exported[0]
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(exported[1]))
