"""Tensor names in bundles and adapters, and the ways between them and our trees.

Adapter blocks have the Hugging Face names of the full model, with its layer indices. Compressed
layers are numbered by their place in the emulator, `middle.{j}.`, which does not tell which
layers of the original they come from. Dense weights lie as torch stores them, `[D_out, D_in]`;
factors as `left` `[D_in, R]` and `right` `[R, D_out]`. A harmonizer has two dense weights,
`harmonizer.down` and `harmonizer.up`. Arrays are numpy, on the host.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from gradot_jax.compression.plan import HarmonizerShape, LayerShape
from gradot_jax.errors import InputError
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.names import block_from_hf, block_schema, block_to_hf, layer_prefix
from gradot_jax.models.opt.params import (
    ATTENTION_SITES,
    MLP_SITES,
    Block,
    Layer,
    stack_blocks,
    unstack_blocks,
)
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.nn.linear import Dense, Linear, LowRank
from gradot_jax.nn.norm import LayerNorm
from gradot_jax.offsite.split import Adapter, AdapterSpec

Schema = dict[str, tuple[int, ...]]

_PREFIXES = {site: f"self_attn.{site}." for site in ATTENTION_SITES}
_PREFIXES |= {site: f"{site}." for site in MLP_SITES}
_HARMONIZER = ("down", "up")
_NORMS = ("self_attn_layer_norm", "final_layer_norm")


def adapter_schema(config: OPTConfig, spec: AdapterSpec) -> Schema:
    """Shapes of an adapter's tensors, by name."""
    block = block_schema(config).items()
    layers = spec.layers(config.num_hidden_layers)
    return {layer_prefix(i) + name: shape for i in layers for name, shape in block}


def adapter_to_tensors(config: OPTConfig, adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """An adapter's tensors, by name."""
    layers = adapter.spec.layers(config.num_hidden_layers)
    for layer, block in zip(layers, unstack_blocks(adapter.stacks), strict=True):
        for name, array in block_to_hf(block):
            yield layer_prefix(layer) + name, array


def adapter_from_tensors(
    config: OPTConfig, spec: AdapterSpec, tensors: Mapping[str, np.ndarray]
) -> Adapter:
    """The adapter from tensors that fit `adapter_schema`."""
    layers = spec.layers(config.num_hidden_layers)
    blocks = stack_blocks([block_from_hf(config, tensors, layer_prefix(i)) for i in layers])
    return Adapter.of_stack(blocks, spec)


def middle_prefix(index: int) -> str:
    """Prefix of the tensors of one compressed layer."""
    return f"middle.{index}."


def middle_schema(config: OPTConfig, shapes: Sequence[LayerShape | HarmonizerShape]) -> Schema:
    """Shapes of the compressed layers' tensors, by name."""
    return {
        middle_prefix(index) + name: size
        for index, shape in enumerate(shapes)
        for name, size in _layer_schema(config, shape).items()
    }


def _layer_schema(config: OPTConfig, shape: LayerShape | HarmonizerShape) -> Schema:
    if isinstance(shape, HarmonizerShape):
        width, rank = config.hidden_size, shape.rank
        return {
            "harmonizer.down.weight": (rank, width),
            "harmonizer.down.bias": (rank,),
            "harmonizer.up.weight": (width, rank),
            "harmonizer.up.bias": (width,),
        }
    layer = block_schema(dataclasses.replace(config, ffn_dim=shape.num_channels))
    for site, rank in shape.ranks:
        if rank is not None:
            d_out, d_in = layer.pop(_PREFIXES[site] + "weight")
            layer[_PREFIXES[site] + "left"] = (d_in, rank)
            layer[_PREFIXES[site] + "right"] = (rank, d_out)
    return layer


def middle_to_tensors(
    layers: Iterable[Layer], shapes: Sequence[LayerShape | HarmonizerShape]
) -> Iterator[tuple[str, np.ndarray]]:
    """The compressed layers' tensors at their true sizes, by name.

    Args:
        layers: single, see `SplitModel.iterate_stored`; ranks and channels may be padded with zeros
            at their end.
        shapes: true sizes, one per layer.

    Raises:
        InputError: when the number or kind of layers differs, or what lies beyond a true size is
            not zero.
    """
    for index, (layer, shape) in enumerate(zip_longest(layers, shapes)):
        if layer is None or shape is None:
            many = "fewer" if layer is None else "more"
            raise InputError(f"the emulator has {many} compressed layers than {len(shapes)}")
        where = f"middle layer {index}"
        if isinstance(layer, Harmonizer) != isinstance(shape, HarmonizerShape):
            raise InputError(f"{where}: planned {shape}, got a {type(layer).__name__}")
        if isinstance(layer, Harmonizer):
            tensors = _harmonizer_to_tensors(layer)
        else:
            tensors = _block_to_tensors(_trim(layer, shape, where))
        for name, array in tensors:
            yield middle_prefix(index) + name, array


def _harmonizer_to_tensors(layer: Harmonizer) -> Iterator[tuple[str, np.ndarray]]:
    for part in _HARMONIZER:
        weights = getattr(layer, part)
        yield f"harmonizer.{part}.weight", np.asarray(weights.kernel).T
        yield f"harmonizer.{part}.bias", np.asarray(weights.bias)


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
    config: OPTConfig,
    shape: LayerShape | HarmonizerShape,
    tensors: Mapping[str, np.ndarray],
    prefix: str,
) -> Layer:
    """One compressed layer from tensors `prefix + name` that fit `middle_schema`."""
    if isinstance(shape, HarmonizerShape):
        names = (f"{prefix}harmonizer.{part}" for part in _HARMONIZER)
        return Harmonizer(*(Dense(tensors[f"{n}.weight"].T, tensors[f"{n}.bias"]) for n in names))
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
