"""What `gradot compress` says before it starts: what it will store, and the memory it takes.

Nothing here names JAX; the commands that use it have loaded it.
"""

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from gradot_jax.compression.plan import HarmonizerShape, LayerShape
from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.memory.estimate import MemoryEstimate
    from gradot_jax.memory.forecast import Forecast

_MIB = 2**20


class Need(NamedTuple):
    """Memory that is needed in one place.

    Attributes:
        place: in words.
        needed: bytes, estimated.
        available: bytes; None where the system does not say.
    """

    place: str
    needed: int
    available: int | None

    def __str__(self) -> str:
        """In words, in MiB."""
        known = "" if self.available is None else f" of {mebibytes(self.available)} available"
        return f"{mebibytes(self.needed)}{known} {self.place}"


def needs(estimate: "MemoryEstimate", num_local_devices: int) -> list[Need]:
    """What an estimate asks of each place, and what there is; the devices are this process's."""
    from gradot_jax.memory.available import (
        available_device_bytes,
        available_host_bytes,
        devices_share_host,
    )

    if devices_share_host():
        needed = estimate.shared_host(num_local_devices)
        return [Need("on the host", needed, available_host_bytes())]
    return [
        Need("on the host", estimate.host, available_host_bytes()),
        Need("on each device", estimate.device, available_device_bytes()),
    ]


def check_fits(found: list[Need]) -> None:
    """Raises InputError where an estimate exceeds what is available, with what helps."""
    for need in found:
        if need.available is not None and need.needed > need.available:
            raise InputError(
                f"the compression would take about {need}; --offload on an accelerator, a smaller "
                "--num-sequences, --batch-size or --sequence-length, --dtype bfloat16, or a --mesh "
                "over more devices needs less, and --ignore-memory tries it as it is"
            )


def forecast_lines(outlook: "Forecast", dtype: str, itemsize: int) -> list[str]:
    """What will be stored, as lines of a label and a value; `itemsize` in bytes."""
    layers = [
        f"{number} x {_shape_text(shape)}" for shape, number in Counter(outlook.shapes).items()
    ]
    kept = f"{outlook.kept_kernels:,} of the middle's {outlook.middle_kernels:,}"
    others = f"{outlook.kept - outlook.kept_kernels:,} beside these"
    shipped = f"{outlook.shipped:,} of {outlook.original:,}"
    return [
        line("emulator", "; ".join(layers) or "no layer"),
        line("kernels kept", f"{kept} ({outlook.kept_kernels / outlook.middle_kernels:.1%})"),
        line("biases and norms", others),
        line("parameters shipped", f"{shipped} ({outlook.shipped / outlook.original:.1%})"),
        line("bundle", f"{mebibytes(outlook.shipped * itemsize)} in {dtype}"),
    ]


def memory_lines(estimate: "MemoryEstimate", found: list[Need]) -> list[str]:
    """Each part of an estimate, and the totals."""
    parts = [
        line(f"{place}: {name}", mebibytes(size))
        for place in ("host", "device")
        for name, size in estimate.parts(place).items()
        if size
    ]
    return [*parts, *(line("at the peak", str(need)) for need in found)]


def mebibytes(size: int) -> str:
    """A size in MiB, rounded up."""
    return f"{-(-size // _MIB):,} MiB"


def _shape_text(shape: LayerShape | HarmonizerShape) -> str:
    if isinstance(shape, HarmonizerShape):
        return f"harmonizer of width {shape.rank}"
    of_rank: dict[str, list[str]] = {}
    for site, rank in shape.ranks:
        of_rank.setdefault("full rank" if rank is None else f"rank {rank}", []).append(site)
    named = [f"{rank} ({', '.join(sites)})" for rank, sites in of_rank.items()]
    ranks = ", ".join(named if len(named) > 1 else of_rank)
    return f"layer of {ranks}, {shape.num_channels} channels"


def line(label: str, value: str) -> str:
    """One row of what is printed."""
    return f"{label:<22}{value}"
