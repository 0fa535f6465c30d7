"""A batch of matrices over all devices of a mesh, each of which takes its share alone.

XLA does not partition LAPACK's and cuSOLVER's routines: left to itself it would gather the whole
batch and do all of it on every device.

A TPU has no such routines: XLA makes decompositions of products for it, in programs of 90 to 140
MiB at a width of 512 that take a minute to compile, and more than fifteen at 2,048. The host beside
it has LAPACK and many cores, so there the work of a batch is the host's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import PartitionSpec, Sharding, SingleDeviceSharding

from gradot_jax.parallel import DeviceMesh, put, to_host

_DEVICES = ("data", "model")
_ON_HOST = ("cpu", "tpu")
"""Platforms whose batches are the work of the host."""


def over_devices(
    function: Callable[..., Any], batch: Any, mesh: DeviceMesh | None, *options: Any
) -> Any:
    """`function(batch, *options)`, compiled.

    Args:
        function: of a tree of arrays `[n, ...]`, each of the n for itself, to a tree of such.
        batch: tree of arrays `[N, ...]`, on the host or on any devices; with several processes
            equal in all of them.
        mesh: devices to spread N over, of CPUs and TPUs the processes, filled up with zeros to a
            multiple of their number; None for one device.
        *options: hashable.

    Returns:
        Arrays `[N, ...]`, whole on each device of the mesh, so that every process can read them.
    """
    home = home_of(batch, mesh)
    host = host_device(home)
    if mesh is None and host in (None, home):
        return _alone(function, batch, options)
    if host is not None:
        result = _over_processes(function, to_host(batch), options, host, alone=mesh is None)
        return put(result, SingleDeviceSharding(home) if mesh is None else mesh.replicated)
    padded, count = _filled_up(batch, mesh.mesh.size)
    return _spread(function, put(padded, mesh.sharding(_DEVICES)), mesh, count, options)


def home_of(batch: Any, mesh: DeviceMesh | None) -> jax.Device:
    """A device that a batch is at home on; that of host arrays is the default device."""
    if mesh is not None:
        return mesh.mesh.devices.flat[0]
    arrays = (leaf for leaf in jax.tree.leaves(batch) if isinstance(leaf, jax.Array))
    found = next(arrays, None)
    return next(iter(jnp.zeros(()).devices() if found is None else found.devices()))


def host_device(device: jax.Device) -> jax.Device | None:
    """This process's CPU, where it does the work of batches at home on a device; else None."""
    if device.platform not in _ON_HOST:
        return None
    if device.platform == "cpu" and device.process_index == jax.process_index():
        return device
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        # JAX_PLATFORMS leaves the CPU out.
        return None


def num_workers(mesh: DeviceMesh) -> int:
    """How many take shares of a batch: the devices, or the processes where hosts do the work."""
    own = host_device(mesh.mesh.devices.flat[0]) is None
    return mesh.mesh.size if own else jax.process_count()


def one_program(
    function: Callable[..., Any],
    batch: Any,
    mesh: DeviceMesh | None,
    device: jax.Device,
    *options: Any,
) -> tuple[Any, tuple]:
    """The jitted function that `over_devices` runs, and its arguments, from shapes alone.

    Args:
        function: as in `over_devices`.
        batch: tree of shapes `[N, ...]`.
        mesh: as in `over_devices`.
        device: that the batch is at home on.
        *options: hashable.
    """
    host = host_device(device)
    if mesh is None or host is not None:
        return _alone, (function, _on(batch, SingleDeviceSharding(host or device)), options)
    count = jax.tree.leaves(batch)[0].shape[0]
    room = count + -count % mesh.mesh.size
    padded = jax.tree.map(lambda s: jax.ShapeDtypeStruct((room, *s.shape[1:]), s.dtype), batch)
    return _spread, (function, _on(padded, mesh.sharding(_DEVICES)), mesh, count, options)


def _on(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


def _over_processes(function, batch, options, host: jax.Device, *, alone: bool):
    """On the host: the CPU devices of a process are one pool of threads, and one of them works.

    No collective runs in the program that decomposes: it would occupy a thread until others join.
    Alone, a process does all of it.
    """

    def run(batch):
        with jax.default_device(host):
            return _alone(function, batch, options)

    if alone or jax.process_count() == 1:
        return run(batch)
    padded, count = _filled_up(batch, jax.process_count())

    def share(leaf: np.ndarray) -> np.ndarray:
        return np.split(leaf, jax.process_count())[jax.process_index()]

    part = run(jax.tree.map(share, padded))
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
