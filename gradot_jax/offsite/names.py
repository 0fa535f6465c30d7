"""Tensor names in bundles and adapters, and the ways between them and our trees.

Outer blocks have the Hugging Face names of the full model, with its layer indices. Compressed
layers are numbered by their place in the emulator, `middle.{j}.`, which does not tell which
layers of the original they come from. Dense weights lie as torch stores them, `[D_out, D_in]`;
factors as `left` `[D_in, R]` and `right` `[R, D_out]`. Arrays are numpy, on the host.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gradot_jax.compression.plan import LayerShape
from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.names import block_from_hf, block_schema, block_to_hf, layer_prefix
from gradot_jax.models.opt.params import (
    ATTENTION_SITES,
    MLP_SITES,
    Block,
    slice_blocks,
    stack_blocks,
    unstack_blocks,
)
from gradot_jax.nn.linear import Dense, Linear, LowRank
from gradot_jax.nn.norm import LayerNorm
from gradot_jax.offsite.split import Adapter, AdapterSpec

Schema = dict[str, tuple[int, ...]]

_PREFIXES = {site: f"self_attn.{site}." for site in ATTENTION_SITES}
_PREFIXES |= {site: f"{site}." for site in MLP_SITES}
_NORMS = ("self_attn_layer_norm", "final_layer_norm")


def adapter_layers(config: OPTConfig, spec: AdapterSpec) -> tuple[int, ...]:
    """Full-model indices of the adapter's blocks, in depth order."""
    layers = config.num_hidden_layers
    return (*range(spec.num_bottom), *range(layers - spec.num_top, layers))


def adapter_schema(config: OPTConfig, spec: AdapterSpec) -> Schema:
    """Shapes of an adapter's tensors, by name."""
    block = block_schema(config).items()
    return {
        layer_prefix(i) + name: shape for i in adapter_layers(config, spec) for name, shape in block
    }


def adapter_to_tensors(config: OPTConfig, adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """An adapter's tensors, by name."""
    layers = adapter_layers(config, adapter.spec)
    for layer, block in zip(layers, unstack_blocks((adapter.bottom, adapter.top)), strict=True):
        for name, array in block_to_hf(block):
            yield layer_prefix(layer) + name, array


def adapter_from_tensors(
    config: OPTConfig, spec: AdapterSpec, tensors: Mapping[str, np.ndarray]
) -> Adapter:
    """The adapter from tensors that fit `adapter_schema`."""
    layers = adapter_layers(config, spec)
    blocks = stack_blocks([block_from_hf(config, tensors, layer_prefix(i)) for i in layers])
    bottom = slice_blocks(blocks, 0, spec.num_bottom)
    return Adapter(bottom, slice_blocks(blocks, spec.num_bottom, len(layers)))


def middle_prefix(index: int) -> str:
    """Prefix of the tensors of one compressed layer."""
    return f"middle.{index}."


def middle_schema(config: OPTConfig, shapes: Sequence[LayerShape]) -> Schema:
    """Shapes of the compressed layers' tensors, by name."""
    schema: Schema = {}
    for index, shape in enumerate(shapes):
        pruned = dataclasses.replace(config, ffn_dim=shape.num_channels)
        layer = block_schema(pruned)
        for site, rank in shape.ranks:
            if rank is not None:
                d_out, d_in = layer.pop(_PREFIXES[site] + "weight")
                layer[_PREFIXES[site] + "left"] = (d_in, rank)
                layer[_PREFIXES[site] + "right"] = (rank, d_out)
        schema |= {middle_prefix(index) + name: size for name, size in layer.items()}
    return schema


def middle_to_tensors(
    middle: Sequence[Block], shapes: Sequence[LayerShape]
) -> Iterator[tuple[str, np.ndarray]]:
    """The compressed layers' tensors at their true sizes, by name.

    Args:
        middle: stacks in depth order; ranks and channels may be padded with zeros at their end.
        shapes: true sizes, one per layer.

    Raises:
        InputError: when the number of layers differs, or what lies beyond a true size is not
            zero.
    """
    blocks = unstack_blocks(middle)
    if len(blocks) != len(shapes):
        raise InputError(f"the emulator has {len(blocks)} compressed layers, not {len(shapes)}")
    for index, (block, shape) in enumerate(zip(blocks, shapes, strict=True)):
        for name, array in _block_to_tensors(_trim(block, shape, f"middle layer {index}")):
            yield middle_prefix(index) + name, array


def _trim(block: Block, shape: LayerShape, where: str) -> Block:
    def head(array, size: int, axis: int, site: str) -> np.ndarray:
        kept, padding = np.split(np.asarray(array), [size], axis)
        if padding.any():
            raise InputError(f"{where}, {site}: not zero beyond its planned size {size}")
        return kept

    def attention(site: str, rank: int | None) -> Linear:
        weights = getattr(block, site)
        if isinstance(weights, LowRank) != (rank is not None):
            raise InputError(f"{where}, {site}: planned rank {rank}, got {type(weights).__name__}")
        if rank is None:
            return weights
        left, right = head(weights.left, rank, 1, site), head(weights.right, rank, 0, site)
        return LowRank(left, right, weights.bias)

    size, fc1, fc2 = shape.num_channels, block.fc1, block.fc2
    if not isinstance(fc1, Dense) or not isinstance(fc2, Dense):
        raise InputError(f"{where}: fc1 and fc2 must be dense")
    bias = None if fc1.bias is None else head(fc1.bias, size, 0, "fc1")
    return block.replace(
        fc1=Dense(head(fc1.kernel, size, 1, "fc1"), bias),
        fc2=Dense(head(fc2.kernel, size, 0, "fc2"), fc2.bias),
        **{site: attention(site, rank) for site, rank in shape.ranks},
    )


def _block_to_tensors(block: Block) -> Iterator[tuple[str, np.ndarray]]:
    for site, prefix in _PREFIXES.items():
        weights = getattr(block, site)
        if isinstance(weights, LowRank):
            yield prefix + "left", np.asarray(weights.left)
            yield prefix + "right", np.asarray(weights.right)
        else:
            yield prefix + "weight", np.asarray(weights.kernel).T
        if weights.bias is not None:
            yield prefix + "bias", np.asarray(weights.bias)
    for name in _NORMS:
        norm = getattr(block, name)
        if norm.scale is not None:
            yield f"{name}.weight", np.asarray(norm.scale)
            yield f"{name}.bias", np.asarray(norm.bias)


def middle_layer_from_tensors(
    config: OPTConfig, shape: LayerShape, tensors: Mapping[str, np.ndarray], prefix: str
) -> Block:
    """One compressed layer from tensors `prefix + name` that fit `middle_schema`."""
    ranks = dict(shape.ranks)

    def linear(site: str) -> Linear:
        name = prefix + _PREFIXES[site]
        bias = tensors[name + "bias"] if config.enable_bias else None
        if ranks.get(site) is None:
            return Dense(tensors[name + "weight"].T, bias)
        return LowRank(tensors[name + "left"], tensors[name + "right"], bias)

    def norm(name: str) -> LayerNorm:
        if not config.layer_norm_elementwise_affine:
            return LayerNorm(None, None)
        return LayerNorm(tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.bias"])

    linears = {site: linear(site) for site in _PREFIXES}
    return Block(**linears, **{name: norm(name) for name in _NORMS})
