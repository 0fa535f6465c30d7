"""Devices and processes: every mesh of the package, and every array on one, is made here.

With several processes each of them makes the same host values and keeps its part of them; arrays
never travel between processes on the way to a mesh. Process 0 alone writes files and prints.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from gradot_jax.errors import InputError

MIN_COMPILE_SECONDS = 1.0
"""Programs that compile faster are not kept: reading them back would save nothing."""

SHUTDOWN_SECONDS = 30
"""How long a process that ends waits for the others to end."""

_WRITTEN, _REFUSED, _FAILED = range(3)


@dataclasses.dataclass(frozen=True)
class DeviceMesh:
    """A mesh with axes `data` (batches) and `model` (weights).

    Attributes:
        mesh: the JAX mesh, with axes of type Auto.
    """

    mesh: Mesh

    def sharding(self, *axes: str | tuple[str, ...] | None) -> NamedSharding:
        """Sharding of an array whose leading axes lie along the named mesh axes."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def replicated(self) -> NamedSharding:
        """A full copy on every device."""
        return self.sharding()

    @property
    def batched(self) -> NamedSharding:
        """The leading axis over `data`."""
        return self.sharding("data")


def make_mesh(data: int | None = None, model: int = 1) -> DeviceMesh:
    """Builds a mesh of `data * model` devices.

    Axis types are Auto: under the default of `jax.make_mesh`, Explicit, gathers from a sharded
    embedding and row-parallel products raise.

    Args:
        data: devices along the batch; None takes all that `model` leaves.
        model: devices along the weights.

    Raises:
        ValueError: when there are too few devices or `model` does not divide them.
    """
    available = jax.device_count()
    if data is None:
        data = max(available // model, 1)
    if data < 1 or model < 1 or data * model > available:
        raise ValueError(
            f"a mesh of data={data} x model={model} needs {data * model} devices, "
            f"there are {available}"
        )
    devices = jax.devices()[: data * model]
    auto = (AxisType.Auto, AxisType.Auto)
    return DeviceMesh(jax.make_mesh((data, model), ("data", "model"), auto, devices=devices))


def put(tree: Any, shardings: Any) -> Any:
    """Places a tree of host arrays, equal in every process, on devices.

    A process hands over only what its own devices hold, which for a sharded array in a mapped
    file is all of it that is read.

    Args:
        tree: numpy or JAX arrays. Arrays that already lie over several processes are moved too.
        shardings: a `Sharding`, or a tree of them with one for each leaf or branch.

    Returns:
        JAX arrays.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_put_part, tree, jax.tree.broadcast(shardings, tree))


def to_host(tree: Any) -> Any:
    """Numpy arrays, whole in every process, of a tree of arrays on any devices.

    To be called by all processes at once. Leaves are gathered one after the other, so that no
    device ever holds more than one of them whole.
    """
    return jax.tree.map(_whole, tree)


def row_spec(shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """How the rows `[..., rows, columns]` of a large matrix lie over as many devices as divide.

    They lie over `data` and `model` together where that divides them, else over the larger of
    the two axes that does, else the matrix is whole.

    Args:
        shape: of the matrix, or of a stack of such.
        sizes: of the mesh axes `data` and `model`.
    """
    by_size = sorted(sizes, key=lambda axis: sizes[axis], reverse=True)
    for axes in (("data", "model"), *((axis,) for axis in by_size)):
        if shape[-2] % math.prod(sizes[axis] for axis in axes) == 0:
            return PartitionSpec(*[None] * (len(shape) - 2), axes)
    return PartitionSpec()


def spread_rows(tree: Any) -> Any:
    """Matrices with their rows spread over the mesh on which they are computed, vectors whole.

    Inside `jit`, where XLA would rather keep a whole copy of a sum over all tokens on each device.
    Vectors are told where to lie so that equal ones lie alike, and whatever reads them is one
    program. What is on no mesh is as it was.
    """

    def spread(leaf: jax.Array) -> jax.Array:
        mesh = jax.typeof(leaf).sharding.mesh
        if "data" not in mesh.shape:
            return leaf
        spec = row_spec(leaf.shape, mesh.shape) if leaf.ndim >= 2 else PartitionSpec()
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(spread, tree)


def along_data(array: jax.Array) -> jax.Array:
    """An array with its leading axis along `data` and whole otherwise, where it is on a mesh.

    Inside `jit`; so every layer finds and leaves activations, and their cotangents, in one layout.
    """
    mesh = jax.typeof(array).sharding.mesh
    if "data" not in mesh.shape or array.shape[0] % mesh.shape["data"]:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec("data")))


def is_writer() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Waits until every process has come to the point of this name; nothing for a single one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def largest(value: int) -> jax.Array:
    """The largest of the processes' values; to be called by all at once.

    Returns:
        A scalar that is known to each process, but computed only once the work that is already
        queued on the devices is done: reading it later waits for nothing.
    """
    everywhere = _all_devices()
    own = np.full(1, value, np.int32)
    values = jax.make_array_from_callback((everywhere.mesh.size,), everywhere, lambda _: own)
    return _maximum(values)


def agree(value: int) -> int:
    """The largest of the processes' values, at once; to be called by all together."""
    return value if jax.process_count() == 1 else int(largest(value))


@contextmanager
def one_writer(what: object) -> Iterator[bool]:
    """A block in which process 0 alone writes, and after which all others know that it has.

    Yields:
        Whether this process is the writer.

    Raises:
        InputError: in the other processes, when the writer was refused.
        RuntimeError: in the other processes, when the writer failed otherwise.
    """
    outcome = _FAILED
    try:
        yield is_writer()
        outcome = _WRITTEN
    except InputError:
        outcome = _REFUSED
        raise
    finally:
        # Reached by an exception as well: the others would wait for ever.
        worst = agree(outcome)
    if worst != _WRITTEN:
        kind = InputError if worst == _REFUSED else RuntimeError
        raise kind(f"{what}: process 0 did not write it, and says why")


def initialize_distributed(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others of its run; before any other use of JAX.

    A process that fails leaves the others waiting for it; they are ended by JAX's coordination
    service, `SHUTDOWN_SECONDS` after it exits or about 100 seconds after it vanishes.

    Args:
        coordinator: `host:port` of process 0. Here and below None takes
            `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` from the
            environment, or what JAX finds out by itself on TPU pods, Slurm and Open MPI.
        num_processes: of the run.
        process_id: from 0, different in each.

    Raises:
        InputError: when there is neither such a cluster nor a full description of one.
        RuntimeError: when JAX has been used before, or not all processes come.
    """
    # It would swallow SIGTERM in a process that never asks it for a point to stop at.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=_from_environment("JAX_NUM_PROCESSES", num_processes),
            process_id=_from_environment("JAX_PROCESS_ID", process_id),
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise InputError(
            f"no cluster to join: {error} Expected a TPU pod, Slurm or Open MPI, or the address "
            "of process 0, the number of processes and the id of this one"
        ) from None


def use_compile_cache(folder: os.PathLike | str | None) -> None:
    """Keeps compiled programs in a folder for later runs; None keeps none."""
    jax.config.update("jax_compilation_cache_dir", None if folder is None else os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def _put_part(leaf: Any, sharding: Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(_identity, out_shardings=sharding)(leaf)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _whole(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if not leaf.is_fully_replicated:
        replicated = leaf.sharding.update(spec=PartitionSpec())
        leaf = jax.jit(_identity, out_shardings=replicated)(leaf)
    return np.asarray(leaf.addressable_data(0))


def _identity(array: jax.Array) -> jax.Array:
    return array


@functools.cache
def _all_devices() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec("all"))


@jax.jit
def _maximum(values: jax.Array) -> jax.Array:
    return values.max()


def _from_environment(name: str, given: int | None) -> int | None:
    if given is not None or name not in os.environ:
        return given
    try:
        return int(os.environ[name])
    except ValueError:
        raise InputError(f"{name}: expected a number, got {os.environ[name]!r}") from None
