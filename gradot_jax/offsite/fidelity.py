"""Gradient fidelity: what the method promises, measured without any fine-tuning.

On held-out batches, the adapter's gradient through the emulator against its gradient through the
full model.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.forward import summed_loss
from gradot_jax.models.opt.params import Block, Params
from gradot_jax.nn.batch import Batch
from gradot_jax.offsite.emulator import SplitModel, split_model
from gradot_jax.offsite.split import Adapter


class Agreement(NamedTuple):
    """Two gradients g (full model) and g* (emulator) of the same parameters.

    Attributes:
        cosine: `<g, g*> / (|g| |g*|)`.
        relative_error: `|g* - g| / |g|`.
        norm_ratio: `|g*| / |g|`.
    """

    cosine: float
    relative_error: float
    norm_ratio: float


class GradientFidelity(NamedTuple):
    """Agreement of the adapter's gradient of the mean loss, and the loss gap.

    Attributes:
        adapter: over all adapter blocks.
        bottom: over the first blocks; None when there are none.
        top: over the last blocks; None when there are none.
        loss_full: mean loss of the full model, nats per token.
        loss_emulator: mean loss of the emulator, nats per token.
    """

    adapter: Agreement
    bottom: Agreement | None
    top: Agreement | None
    loss_full: float
    loss_emulator: float

    @property
    def loss_gap(self) -> float:
        """How much worse the emulator predicts than the full model, nats per token."""
        return self.loss_emulator - self.loss_full

    def to_values(self) -> dict[str, Any]:
        """JSON values by name, the loss gap included."""
        parts = ("adapter", "bottom", "top")
        agreements = {name: getattr(self, name) for name in parts}
        values = {name: a and a._asdict() for name, a in agreements.items()}
        losses = {"loss_full": self.loss_full, "loss_emulator": self.loss_emulator}
        return {**values, **losses, "loss_gap": self.loss_gap}


def gradient_fidelity(
    config: OPTConfig, params: Params, emulator: SplitModel, batches: Iterable[Batch]
) -> GradientFidelity:
    """Compares the adapter's gradients through an emulator and through the full model.

    Args:
        config: the model's configuration.
        params: the full original model.
        emulator: a compression of it.
        batches: held-out text; gradients are of the mean loss over all of it.

    Raises:
        InputError: without a batch that counts a token, or when a loss is not finite.
    """
    batches = list(batches)
    original = split_model(params, emulator.adapter.spec)
    loss, gradient = _mean_gradient(config, original, batches)
    loss_emulator, gradient_emulator = _mean_gradient(config, emulator, batches)
    bottom, top = (
        (_flat(getattr(gradient, end)), _flat(getattr(gradient_emulator, end)))
        for end in ("bottom", "top")
    )
    return GradientFidelity(
        adapter=_agreement(_flat(gradient), _flat(gradient_emulator)),
        bottom=_agreement(*bottom) if bottom[0].size else None,
        top=_agreement(*top) if top[0].size else None,
        loss_full=loss,
        loss_emulator=loss_emulator,
    )


def _mean_gradient(config, emulator, batches) -> tuple[float, Adapter]:
    total, count = 0.0, 0.0
    gradient = jax.tree.map(lambda a: np.zeros(a.shape, np.float64), emulator.adapter)
    for batch in batches:
        (loss, number), part = _summed_gradient(config, emulator, batch)
        gradient = jax.tree.map(lambda s, p: s + np.asarray(p, np.float64), gradient, part)
        total, count = total + float(loss), count + float(number)
    if not count:
        raise InputError("gradient fidelity needs at least one batch with a counted token")
    if not np.isfinite(total):
        raise InputError("the loss on the held-out text is not finite")
    return total / count, jax.tree.map(lambda s: s / count, gradient)


@partial(jax.jit, static_argnames="config")
def _summed_gradient(config: OPTConfig, emulator: SplitModel, batch: Batch):
    def loss(adapter):
        return summed_loss(config, emulator.assemble(adapter), batch)

    return jax.value_and_grad(loss, has_aux=True)(emulator.adapter)


def _flat(tree: Block | Adapter) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _agreement(full: np.ndarray, emulated: np.ndarray) -> Agreement:
    norm, other = np.linalg.norm(full), np.linalg.norm(emulated)
    return Agreement(
        cosine=float(full @ emulated / (norm * other)),
        relative_error=float(np.linalg.norm(emulated - full) / norm),
        norm_ratio=float(other / norm),
    )
