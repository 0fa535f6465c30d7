"""How the weights of OPT lie on a mesh, decided by the path of each parameter.

Along `model`, the usual tensor parallelism: q, k, v and fc1 are split by column and out_proj and
fc2 by row, so that a block needs one all-reduce per half; the token embedding and the head are
split by vocabulary. Along `data`, every matrix is split on its other axis (ZeRO stage 3), and
with it the moments that an optimiser keeps of it; a layer's weights are gathered as it runs and
their gradient is scattered. Vectors, and whatever an axis does not divide, are whole.
"""

from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from gradot_jax.parallel import DeviceMesh, put, row_spec

_COLUMN = ("q_proj", "k_proj", "v_proj", "fc1")
_ROW = ("out_proj", "fc2")

# (owner, field) -> the axis, counted from the end, that lies along `model`.
_AXES = {
    **{(site, field): -1 for site in _COLUMN for field in ("kernel", "right", "bias")},
    **{(site, field): -2 for site in _ROW for field in ("kernel", "left")},
}
_SHELL_AXES = {"embed_tokens": -2, "lm_head": -1}
_MATRICES = ("kernel", "left", "right", "embed_tokens", "embed_positions", "lm_head")


def partition_specs(tree, *, data: int, model: int):
    """The `PartitionSpec` of each leaf of a tree of OPT parameters.

    Args:
        tree: `Params`, `Block`, `Adapter`, an optimizer state over one, or any other tree that
            keeps their field names; leaves have a shape.
        data: devices along `data`.
        model: devices along `model`.

    Returns:
        A tree of the same structure.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spec(path, leaf.shape, data, model), tree
    )


def param_shardings(tree, mesh: DeviceMesh):
    """The sharding on a mesh of each leaf of a tree of OPT parameters; see `partition_specs`."""
    specs = partition_specs(tree, **mesh.mesh.shape)
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh.mesh, spec), specs, is_leaf=is_spec)


def shard_params(tree, mesh: DeviceMesh):
    """Places a tree of OPT parameters, numpy or JAX, on a mesh."""
    return put(tree, param_shardings(tree, mesh))


def gather_over_data(tree):
    """Weights as the arithmetic of one layer wants them: whole along `data`, split along `model`.

    To be called where a layer is applied, inside `jit` and, for a stack of layers, inside the
    scan, so that one layer at a time is whole. Left to itself XLA would as soon gather the batch
    and spread the products over `data`. Weights that lie on no mesh are as they were.
    """

    def gather(path, leaf):
        mesh = jax.typeof(leaf).sharding.mesh
        sizes = mesh.shape
        if sizes.get("data", 1) == 1:
            return leaf
        # From its own layout to the whole one: a gradient is scattered on the same way back.
        for data in (sizes["data"], 1):
            spec = _spec(path, leaf.shape, data, sizes["model"])
            leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))
        return leaf

    return jax.tree_util.tree_map_with_path(gather, tree)


def keep_all_but_weights(primitive, *_, **__) -> bool:
    """Rematerialisation policy that keeps every activation, and no weight gathered or cast.

    Kept for the backward pass over all layers, those would be a second copy of the model.
    """
    return primitive.name not in ("sharding_constraint", "convert_element_type")


def factor_sharding(shape: Sequence[int], mesh: DeviceMesh) -> NamedSharding:
    """The sharding of a Kronecker factor `[..., D, D]`, see `row_spec`."""
    return NamedSharding(mesh.mesh, row_spec(shape, mesh.mesh.shape))


def _spec(path, shape: tuple[int, ...], data: int, model: int) -> PartitionSpec:
    owner, field = ["", "", *(str(getattr(entry, "name", "")) for entry in path)][-2:]
    axes: list[tuple[str, ...]] = [()] * len(shape)
    split = _AXES.get((owner, field), _SHELL_AXES.get(field))
    # An axis of one device is not named: equal layouts then have equal specs.
    if split is not None and model > 1 and shape[split] % model == 0:
        axes[split] = ("model",)
    if field in _MATRICES and data > 1:
        _split_over_data(axes, shape, data, model, other=-1 if split == -2 else -2)
    named = [axis[0] if len(axis) == 1 else axis or None for axis in axes]
    return PartitionSpec(*named) if any(axes) else PartitionSpec()


def _split_over_data(
    axes: list[tuple[str, ...]], shape: tuple[int, ...], data: int, model: int, *, other: int
) -> None:
    """Adds `data` to the axis that `model` leaves, or where that does not divide to its own."""
    for axis in (other, -3 - other):
        if shape[axis] % (data * (model if axes[axis] else 1)) == 0:
            axes[axis] = (*axes[axis], "data")
            return
