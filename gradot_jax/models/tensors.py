"""The one mapping between trees of weights and named tensors, in both directions.

Blocks of the original and of the adapter have Hugging Face's names, with the layer indices of the
full model. Compressed layers are numbered by their place in the emulator, `middle.{j}.`, which does
not tell which layers of the original they come from. Dense weights lie as torch stores them,
`[D_out, D_in]`; factors as `left` `[D_in, R]` and `right` `[R, D_out]`. A harmonizer has two dense
weights, `harmonizer.down` and `harmonizer.up`.

Names are a tree of the same structure as the weights, so that either way is one `jax.tree.map`.
Arrays are numpy, on the host.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import numpy as np

from gradot_jax.compression.plan import HarmonizerShape, LayerShape
from gradot_jax.errors import InputError
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Layer, Params, depth, get_block, stack_blocks, unstack_blocks
from gradot_jax.models.split import Adapter, AdapterSpec
from gradot_jax.nn.harmonizer import Harmonizer
from gradot_jax.nn.layout import Block, maps, shaped
from gradot_jax.nn.linear import Dense, Linear, LowRank, dense_kernel

Schema = dict[str, tuple[int, ...]]
"""Shapes of tensors as they are stored, by name."""

# Parameters are declared as JAX arrays; until they are placed they may be anything that has a `T`.
Tensors = Mapping[str, Any]

_NORM_FIELDS = {"scale": "weight", "bias": "bias"}


class TensorName(NamedTuple):
    """Where a leaf is stored.

    Attributes:
        name: of the tensor.
        transposed: whether rows of the tensor are columns of the leaf.
    """

    name: str
    transposed: bool = False


def layer_prefix(config: ModelConfig, index: int) -> str:
    """Prefix of the tensors of one layer of the full model."""
    return f"{config.family.layers_path}.{index}."


def middle_prefix(index: int) -> str:
    """Prefix of the tensors of one compressed layer."""
    return f"middle.{index}."


def _linear_names(path: str, weights: Linear) -> Linear:
    bias = None if weights.bias is None else TensorName(f"{path}.bias")
    if isinstance(weights, LowRank):
        return LowRank(TensorName(f"{path}.left"), TensorName(f"{path}.right"), bias)
    return Dense(TensorName(f"{path}.weight", transposed=True), bias)


def _norm_names(path: str, norm: Any) -> Any:
    if norm is None:
        return None
    return norm.replace(
        **{
            field: TensorName(f"{path}.{name}")
            for field, name in _NORM_FIELDS.items()
            if getattr(norm, field, None) is not None
        }
    )


def layer_names(layer: Layer) -> Layer:
    """The tensor of each leaf of a single layer, without the layer's prefix."""
    if isinstance(layer, Harmonizer):
        parts = {name: f"harmonizer.{name}" for name in ("down", "up")}
        return Harmonizer(
            **{n: _linear_names(path, getattr(layer, n)) for n, path in parts.items()}
        )
    sites, layout = maps(layer), layer.layout
    linears = {site.name: _linear_names(site.path, sites[site.name]) for site in layout.sites}
    norms = {field: _norm_names(path, getattr(layer, field)) for field, path in layout.norms}
    return layer.replace(**linears, **norms)


def shell_names(config: ModelConfig, shell: Any) -> Any:
    """The tensor of each leaf of a shell, by full name."""

    def names(field: str, path: str) -> Any:
        part = getattr(shell, field)
        if part is None:
            return None
        if isinstance(part, Dense):
            return _linear_names(path, part)
        if hasattr(part, "scale"):
            return _norm_names(path, part)
        # An embedding lies as it is used, `[V, E]`; a head is `[E, V]`.
        return TensorName(f"{path}.weight", transposed=field == "lm_head")

    return shell.replace(**{f: names(f, path) for f, path in config.family.shell_paths.items()})


def _is_name(node: object) -> bool:
    return isinstance(node, TensorName)


def _stored_order(layer: Any) -> list[str]:
    """Fields in the order in which their tensors are stored."""
    if isinstance(layer, Harmonizer):
        return ["down", "up"]
    layout = layer.layout
    return [*(site.name for site in layout.sites), *(field for field, _ in layout.norms)]


