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
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import PartitionSpec, Sharding

from gradot_jax.parallel import DeviceMesh, put, to_host

_DEVICES = ("data", "model")


def over_devices(
    function: Callable[..., Any], batch: Any, mesh: DeviceMesh | None, *options: Any
) -> Any:
    """`function(batch, *options)`, compiled.

    Args:
        function: of a tree of arrays `[n, ...]`, each of the n for itself, to a tree of such.
        batch: tree of arrays `[N, ...]`, on the host or on any devices; with several processes
            equal in all of them.
        mesh: devices to spread N over, of CPUs the processes, filled up with zeros to a multiple of
            their number; None for one device.
        *options: hashable.

    Returns:
        Arrays `[N, ...]`, whole on each device of the mesh, so that every process can read them.
    """
    if mesh is None:
        return _alone(function, batch, options)
    if mesh.mesh.devices.flat[0].platform == "cpu":
        return put(_over_processes(function, to_host(batch), options), mesh.replicated)
    padded, count = _filled_up(batch, mesh.mesh.size)
    return _spread(function, put(padded, mesh.sharding(_DEVICES)), mesh, count, options)


def one_program(
    function: Callable[..., Any],
    batch: Any,
    mesh: DeviceMesh | None,
    alone: Sharding,
    *options: Any,
) -> tuple[Any, tuple]:
    """The jitted function that `over_devices` runs, and its arguments, from shapes alone.

    Args:
        function: as in `over_devices`.
        batch: tree of shapes `[N, ...]`.
        mesh: as in `over_devices`.
        alone: where the batch lies without a mesh.
        *options: hashable.
    """
    if mesh is None or mesh.mesh.devices.flat[0].platform == "cpu":
        return _alone, (function, _on(batch, alone), options)
    count = jax.tree.leaves(batch)[0].shape[0]
    room = count + -count % mesh.mesh.size
    padded = jax.tree.map(lambda s: jax.ShapeDtypeStruct((room, *s.shape[1:]), s.dtype), batch)
    return _spread, (function, _on(padded, mesh.sharding(_DEVICES)), mesh, count, options)


def _on(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


def _over_processes(function, batch, options):
    """On the host: the CPU devices of a process are one pool of threads, and one of them works.

    No collective runs in the program that decomposes: it would occupy a thread until others join.
    """
    if jax.process_count() == 1:
        return _alone(function, batch, options)
    padded, count = _filled_up(batch, jax.process_count())

    def share(leaf: np.ndarray) -> np.ndarray:
        return np.split(leaf, jax.process_count())[jax.process_index()]

    part = _alone(function, jax.tree.map(share, padded), options)
    whole = process_allgather(part, tiled=True)
    return jax.tree.map(lambda leaf: leaf[:count], whole)


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


def _filled_up(batch, number: int) -> tuple[Any, int]:
    """The batch with zeros up to a multiple of a number, and how many it held."""
    count = jax.tree.leaves(batch)[0].shape[0]
    missing = -count % number

    def fill_up(leaf):
        pad = np.pad if isinstance(leaf, np.ndarray) else jnp.pad
        return pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf

    return jax.tree.map(fill_up, batch), count
