"""How the weights of OPT lie on a mesh, decided by the path of each parameter.

The usual tensor parallelism: q, k, v and fc1 are split by column and out_proj and fc2 by row,
so that a block needs one all-reduce per half; the token embedding and the head are split by
vocabulary. Everything else, and whatever the `model` axis does not divide, is replicated.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from gradot_jax.parallel import DeviceMesh

_COLUMN = ("q_proj", "k_proj", "v_proj", "fc1")
_ROW = ("out_proj", "fc2")

# (owner, field) -> the axis, counted from the end, that lies along `model`.
_AXES = {
    **{(site, field): -1 for site in _COLUMN for field in ("kernel", "right", "bias")},
    **{(site, field): -2 for site in _ROW for field in ("kernel", "left")},
}
_SHELL_AXES = {"embed_tokens": -2, "lm_head": -1}


def partition_specs(tree, model_size: int):
    """The `PartitionSpec` of each leaf of a tree of OPT parameters.

    Args:
        tree: `Params`, `Block`, `Adapter`, an optimizer state over one, or any other tree that
            keeps their field names; leaves have a shape.
        model_size: devices along `model`.

    Returns:
        A tree of the same structure.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spec(path, leaf.shape, model_size), tree
    )


def param_shardings(tree, mesh: DeviceMesh):
    """The sharding on a mesh of each leaf of a tree of OPT parameters; see `partition_specs`."""
    specs = partition_specs(tree, mesh.mesh.shape["model"])
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh.mesh, spec), specs, is_leaf=is_spec)


def shard_params(tree, mesh: DeviceMesh):
    """Places a tree of OPT parameters, numpy or JAX, on a mesh."""
    return jax.device_put(tree, param_shardings(tree, mesh))


def _spec(path, shape: tuple[int, ...], model_size: int) -> PartitionSpec:
    owner, field = ["", "", *(str(getattr(entry, "name", "")) for entry in path)][-2:]
    axis = _AXES.get((owner, field), _SHELL_AXES.get(field))
    if axis is None or shape[axis] % model_size:
        return PartitionSpec()
    axes: list[str | None] = [None] * len(shape)
    axes[axis] = "model"
    return PartitionSpec(*axes)
