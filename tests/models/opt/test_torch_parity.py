"""Parity with the torch models of transformers, where torch is installed."""

import numpy as np
import pytest

from gradot_jax.models.checkpoint import load_model, save_model
from gradot_jax.models.run import forward

torch = pytest.importorskip("torch")

VARIANTS = "pre_ln post_ln_projection no_final_norm untied no_bias no_affine gelu".split()
LOGITS = 1e-4


def torch_model(folder, **options):
    from transformers import OPTForCausalLM

    return OPTForCausalLM.from_pretrained(folder, output_loading_info=True, **options)


def torch_logits(model, ids, mask):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_loads_what_is_saved_and_computes_the_same(golden, tmp_path, variant):
    config, params = load_model(golden / variant)
    shard_bytes = 1500 if variant == "pre_ln" else 10**9
    save_model(tmp_path / "out", config, params, max_shard_bytes=shard_bytes)
    model, report = torch_model(tmp_path / "out")
    assert not any(report.values()), report
    expected = np.load(golden / variant / "torch.npz")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    real = mask == 1
    logits = torch_logits(model, ids, mask)
    np.testing.assert_allclose(logits[real], expected["logits"][real], atol=LOGITS)
    ours = np.asarray(forward(config, params, ids, mask))
    np.testing.assert_allclose(ours[real], logits[real], atol=LOGITS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_reads_half_precision_bit_for_bit(golden, tmp_path, dtype):
    config, params = load_model(golden / "pre_ln")
    save_model(tmp_path / "out", config, params, dtype=dtype)
    model, report = torch_model(tmp_path / "out")
    assert not any(report.values()), report
    assert model.dtype == getattr(torch, dtype)
    ours = load_model(tmp_path / "out")[1].segments[0].q_proj.kernel[1]
    theirs = model.model.decoder.layers[1].self_attn.q_proj.weight
    np.testing.assert_array_equal(np.asarray(ours), theirs.detach().float().numpy().T)


def test_what_torch_saves_is_loaded_with_nothing_transposed(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 12, "ffn_dim": 12, "word_embed_proj_dim": 12, "vocab_size": 12}
    model = OPTForCausalLM(
        OPTConfig(**sizes, num_attention_heads=3, num_hidden_layers=2, max_position_embeddings=10)
    )
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "out")
    ids = np.random.default_rng(0).integers(0, 12, (2, 10))
    mask = np.ones_like(ids)
    config, params = load_model(tmp_path / "out")
    np.testing.assert_allclose(
        forward(config, params, ids), torch_logits(model, ids, mask), rtol=1e-4, atol=LOGITS
    )
