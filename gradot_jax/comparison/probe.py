"""A cheap look ahead: what a few steps through an emulator do to the plugged-in model.

The model owner has no task of the data owner's, but public text: the adapter is tuned on it for a
few steps through the emulator and plugged in. What the plug-in gains, or loses, on held-out text is
what the owner is after; the emulator's own gain is what a data owner would see.
"""

from typing import Any

from gradot_jax.calibration.fidelity import gradient_fidelity
from gradot_jax.comparison.testbed import Testbed
from gradot_jax.models.split import SplitModel
from gradot_jax.offsite.plug_in import plug_in
from gradot_jax.training.adapter import finetune_adapter
from gradot_jax.training.optimizer import shared_optimizer

STEPS, LEARNING_RATE = 8, 3e-4


def probe(bed: Testbed, emulator: SplitModel) -> dict[str, Any]:
    """Losses on held-out text before and after `STEPS` batches of calibration text.

    Returns:
        `plug_in_gain` and `emulator_gain`, nats per token by which the losses fell, and the
        relative error of the adapter's gradient after the steps, `moved_relative_error`.
    """
    batches = list(bed.calibration(0))
    steps = min(STEPS, len(batches))
    adapter = finetune_adapter(
        bed.config,
        emulator,
        batches,
        shared_optimizer(learning_rate=LEARNING_RATE, num_steps=steps, betas=(0.9, 0.98)),
        num_steps=steps,
        compute_dtype=bed.compute_dtype,
        mesh=bed.mesh,
    )
    moved, plugged = emulator.replace(adapter=adapter), plug_in(bed.params, adapter)
    before = gradient_fidelity(bed.config, bed.params, emulator, bed.held_out, mesh=bed.mesh)
    after = gradient_fidelity(bed.config, plugged, moved, bed.held_out, mesh=bed.mesh)
    return {
        "steps": steps,
        "plug_in_gain": before.loss_full - after.loss_full,
        "emulator_gain": before.loss_emulator - after.loss_emulator,
        "moved_relative_error": after.adapter.relative_error,
    }
