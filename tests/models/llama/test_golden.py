import json
from pathlib import Path

import numpy as np
import pytest

from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.run import forward

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(folder.name for folder in GOLDEN.iterdir())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_hugging_face(variant):
    config, params = load_model(GOLDEN / variant)
    expected = np.load(GOLDEN / variant / "torch.npz")
    mask = expected["attention_mask"]
    got = forward(config, params, expected["input_ids"], mask)
    np.testing.assert_allclose(got[mask == 1], expected["logits"][mask == 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_is_written_as_it_was_read(variant):
    config, _ = load_model(GOLDEN / variant)
    assert config.to_hf() == json.loads((GOLDEN / variant / "config.json").read_text())
