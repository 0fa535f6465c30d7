"""Gradient fidelity: what the method promises, measured without any fine-tuning.

On held-out batches, the adapter's gradient through the emulator against its gradient through the
full model. Both models go back together, layer by layer, so that of either the weights and the
gradient of one layer are in memory.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from gradot_jax.calibration.passes import (
    HeadSums,
    Streams,
    embed_batches,
    forward_layer,
    head_cotangents,
    layer_function,
    place_layer,
    sweep_layer,
)
from gradot_jax.errors import InputError
from gradot_jax.models.family import ModelConfig, attention_windows
from gradot_jax.models.params import Params
from gradot_jax.models.partition import place
from gradot_jax.models.split import SplitModel, split_model
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.dtypes import compute_dtype
from gradot_jax.nn.layout import Block
from gradot_jax.parallel import DeviceMesh, to_host


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


class _ForwardPass(NamedTuple):
    """A model's way forward: inputs of each layer, and the head's loss and cotangents."""

    model: Params
    is_adapter: list[bool]
    boundaries: list[jax.Array]
    streams: Streams
    head: HeadSums


def gradient_fidelity(
    config: ModelConfig,
    params: Params,
    emulator: SplitModel,
    batches: Iterable[Batch],
    *,
    mesh: DeviceMesh | None = None,
    dtype: DTypeLike | None = None,
) -> GradientFidelity:
    """Compares the adapter's gradients through an emulator and through the full model.

    Args:
        config: the model's configuration.
        params: the full original model, on the host or on devices.
        emulator: a compression of it.
        batches: held-out text of one shape; gradients are of the mean loss over all of it.
        mesh: devices to spread the work over.
        dtype: of the arithmetic, see `nn.dtypes.compute_dtype`.

    Raises:
        InputError: without a batch that counts a token, or when a loss is not finite.
    """
    batches = list(batches)
    if not any(batch.loss_mask.any() for batch in batches):
        raise InputError("gradient fidelity needs at least one batch with a counted token")
    dtype = compute_dtype(params.shell.embed_tokens.dtype, dtype)
    original = split_model(params, emulator.adapter.split)
    full, compressed = (
        _forward(config, model, batches, dtype, mesh) for model in (original, emulator)
    )
    losses = [
        forward_pass.head.loss / forward_pass.head.count for forward_pass in (full, compressed)
    ]
    if not np.isfinite(losses).all():
        raise InputError("the loss on the held-out text is not finite")
    pairs = zip(
        _adapter_gradients(config, full, mesh),
        _adapter_gradients(config, compressed, mesh),
        strict=True,
    )
    # From the top layer down.
    products = [_products(*pair) for pair in pairs]
    split = emulator.adapter.split
    return GradientFidelity(
        adapter=_agreement(products),
        bottom=_agreement(products[len(products) - split.num_bottom :]),
        top=_agreement(products[: split.num_top]),
        loss_full=losses[0],
        loss_emulator=losses[1],
    )


def _forward(
    config: ModelConfig,
    model: SplitModel,
    batches: list[Batch],
    dtype: DTypeLike,
    mesh: DeviceMesh | None,
) -> _ForwardPass:
    split, params = model.adapter.split, model.assemble()
    windows = attention_windows(config, params.num_layers)
    inner = [place is None for place in model.layer_map]
    is_adapter = [True] * split.num_bottom + inner + [True] * split.num_top
    shell = place(params.shell, mesh)
    streams = embed_batches(config, shell, batches, dtype, mesh)
    hidden, boundaries = streams.hidden, []
    for index in range(params.num_layers):
        boundaries.append(hidden)
        layer = place_layer(params, index, mesh)
        apply = layer_function(config, windows[index])
        hidden = forward_layer(apply, layer, hidden, streams.mask)
    head = head_cotangents(config, shell, streams._replace(hidden=hidden))
    return _ForwardPass(params, is_adapter, boundaries, streams, head)


def _adapter_gradients(
    config: ModelConfig, forward_pass: _ForwardPass, mesh: DeviceMesh | None
) -> Iterator[Block]:
    """Gradients of the summed loss over the counted targets, from the adapter's top layer down."""
    windows = attention_windows(config, forward_pass.model.num_layers)
    params, is_adapter, head = forward_pass.model, forward_pass.is_adapter, forward_pass.head
    cotangents = head.cotangents
    for index in reversed(range(is_adapter.index(True), params.num_layers)):
        sums, cotangents = sweep_layer(
            layer_function(config, windows[index]),
            place_layer(params, index, mesh),
            None,
            forward_pass.boundaries.pop(),
            forward_pass.streams.mask,
            cotangents,
            with_gradient=is_adapter[index],
        )
        if is_adapter[index]:
            yield to_host(jax.tree.map(lambda g: g / head.count, sums.gradient))


def _products(full: Block, emulated: Block) -> np.ndarray:
    """`<g, g>`, `<g*, g*>`, `<g, g*>` and `|g* - g|^2` of a layer's gradients, float64 `[4]`."""
    total = np.zeros(4)
    for g, other in zip(jax.tree.leaves(full), jax.tree.leaves(emulated), strict=True):
        g, other = np.asarray(g, np.float64).ravel(), np.asarray(other, np.float64).ravel()
        difference = other - g
        total += [g @ g, other @ other, g @ other, difference @ difference]
    return total


def _agreement(products: list[np.ndarray]) -> Agreement | None:
    if not products:
        return None
    full, emulated, across, difference = np.sum(products, axis=0)
    return Agreement(
        cosine=float(across / np.sqrt(full * emulated)),
        relative_error=float(np.sqrt(difference / full)),
        norm_ratio=float(np.sqrt(emulated / full)),
    )
