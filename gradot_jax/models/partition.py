"""How the weights of a model lie on a mesh, decided by its layout and the path of each parameter.

Along `model`, the usual tensor parallelism: a site is split by column or by row as its layout says,
so that a block needs one all-reduce per half, a site of heads by whole heads (`Site.of_heads`); the
token embedding and the head are split by vocabulary. Along `data`, every matrix is split on its
other axis (ZeRO stage 3), and with it the moments that an optimiser keeps of it; a layer's weights
are gathered as it runs and their gradient is scattered. Vectors, and whatever an axis does not
divide, are whole.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gradot_jax.nn.batch import Batch
from gradot_jax.nn.layout import is_block
from gradot_jax.parallel import DeviceMesh, put, row_spec

_log = logging.getLogger(__name__)

# The axis, counted from the end, that lies along `model`, by the fields of a site.
_AXES = {
    "column": {"kernel": -1, "right": -1, "bias": -1},
    "row": {"kernel": -2, "left": -2},
}
_SHELL_AXES = {"embed_tokens": -2, "lm_head": -1}
_MATRICES = ("kernel", "left", "right", "embed_tokens", "embed_positions", "lm_head")


def partition_specs(tree, *, data: int, model: int):
    """The `PartitionSpec` of each leaf of a tree of parameters.

    Args:
        tree: `Params`, a block, an `Adapter`, an optimizer state over one, or any other tree of
            such; leaves have a shape.
        data: devices along `data`.
        model: devices along `model`.

    Returns:
        A tree of the same structure.
    """
    return _map_split(lambda *leaf: _spec(*leaf, data, model), tree)


def param_shardings(tree, mesh: DeviceMesh):
    """The sharding on a mesh of each leaf of a tree of parameters; see `partition_specs`."""
    specs = partition_specs(tree, **mesh.mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh.mesh, spec), specs)


def shard_params(tree, mesh: DeviceMesh):
    """Places a tree of parameters, numpy or JAX, on a mesh."""
    return put(tree, param_shardings(tree, mesh))


def place(tree, mesh: DeviceMesh | None):
    """Puts a tree of parameters, or a state over such, on its devices."""
    if mesh is None:
        # Committed to the default device as what a checkpoint restores is, or the first step of
        # a resumed run would be compiled anew.
        return jax.device_put(tree, jnp.zeros(()).sharding)
    return shard_params(tree, mesh)


def place_batch(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    """Puts a batch on its devices, its rows over `data`.

    Rows that count nothing are added until `data` divides their number; the loss is the same.
    """
    if mesh is None:
        return Batch(*map(jnp.asarray, batch))
    missing = -len(batch.input_ids) % mesh.mesh.shape["data"]
    rows = (np.pad(np.asarray(leaf), ((0, missing), (0, 0))) for leaf in batch)
    return put(Batch(*rows), mesh.batched)


def gather_over_data(tree):
    """Weights as the arithmetic of one layer wants them: whole along `data`, split along `model`.

    To be called where a layer is applied, inside `jit` and, for a stack of layers, inside the
    scan, so that one layer at a time is whole. Left to itself XLA would as soon gather the batch
    and spread the products over `data`. Weights that lie on no mesh are as they were.
    """

    def gather(field: str, split: _Split, leaf):
        mesh = jax.typeof(leaf).sharding.mesh
        sizes = mesh.shape
        if sizes.get("data", 1) == 1:
            return leaf
        # From its own layout to the whole one: a gradient is scattered on the same way back.
        for data in (sizes["data"], 1):
            spec = _spec(field, split, leaf, data, sizes["model"])
            leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))
        return leaf

    return _map_split(gather, tree)


def keep_all_but_weights(primitive, *_, **__) -> bool:
    """Rematerialisation policy that keeps every activation, and no weight gathered or cast.

    Kept for the backward pass over all layers, those would be a second copy of the model.
    """
    return primitive.name not in ("sharding_constraint", "convert_element_type")


def factor_sharding(shape: Sequence[int], mesh: DeviceMesh) -> NamedSharding:
    """The sharding of a Kronecker factor `[..., D, D]`, see `row_spec`."""
    return NamedSharding(mesh.mesh, row_spec(shape, mesh.mesh.shape))


class _Split(NamedTuple):
    """How a leaf is split along `model`.

    Attributes:
        axis: counted from the end, or None for not at all.
        site: that it belongs to, or what else its owner is called.
        unit: what is not cut: the width of a head, or 1.
    """

    axis: int | None
    site: str = ""
    unit: int = 1


def _map_split(function: Callable[[str, _Split, Any], Any], tree):
    """Maps `(field, split, leaf)` over a tree that may hold blocks anywhere."""

    def of_node(path, node):
        sites = {site.name: site for site in node.layout.sites} if is_block(node) else {}

        def of_leaf(own, leaf):
            names = (str(getattr(entry, "name", "")) for entry in (*path, *own))
            owner, field = ["", "", *names][-2:]
            site = sites.get(owner)
            if site is None:
                split = _Split(_SHELL_AXES.get(field))
            else:
                unit = node.head_dim if site.of_heads else 1
                split = _Split(_AXES[site.split].get(field), owner, unit)
            return function(field, split, leaf)

        return jax.tree_util.tree_map_with_path(of_leaf, node)

    return jax.tree_util.tree_map_with_path(of_node, tree, is_leaf=is_block)


def _spec(field: str, split: _Split, leaf, data: int, model: int) -> PartitionSpec:
    shape, axis = leaf.shape, split.axis
    axes: list[tuple[str, ...]] = [()] * len(shape)
    # An axis of one device is not named: equal layouts then have equal specs.
    if axis is not None and model > 1:
        if shape[axis] % (split.unit * model) == 0:
            axes[axis] = ("model",)
        elif split.unit > 1:
            _say_whole(split.site, shape[axis] // split.unit, model)
    if field in _MATRICES and data > 1:
        _split_over_data(axes, shape, data, model, other=-1 if axis == -2 else -2)
    named = [axis[0] if len(axis) == 1 else axis or None for axis in axes]
    return PartitionSpec(*named) if any(axes) else PartitionSpec()


@functools.cache
def _say_whole(site: str, heads: int, model: int) -> None:
    _log.info("%s: its %d heads are whole on each of %d model devices", site, heads, model)


def _split_over_data(
    axes: list[tuple[str, ...]], shape: tuple[int, ...], data: int, model: int, *, other: int
) -> None:
    """Adds `data` to the axis that `model` leaves, or where that does not divide to its own."""
    for axis in (other, -3 - other):
        if shape[axis] % (data * (model if axes[axis] else 1)) == 0:
            axes[axis] = (*axes[axis], "data")
            return
