"""What a compiler says of programs, and what a run of them takes of a chip."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gradot_jax.programs.cost import least_flops
from gradot_jax.programs.program import Program
from gradot_jax.programs.target import Chip

_GPU_OPTIONS = {"xla_gpu_autotune_level": 0}
"""Autotuning times kernels, and there is nothing to time them on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program as it was compiled; bytes are of each device.

    Attributes:
        name: of the program.
        times: how often a run has it.
        arguments: bytes.
        outputs: bytes.
        aliases: bytes of outputs that lie where arguments lay.
        temporaries: bytes.
        code: bytes of the program itself.
        beside: bytes that lie on the device meanwhile and are not its arguments.
        flops: of its matrix products, over all devices.
        seconds: that compiling took.
        on_host: whether all of that is the host's, and not a device's.
    """

    name: str
    times: int
    arguments: int
    outputs: int
    aliases: int
    temporaries: int
    code: int
    beside: int
    flops: int
    seconds: float
    on_host: bool = False

    @property
    def own(self) -> int:
        """Bytes that the program takes, its arguments among them."""
        return self.arguments + self.outputs - self.aliases + self.temporaries + self.code

    @property
    def peak(self) -> int:
        """Bytes of the device while it runs."""
        return self.own + self.beside

    def least_seconds(self, chip: Chip, num_devices: int) -> float:
        """A lower bound of the time that all its runs take on so many devices.

        Products at the peak in bfloat16, whatever their dtype, or arrays once at that of the
        memory; of a program without products the results alone, since it may read few arguments.
        """
        if self.on_host:
            return 0.0
        moved = self.outputs - self.aliases + (self.arguments if self.flops else 0)
        products = self.flops / (num_devices * chip.flops)
        return self.times * max(products, moved / chip.bandwidth)


def compile_programs(
    programs: Iterable[Program], platform: str
) -> Iterator[tuple[Program, Compiled, Any]]:
    """Compiles programs one after the other.

    Args:
        programs: on devices of the platform.
        platform: as `lowering_platforms` names it.

    Yields:
        The program, what is known of it, and JAX's own `Compiled`.
    """
    options = _GPU_OPTIONS if platform == "cuda" else None
    for program in programs:
        began = time.perf_counter()
        traced = program.trace()
        own = "cpu" if program.on_host else platform
        lowered = traced.lower(lowering_platforms=(own,))
        executable = lowered.compile(compiler_options=options if own == platform else None)
        memory = executable.memory_analysis()
        yield (
            program,
            Compiled(
                name=program.name,
                times=program.times,
                arguments=memory.argument_size_in_bytes,
                outputs=memory.output_size_in_bytes,
                aliases=memory.alias_size_in_bytes,
                temporaries=memory.temp_size_in_bytes,
                code=memory.generated_code_size_in_bytes,
                beside=program.beside_bytes,
                flops=least_flops(traced),
                seconds=time.perf_counter() - began,
                on_host=program.on_host,
            ),
            executable,
        )


def peak_of(found: Sequence[Compiled]) -> Compiled:
    """The program at which the devices hold most."""
    return max(_on_devices(found), key=lambda compiled: compiled.peak)


def _on_devices(found: Sequence[Compiled]) -> list[Compiled]:
    return [compiled for compiled in found if not compiled.on_host]


def run_peak(found: Sequence[Compiled]) -> int:
    """Bytes of a device at the peak of a run: programs stay loaded once they have been."""
    code = sum(compiled.code for compiled in _on_devices(found))
    worst = peak_of(found)
    return worst.peak - worst.code + code
