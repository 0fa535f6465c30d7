"""A batch of matrices over all devices of a mesh, each of which takes its share alone.

XLA does not partition LAPACK's and cuSOLVER's routines: left to itself it would gather the whole
batch and do all of it on every device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gradot_jax.parallel import DeviceMesh, put

_DEVICES = ("data", "model")


def over_devices(
    function: Callable[..., Any], batch: Any, mesh: DeviceMesh | None, *options: Any
) -> Any:
    """`function(batch, *options)`, compiled.

    Args:
        function: of a tree of arrays `[n, ...]`, each of the n for itself, to a tree of such.
        batch: tree of arrays `[N, ...]`, on the host or on any devices; with several processes
            equal in all of them.
        mesh: devices to spread N over, filled up with zeros to a multiple of their number; None
            for one device.
        *options: hashable.

    Returns:
        Arrays `[N, ...]`, whole on each device of the mesh, so that every process can read them.
    """
    if mesh is None:
        return _alone(function, batch, options)
    count = jax.tree.leaves(batch)[0].shape[0]
    missing = -count % mesh.mesh.size
    padded = jax.tree.map(partial(_pad, missing=missing), batch)
    return _spread(function, put(padded, mesh.sharding(_DEVICES)), mesh, count, options)


@partial(jax.jit, static_argnames=("function", "options"))
def _alone(function, batch, options):
    return function(batch, *options)


@partial(jax.jit, static_argnames=("function", "mesh", "count", "options"))
def _spread(function, batch, mesh: DeviceMesh, count: int, options):
    share = PartitionSpec(_DEVICES)
    whole = jax.shard_map(
        lambda part: function(part, *options),
        mesh=mesh.mesh,
        in_specs=share,
        out_specs=share,
        # Loops of the decompositions start from constants, which the check takes for replicated.
        check_vma=False,
    )(batch)
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, mesh.replicated)[:count], whole
    )


def _pad(leaf, missing: int):
    pad = np.pad if isinstance(leaf, np.ndarray) else jnp.pad
    return pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf
