import numpy as np
import pytest

from benchmarks.calibration_text import study
from gradot_jax.calibration.fidelity import gradient_fidelity
from gradot_jax.data.examples import eval_batches, take
from gradot_jax.methods.compress import compress
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch


@pytest.fixture
def texts(toy_model):
    config, _ = toy_model()

    def text(seed):
        ids = np.random.default_rng(seed).integers(3, config.vocab_size, (60, 7), dtype=np.int32)
        ones = np.ones((60, 6), np.int32)
        return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones)

    return {"own": text(0), "other": text(1)}


def test_every_calibration_is_measured_on_the_first_text(toy_model, texts, tmp_path):
    config, params = toy_model(num_hidden_layers=5)
    sizes = {"counts": [8, 16, 24], "draws": 1, "skips": [0, 1], "budget": 0.6, "out": tmp_path}
    rows = study("toy", config, params, texts, **sizes)
    named = [(r["text"], r["sequences"], r["skip_positions"]) for r in rows]
    own = [("own", count, skip) for count in (8, 16, 24) for skip in (0, 1)]
    assert named == [*own[:4], ("other", 16, 0), ("other", 16, 1), *own[4:]]
    # The last of them by hand: which rows a draw takes, and which are held out.
    order = np.random.default_rng(0).permutation(45)[:24]
    batches = list(eval_batches(take(texts["own"], order), 8))
    _, emulator = compress(
        config, params, AdapterSpec(), batches, method="gradot", budget=0.6, skip_positions=1
    )
    held_out = list(eval_batches(take(texts["own"], slice(-15, None)), 8))
    expected = gradient_fidelity(config, params, emulator, held_out)
    assert rows[-1]["loss_gap"] == pytest.approx(expected.loss_gap, rel=1e-4)
    gap = rows[-1]["gradient_relative_error"] - expected.adapter.relative_error
    assert abs(gap) < 1e-4
    # What is finished is not run again, and leaves no emulator.
    assert study("toy", config, params, texts, **sizes) == rows
    assert not list((tmp_path / "bundles").iterdir())