def _pairs(
    fields: Iterable[str], names: Any, tree: Any, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Names and leaves as stored, of some fields of a tree, in their order."""
    for field in fields:
        part, own = getattr(tree, field), getattr(names, field)
        leaves = zip(jax.tree.leaves(own, is_leaf=_is_name), jax.tree.leaves(part), strict=True)
        for name, leaf in leaves:
            yield prefix + name.name, _transposed(leaf) if name.transposed else leaf


def _transposed(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype)
    return leaf.T


def layer_to_tensors(layer: Layer, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a single layer, dense or compressed, by `prefix` and name."""
    arrays = jax.tree.map(np.asarray, layer)
    yield from _pairs(_stored_order(layer), layer_names(layer), arrays, prefix)


def shell_to_tensors(config: ModelConfig, shell: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors outside the blocks, by full name."""
    arrays = jax.tree.map(np.asarray, shell)
    yield from _pairs(config.family.shell_paths, shell_names(config, shell), arrays)


def params_to_tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a model, by full name, one layer at a time; factors are multiplied back.

    Of numpy parameters the tensors are views, so that writing to them fills the parameters.
    """
    yield from shell_to_tensors(config, params.shell)
    layer = 0
    for stack in params.segments:
        for index in range(depth(stack)):
            block = with_dense_maps(get_block(stack, index))
            yield from layer_to_tensors(block, layer_prefix(config, layer))
            layer += 1


def with_dense_maps(block: Block) -> Block:
    """A block, or a stack of such, whose every map is dense: factors are multiplied back."""
    low_rank = {name: w for name, w in maps(block).items() if isinstance(w, LowRank)}
    return block.replace(**{name: Dense(dense_kernel(w), w.bias) for name, w in low_rank.items()})


def adapter_to_tensors(config: ModelConfig, adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """An adapter's tensors, by name."""
    layers = adapter.split.layers(config.num_hidden_layers)
    for layer, block in zip(layers, unstack_blocks(adapter.stacks), strict=True):
        yield from layer_to_tensors(block, layer_prefix(config, layer))


def middle_to_tensors(
    layers: Iterable[Layer], config: ModelConfig, shapes: Sequence[LayerShape | HarmonizerShape]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `SplitModel.stored_layers`, by name.

    Raises:
        InputError: when the number, kind or size of layers differs.
    """
    for index, (layer, shape) in enumerate(zip_longest(layers, shapes)):
        if layer is None or shape is None:
            many = "fewer" if layer is None else "more"
            raise InputError(f"the emulator has {many} compressed layers than {len(shapes)}")
        _check_layer(f"middle layer {index}", layer, shape, layer_shapes(config, shape))
        yield from layer_to_tensors(layer, middle_prefix(index))


def _check_layer(
    where: str, layer: Layer, shape: LayerShape | HarmonizerShape, planned: Any
) -> None:
    if type(layer) is not type(planned):
        raise InputError(f"{where}: planned {shape}, got a {type(layer).__name__}")
    for name in _stored_order(layer):
        got, expected = getattr(layer, name), getattr(planned, name)
        sizes = [[leaf.shape for leaf in jax.tree.leaves(part)] for part in (got, expected)]
        if type(got) is not type(expected) or sizes[0] != sizes[1]:
            raise InputError(
                f"{where}, {name}: got {type(got).__name__} {sizes[0]}, planned "
                f"{type(expected).__name__} {sizes[1]}"
            )


def layer_shapes(config: ModelConfig, shape: LayerShape | HarmonizerShape) -> Layer:
    """A compressed layer as shapes without arrays."""
    if isinstance(shape, HarmonizerShape):
        width, rank = config.hidden_size, shape.rank
        return Harmonizer(
            Dense(shaped(width, rank), shaped(rank)), Dense(shaped(rank, width), shaped(width))
        )
    block, channels = config.family.block_shapes(config), config.family.layout.channels
    fields: dict[str, Linear] = {}
    for site, rank in shape.ranks:
        dense: Dense = getattr(block, site)
        if rank is not None:
            d_in, d_out = dense.shape
            fields[site] = LowRank(shaped(d_in, rank), shaped(rank, d_out), dense.bias)
    count = shape.num_channels
    for site in channels.into:
        dense = getattr(block, site)
        bias = None if dense.bias is None else shaped(count)
        fields[site] = Dense(shaped(dense.shape[0], count), bias)
    out: Dense = getattr(block, channels.out)
    fields[channels.out] = Dense(shaped(count, out.shape[1]), out.bias)
    return block.replace(**fields)


def _schema(pairs: Iterable[tuple[str, Any]]) -> Schema:
    return {name: leaf.shape for name, leaf in pairs}


def layer_schema(layer: Layer, prefix: str = "") -> Schema:
    """Shapes of a layer's tensors by `prefix` and name, from its arrays or shapes."""
    return _schema(_pairs(_stored_order(layer), layer_names(layer), layer, prefix))


def shell_schema(config: ModelConfig) -> Schema:
    """Shapes of the tensors outside the blocks, by full name."""
    shell = config.family.shell_shapes(config)
    return _schema(_pairs(config.family.shell_paths, shell_names(config, shell), shell))


def _blocks_schema(config: ModelConfig, layers: Iterable[int]) -> Schema:
    block = layer_schema(config.family.block_shapes(config)).items()
    return {layer_prefix(config, i) + name: shape for i in layers for name, shape in block}


def model_schema(config: ModelConfig) -> Schema:
    """Shapes of every tensor of a checkpoint, by full name."""
    return shell_schema(config) | _blocks_schema(config, range(config.num_hidden_layers))


def adapter_schema(config: ModelConfig, split: AdapterSpec) -> Schema:
    """Shapes of an adapter's tensors, by name."""
    return _blocks_schema(config, split.layers(config.num_hidden_layers))


def middle_schema(config: ModelConfig, shapes: Sequence[LayerShape | HarmonizerShape]) -> Schema:
    """Shapes of the compressed layers' tensors, by name."""
    return {
        name: size
        for index, shape in enumerate(shapes)
        for name, size in layer_schema(layer_shapes(config, shape), middle_prefix(index)).items()
    }


def _filled(names: Any, tensors: Tensors, prefix: str = "") -> Any:
    def tensor(name: TensorName) -> Any:
        found = tensors[prefix + name.name]
        return found.T if name.transposed else found

    return jax.tree.map(tensor, names, is_leaf=_is_name)


def shell_from_tensors(config: ModelConfig, tensors: Tensors) -> Any:
    """The shell from tensors that fit `shell_schema`."""
    return _filled(shell_names(config, config.family.shell_shapes(config)), tensors)


def block_from_tensors(config: ModelConfig, tensors: Tensors, prefix: str) -> Block:
    """One dense block from tensors `prefix + name`."""
    return _filled(layer_names(config.family.block_shapes(config)), tensors, prefix)


def middle_layer_from_tensors(
    config: ModelConfig, shape: LayerShape | HarmonizerShape, tensors: Tensors, prefix: str
) -> Layer:
    """One compressed layer from tensors `prefix + name` that fit `middle_schema`."""
    return _filled(layer_names(layer_shapes(config, shape)), tensors, prefix)


def adapter_from_tensors(config: ModelConfig, split: AdapterSpec, tensors: Tensors) -> Adapter:
    """The adapter from tensors that fit `adapter_schema`."""
    layers = split.layers(config.num_hidden_layers)
    prefixes = (layer_prefix(config, layer) for layer in layers)
    blocks = stack_blocks([block_from_tensors(config, tensors, prefix) for prefix in prefixes])
    return Adapter.of_stack(blocks, split)


def count_all(schema: Schema) -> int:
    """Parameters of all tensors."""
    return sum(map(math.prod, schema.values()))


def count_kernels(schema: Schema) -> int:
    """Parameters of matrices; biases and norms are vectors and do not count."""
    return sum(shape[0] * shape[1] for shape in schema.values() if len(shape) == 2)
