import numpy as np
import pytest

from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.run import forward

VARIANTS = "pre_ln post_ln_projection no_final_norm untied no_bias no_affine gelu".split()
LOGITS = 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_hugging_face(golden, variant):
    config, params = load_model(golden / variant)
    expected = np.load(golden / variant / "torch.npz")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    logits = np.asarray(forward(config, params, ids, mask))
    real = mask == 1
    np.testing.assert_allclose(logits[real], expected["logits"][real], atol=LOGITS)
    flax = golden / variant / "flax.npz"
    if flax.exists():
        np.testing.assert_allclose(logits[real], np.load(flax)["logits"][real], atol=LOGITS)


def test_absent_mask_means_that_every_token_is_real(golden):
    config, params = load_model(golden / "pre_ln")
    expected = np.load(golden / "pre_ln" / "torch.npz")
    logits = forward(config, params, expected["input_ids"][:1])
    np.testing.assert_allclose(logits, expected["logits"][:1], atol=LOGITS)
