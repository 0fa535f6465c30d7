import jax
import numpy as np
import pytest

from gradot_jax.calibration.fidelity import Agreement, gradient_fidelity
from gradot_jax.errors import InputError
from gradot_jax.models.params import concatenate_blocks
from gradot_jax.models.run import summed_loss
from gradot_jax.models.split import AdapterSpec, split_model
from gradot_jax.nn.batch import Batch


def emulate(params, split, change=lambda leaf: leaf):
    model = split_model(params, split)
    return model.replace(middle=jax.tree.map(change, model.middle))


@pytest.fixture(scope="module")
def case(toy_model, toy_batch):
    config, params = toy_model()
    return config, params, emulate(params, AdapterSpec(1, 1), lambda leaf: 0.7 * leaf), toy_batch()


def test_uncompressed_emulator_agrees_exactly(toy_model, toy_batch):
    config, params = toy_model()
    result = gradient_fidelity(config, params, emulate(params, AdapterSpec(1, 1)), [toy_batch()])
    for agreement in (result.adapter, result.bottom, result.top):
        assert agreement.relative_error == 0 and agreement.norm_ratio == 1
        assert agreement.cosine == pytest.approx(1, abs=1e-12)
    assert result.loss_gap == 0


def test_equals_the_gradients_of_both_models_taken_whole(case):
    config, params, emulator, batch = case
    changed = params.replace(segments=(concatenate_blocks(emulator.assemble().segments),))

    @jax.jit
    def mean_loss(params):
        total, count = summed_loss(config, params, batch)
        return total / count

    losses, ends = [], []
    for model in (params, changed):
        loss, gradient = jax.value_and_grad(mean_loss)(model)
        losses.append(float(loss))
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradient.segments[0])]
        ends.append([np.concatenate([leaf[i].ravel() for leaf in leaves]) for i in (0, -1)])

    def agreement(full, emulated):
        norm, other = np.linalg.norm(full), np.linalg.norm(emulated)
        error = np.linalg.norm(emulated - full) / norm
        return Agreement(full @ emulated / norm / other, error, other / norm)

    result = gradient_fidelity(config, params, emulator, [batch])
    (bottom, top), (bottom_changed, top_changed) = ends
    expected = {
        "bottom": agreement(bottom, bottom_changed),
        "top": agreement(top, top_changed),
        "adapter": agreement(np.append(bottom, top), np.append(bottom_changed, top_changed)),
    }
    for name, wanted in expected.items():
        assert getattr(result, name) == pytest.approx(wanted, rel=1e-4), name
    assert (result.loss_full, result.loss_emulator) == pytest.approx(losses, rel=1e-5)
    assert result.loss_gap == result.loss_emulator - result.loss_full


def test_batches_weigh_by_their_counted_tokens(case):
    config, params, emulator, batch = case
    partly = batch._replace(loss_mask=batch.loss_mask.at[:2, 1:].set(0))
    whole = gradient_fidelity(config, params, emulator, [partly])
    parts = [Batch(*(field[i : i + 4] for field in partly)) for i in (0, 4)]
    split = gradient_fidelity(config, params, emulator, parts)
    assert split.adapter == pytest.approx(whole.adapter, rel=1e-4)
    assert split.loss_gap == pytest.approx(whole.loss_gap, rel=1e-4)


@pytest.mark.parametrize(("ends", "absent"), [((0, 1), "bottom"), ((1, 0), "top")])
def test_absent_end_has_no_agreement(ends, absent, toy_model, toy_batch):
    config, params = toy_model(num_hidden_layers=2)
    result = gradient_fidelity(config, params, emulate(params, AdapterSpec(*ends)), [toy_batch()])
    assert getattr(result, absent) is None and result.adapter.norm_ratio == 1


def test_held_out_text_without_a_counted_token_is_refused(case):
    config, params, emulator, batch = case
    for batches in ([], [batch._replace(loss_mask=0 * batch.loss_mask)]):
        with pytest.raises(InputError, match="at least one batch with a counted token"):
            gradient_fidelity(config, params, emulator, batches)


def test_loss_that_is_not_finite_is_refused(case):
    config, params, _, batch = case
    broken = emulate(params, AdapterSpec(1, 1), lambda leaf: leaf * np.nan)
    with pytest.raises(InputError, match="not finite"):
        gradient_fidelity(config, params, broken, [batch])
