"""One compiled program: a jitted function of the package with the shapes that it is called with."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from gradot_jax.models.partition import factor_sharding, param_shardings
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import DeviceMesh


class Place(NamedTuple):
    """Where arrays lie: on a mesh, or on one device as a run without a mesh has them.

    Attributes:
        devices: of which the first is enough without a mesh; they need not run anything.
        mesh: None on a single device.
    """

    devices: Sequence[jax.Device]
    mesh: DeviceMesh | None = None

    @property
    def platform(self) -> str:
        """As `lowering_platforms` names it."""
        platform = self.devices[0].platform
        return "cuda" if platform == "gpu" else platform

    @property
    def num_hosts(self) -> int:
        """Processes that the devices belong to."""
        return len({device.process_index for device in self.devices})

    @property
    def data(self) -> int:
        """Devices along the batch."""
        return 1 if self.mesh is None else self.mesh.mesh.shape["data"]

    @property
    def whole(self) -> Sharding:
        """A full copy on each device."""
        if self.mesh is None:
            return SingleDeviceSharding(self.devices[0])
        return self.mesh.replicated

    def replicated(self, tree: Any) -> Any:
        """A tree of shapes, whole on each device."""
        return jax.tree.map(lambda leaf: _shape(leaf, self.whole), tree)

    def params(self, tree: Any) -> Any:
        """A tree of parameters as shapes, as `models.partition.place` lays it out."""
        if self.mesh is None:
            return self.replicated(tree)
        return jax.tree.map(_shape, tree, param_shardings(tree, self.mesh))

    def factors(self, tree: Any) -> Any:
        """A tree of Kronecker factors and vectors as shapes, as the sweep lays it out."""
        if self.mesh is None:
            return self.replicated(tree)

        def sharding(leaf) -> Sharding:
            square = len(leaf.shape) >= 2
            return factor_sharding(leaf.shape, self.mesh) if square else self.mesh.replicated

        return jax.tree.map(lambda leaf: _shape(leaf, sharding(leaf)), tree)

    def array(self, shape: Sequence[int], dtype: DTypeLike, *axes: str | None) -> Any:
        """An array of which axes lie along those of the mesh."""
        sharding = self.whole if self.mesh is None else self.mesh.sharding(*axes)
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

    def batch(self, rows: int, length: int) -> Batch:
        """A batch whose rows are over `data`."""
        ids, counted = (
            self.array((rows, length), dtype, "data") for dtype in (jnp.int32, jnp.float32)
        )
        return Batch(ids, ids, counted, ids)


def mesh_of(devices: Sequence[jax.Device], data: int, model: int) -> Place:
    """Devices as `parallel.make_mesh` would arrange them; a single one is no mesh."""
    if data * model == 1:
        return Place(devices[:1])
    grid = np.array(devices[: data * model]).reshape(data, model)
    mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    return Place(list(grid.flat), DeviceMesh(mesh))


def _shape(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program, and what is on the devices while it runs.

    Attributes:
        name: what it does, in words; unique in a list.
        function: jitted.
        args: shapes with shardings, and static arguments.
        kwargs: likewise.
        times: how often a run has it.
        beside: trees of shapes with shardings that lie on the devices meanwhile, beside `args`.
        on_host: whether it is the work of the host's CPU.
    """

    name: str
    function: Any
    args: tuple
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    times: int = 1
    beside: tuple = ()
    on_host: bool = False

    def and_again(self, other: "Program") -> "Program":
        """The same program at another moment as well: the runs of both, around the larger."""
        beside = max(self.beside, other.beside, key=device_bytes)
        return dataclasses.replace(self, times=self.times + other.times, beside=beside)

    @property
    def key(self) -> Any:
        """Equal for programs that are compiled once."""
        leaves, tree = jax.tree.flatten((self.args, dict(self.kwargs)))
        return self.function, tree, tuple(map(str, leaves))

    def trace(self) -> Any:
        """The program as JAX traces it."""
        return self.function.trace(*self.args, **self.kwargs)

    @property
    def beside_bytes(self) -> int:
        """Of what lies around it, per device."""
        return device_bytes(self.beside)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings that a device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
