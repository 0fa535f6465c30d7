"""`--dry-run --target`: whether a run fits chips that are not here, by their own compiler."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradot_jax.cli.common import say
from gradot_jax.cli.forecast import line, mebibytes
from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.programs.compiled import Compiled
    from gradot_jax.programs.program import Place, Program
    from gradot_jax.programs.target import Target

_COLUMNS = ("args", "out", "alias", "temp", "code", "beside", "peak")


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
