"""Options that several commands share. Nothing here imports JAX before a command runs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.nn.batch import Batch
    from gradot_jax.parallel import DeviceMesh

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Debuggable:
    """What every command takes.

    Attributes:
        debug: show the traceback of an error.
    """

    debug: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnDevices(Debuggable):
    """What every command that computes takes.

    Attributes:
        dtype: of the arithmetic; factors, scores and masters are float32 in any case.
        mesh: devices along the batch and along the weights, as two numbers; all devices along
            the batch when left out.
    """

    dtype: Dtype = "float32"
    mesh: tuple[int, int] | None = None

    def device_mesh(self) -> "DeviceMesh | None":
        """The mesh asked for; None on a single device."""
        import jax

        from gradot_jax.parallel import make_mesh

        if self.mesh is None:
            return make_mesh() if jax.device_count() > 1 else None
        try:
            return make_mesh(*self.mesh)
        except ValueError as error:
            raise InputError(str(error)) from None


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuses early what would be refused when the result is written."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: expected a folder, but there is a file of this name")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"{path}: the folder is not empty; --overwrite replaces it")


def check_comparison(path: Path) -> None:
    """Refuses a folder that is neither new nor a comparison to go on with."""
    new = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    # A folder of something else would be mixed up with the cells.
    if not new and not (path / "cells").is_dir():
        raise InputError(f"{path}: exists and is no comparison to go on with")


def check_distinct(option: str, values: Sequence[object]) -> None:
    """Refuses a list that is empty or has anything twice."""
    if not values or len(set(values)) < len(values):
        raise InputError(f"{option}: expected some, each once, got {list(values)}")


def data_axis(mesh: "DeviceMesh | None") -> int:
    """Number of devices along the batch."""
    return 1 if mesh is None else mesh.mesh.shape["data"]


def fit_batch(examples: "Batch", batch_size: int, mesh: "DeviceMesh | None") -> int:
    """The largest batch of at most `batch_size` that the examples fill and the mesh divides.

    Raises:
        InputError: when there are fewer examples than devices along the batch.
    """
    devices = data_axis(mesh)
    fitting = min(batch_size, len(examples.input_ids)) // devices * devices
    if not fitting:
        raise InputError(
            f"{len(examples.input_ids)} examples in batches of {batch_size} cannot be spread over "
            f"{devices} devices"
        )
    return fitting
