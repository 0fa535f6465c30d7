"""What a command says before it starts: what it will store, and the memory that it takes.

By formulas, or by the compiler of the devices: those that are here, or `--target`'s. Nothing here
names JAX; the commands that use it have loaded it.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from gradot_jax.cli.common import say
from gradot_jax.compression.plan import HarmonizerShape, LayerShape
from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.memory.estimate import MemoryEstimate
    from gradot_jax.memory.forecast import Forecast
    from gradot_jax.programs.compiled import Compiled
    from gradot_jax.programs.program import Place, Program
    from gradot_jax.programs.target import Target

_MIB = 2**20
_COLUMNS = ("args", "out", "alias", "temp", "code", "beside", "peak")


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


def place_on(target: "Target", mesh: tuple[int, int] | None) -> "Place":
    """The target's devices in a mesh; all of them along the batch where none is asked for.

    Raises:
        InputError: where the mesh needs more than there are, or there is no compiler.
    """
    from gradot_jax.programs.program import mesh_of
    from gradot_jax.programs.target import target_devices

    data, model = mesh or (target.count, 1)
    if data * model > target.count:
        raise InputError(
            f"--mesh: data={data} x model={model} needs {data * model} devices, "
            f"{target.name} has {target.count}"
        )
    return mesh_of(target_devices(target), data, model)


def say_whether_it_fits(
    target: "Target | None", place: "Place", programs: "Sequence[Program]", helps: Sequence[str]
) -> None:
    """Compiles the programs of a run and prints what they take of each device.

    Args:
        target: what they are compiled for; None for the devices that are here.
        place: its devices.
        programs: of the run.
        helps: options of the command that make it need less.
    """
    from gradot_jax.programs.compiled import compile_programs, peak_of, run_peak

    found: list[Compiled] = []
    for index, program in enumerate(programs, 1):
        say(f"compiling {index} of {len(programs)}: {program.name}", to=sys.stderr)
        try:
            ((_, compiled, _),) = compile_programs([program], place.platform)
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # A compiler that knows its chip's memory refuses what exceeds it.
            say(*_table(found), "", _too_large(program.name, helps))
            return
        found.append(compiled)
    say(*_table(found))
    worst, peak = peak_of(found), run_peak(found)
    where = f"{line('there', worst.name)}, and all programs loaded"
    if target is None:
        known = _available()
        there = "" if known is None else f"; {mebibytes(known)} are available"
        say(
            "",
            line("compiled for", f"{place.platform} here, {_mesh(place)}; nothing was run"),
            line("at the peak", f"{mebibytes(peak)} a device{there}"),
            where,
        )
        return
    share = peak / target.chip.memory
    devices = len(place.devices)
    least = sum(compiled.least_seconds(target.chip, devices) for compiled in found)
    say(
        "",
        line("compiled for", f"{target.name}, {_mesh(place)}; nothing was run"),
        line(
            "at the peak",
            f"{mebibytes(peak)} of {mebibytes(target.chip.memory)} a device ({share:.0%})",
        ),
        where,
        line("at least", f"{least:.3g} s: products and arrays over published peaks"),
    )
    if place.num_hosts > 1:
        each = len(place.devices) // place.num_hosts
        say(
            line(
                "hosts",
                f"{place.num_hosts} where each has {each} of the chips; all run the same command "
                "with --distributed",
            )
        )
    if share > 1:
        say(_too_large(worst.name, helps))


def _too_large(name: str, helps: Sequence[str]) -> str:
    options = ", ".join(f"--{option.replace('_', '-')}" for option in helps)
    return f"{name} does not fit: {options} make it need less, and so do more or larger chips"


def _available() -> int | None:
    """Memory that a device here has left, or the host that all of them share."""
    from gradot_jax.memory.available import (
        available_device_bytes,
        available_host_bytes,
        devices_share_host,
    )

    return available_host_bytes() if devices_share_host() else available_device_bytes()


def _mesh(place: "Place") -> str:
    if place.mesh is None:
        return "one device"
    sizes = place.mesh.mesh.shape
    return f"data={sizes['data']} x model={sizes['model']}"


def _table(found: "Sequence[Compiled]") -> list[str]:
    """A row for each program; of those that are the host's all bytes are its own."""
    names = [f"{c.name} (host)" if c.on_host else c.name for c in found]
    width = max(map(len, names), default=0)
    head = "".join(f"{name:>9}" for name in _COLUMNS)
    lines = [f"{'MiB of each device':<{width}}{head}{'times':>7}"]
    for name, c in zip(names, found, strict=True):
        beside, peak = (0, c.own) if c.on_host else (c.beside, c.peak)
        sizes = (c.arguments, c.outputs, c.aliases, c.temporaries, c.code, beside, peak)
        cells = "".join(f"{size / 2**20:>9,.1f}" for size in sizes)
        lines.append(f"{name:<{width}}{cells}{c.times:>7}")
    return lines
