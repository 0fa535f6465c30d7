"""Device meshes: every mesh of the package is built here."""

import dataclasses

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class DeviceMesh:
    """A mesh with axes `data` (batches) and `model` (weights).

    Attributes:
        mesh: the JAX mesh, with axes of type Auto.
    """

    mesh: Mesh

    def sharding(self, *axes: str | None) -> NamedSharding:
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
