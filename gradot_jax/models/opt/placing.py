"""From the tensors of a checkpoint to the weights of a model: left in the file, or placed.

What is placed goes one stacked array at a time from the file over the host to its devices, so
that the host holds one of them beside what the devices share with it.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np

from gradot_jax.files.mapped import StoredTensor
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.names import block_from_hf, layer_prefix, shell_from_hf
from gradot_jax.models.opt.params import Params
from gradot_jax.models.opt.partition import param_shardings
from gradot_jax.parallel import DeviceMesh

_ALIGNMENT = 64
"""Bytes; JAX uses the memory of a numpy array on CPUs as it is if it begins at a multiple."""

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf:
    """An array to be placed: a stored tensor, or those of all layers along a leading axis."""

    tensors: tuple[StoredTensor, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        single = self.tensors[0].shape
        return (len(self.tensors), *single) if self.stacked else single

    def read(self, dtype: np.dtype, index: Index) -> np.ndarray:
        layers, rest = (index[0], index[1:]) if self.stacked else (slice(None), index)
        tensors = self.tensors[layers]
        shape = tuple(
            len(range(*part.indices(size)))
            for part, size in zip(rest, tensors[0].shape, strict=True)
        )
        target = _aligned((len(tensors), *shape), dtype)
        for tensor, rows in zip(tensors, target, strict=True):
            tensor.read_into(rows, rest)
        # JAX may use this very memory.
        target.flags.writeable = False
        return target if self.stacked else target[0]


def map_params(config: OPTConfig, tensors: Mapping[str, StoredTensor]) -> Params:
    """The weights as read-only views of the file; every block is a segment of depth one.

    Args:
        config: the model's configuration.
        tensors: those of `model_schema`, by name.

    Raises:
        InputError: when a tensor holds a number that is not finite.
    """

    def view(leaf: _Leaf) -> np.ndarray:
        (tensor,) = leaf.tensors
        tensor.check_finite()
        return tensor.array[None] if leaf.stacked else tensor.array

    shell, blocks = _layers(config, tensors)
    singles = tuple(jax.tree.map(lambda t: _Leaf((t,), True), block) for block in blocks)
    return jax.tree.map(view, Params(shell, singles))


def place_params(
    config: OPTConfig,
    tensors: Mapping[str, StoredTensor],
    dtype: np.dtype,
    mesh: DeviceMesh | None = None,
) -> Params:
    """The weights on their devices, all blocks in one segment.

    Args:
        config: the model's configuration.
        tensors: those of `model_schema`, by name.
        dtype: of the weights.
        mesh: where they lie; None for the default device.

    Raises:
        InputError: when a number is not finite, before or after the cast.
    """
    shell, blocks = _layers(config, tensors)
    stack = jax.tree.map(lambda *layers: _Leaf(layers, True), *blocks)
    leaves = Params(shell, (stack,))
    if mesh is None:
        return jax.tree.map(partial(_place, dtype), leaves)
    return jax.tree.map(partial(_place, dtype), leaves, param_shardings(leaves, mesh))


def _layers(config: OPTConfig, tensors: Mapping[str, StoredTensor]):
    shell = jax.tree.map(lambda t: _Leaf((t,), False), shell_from_hf(config, tensors))
    layers = range(config.num_hidden_layers)
    return shell, [block_from_hf(config, tensors, layer_prefix(i)) for i in layers]


def _place(dtype: np.dtype, leaf: _Leaf, sharding: jax.sharding.Sharding | None = None):
    if sharding is None:
        placed = jax.device_put(leaf.read(dtype, (slice(None),) * len(leaf.shape)))
    else:
        parts: dict[tuple, np.ndarray] = {}

        # Devices along the batch ask for the same part.
        def part(index: Index) -> np.ndarray:
            key = tuple((i.start, i.stop) for i in index)
            if key not in parts:
                parts[key] = leaf.read(dtype, index)
            return parts[key]

        placed = jax.make_array_from_callback(leaf.shape, sharding, part)
    # The host's copy is gone before the next array is read.
    return placed.block_until_ready()


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
