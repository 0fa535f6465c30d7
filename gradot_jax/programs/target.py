"""Chips that programs are compiled for, by name; their compilers run without them.

Data sheets: Google Cloud TPU system architecture; NVIDIA A100, H100 and H200 (SXM). Nothing here
imports JAX: what a compiler reads from the environment has to be there before JAX is.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gradot_jax.errors import InputError

if TYPE_CHECKING:
    import jax

_GIB = 2**30


class Chip(NamedTuple):
    """One kind of chip.

    Attributes:
        platform: whose compiler it takes.
        memory: bytes, of which a runtime keeps some for itself.
        flops: peak in bfloat16, a second.
        bandwidth: peak of its memory, bytes a second.
        most: chips that a target may name; 0 of a TPU, whose slices its compiler knows.
        gpu: fields of XLA's `GpuDeviceInfoProto`; none of a TPU.
    """

    platform: Literal["tpu", "cuda"]
    memory: int
    flops: float
    bandwidth: float
    most: int
    gpu: Mapping[str, Any] = {}


_HOPPER = {
    "shared_memory_per_core": 233_472,
    "shared_memory_per_block_optin": 232_448,
    "core_count": 132,
    "fpus_per_core": 128,
    "l2_cache_size": 50 * 2**20,
    "clock_rate_ghz": 1.98,
    "cuda_compute_capability": {"major": 9, "minor": 0},
}
_AMPERE = {
    "shared_memory_per_core": 167_936,
    "shared_memory_per_block_optin": 166_912,
    "core_count": 108,
    "fpus_per_core": 64,
    "l2_cache_size": 40 * 2**20,
    "clock_rate_ghz": 1.41,
    "cuda_compute_capability": {"major": 8, "minor": 0},
}

CHIPS = {
    "v4": Chip("tpu", 32 * _GIB, 275e12, 1.228e12, 0),
    "v5e": Chip("tpu", 16 * _GIB, 197e12, 0.819e12, 0),
    "v5p": Chip("tpu", 95 * _GIB, 459e12, 2.765e12, 0),
    "v6e": Chip("tpu", 32 * _GIB, 918e12, 1.64e12, 0),
    "a100": Chip("cuda", 85_100_068_864, 312e12, 2.039e12, 8, _AMPERE),
    "h100": Chip("cuda", 84_942_979_072, 989e12, 3.352e12, 8, _HOPPER),
    "h200": Chip("cuda", 151_397_597_184, 989e12, 4.8e12, 8, _HOPPER),
}
"""By the name in a target."""

_SIDES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
"""Of a slice, by the kind of TPU."""

_TPU = re.compile(r"(v\d+[ep]?):(\d+(?:x\d+){1,2})")
_GPU = re.compile(r"([a-z]+\d+)(?:x(\d+))?")
_GPU_LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49_152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2_147_483_647,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
}
_CUDNN = {"major": 9, "minor": 10, "patch": 0}
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "127.0.0.1",
    "TPU_WORKER_ID": "0",
    # A compiler that runs beside another, or where one was killed, is no conflict: no chip is used.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """Chips that go together.

    Attributes:
        name: as it was asked for.
        chip: of which kind.
        count: how many.
        shape: of a TPU slice, as in its name; none of GPUs.
    """

    name: str
    chip: Chip
    count: int
    shape: str = ""


def parse_target(name: str) -> Target:
    """A TPU slice like `v5e:2x4`, or GPUs of one host like `h100` and `h100x8`.

    Raises:
        InputError: for a name of neither kind.
    """
    name = name.lower()
    if found := _TPU.fullmatch(name):
        chip, sides = CHIPS.get(found[1]), [int(side) for side in found[2].split("x")]
        known = chip is not None and chip.platform == "tpu"
        if known and len(sides) != _SIDES[found[1]]:
            raise InputError(
                f"--target {name}: slices of {found[1]} have {_SIDES[found[1]]} sides, such as "
                f"{found[1]}:{'x'.join(['2'] * _SIDES[found[1]])}"
            )
        if chip is not None and known and all(sides):
            count = 1
            for side in sides:
                count *= side
            return Target(name, chip, count, found[2])
    elif found := _GPU.fullmatch(name):
        chip, count = CHIPS.get(found[1]), int(found[2] or 1)
        known = chip is not None and chip.platform == "cuda"
        if chip is not None and known and not 1 <= count <= chip.most:
            raise InputError(f"--target {name}: expected 1 to {chip.most} GPUs, those of one host")
        if chip is not None and known:
            return Target(name, chip, count)
    tpus = [kind for kind, chip in CHIPS.items() if chip.platform == "tpu"]
    gpus = [kind for kind, chip in CHIPS.items() if chip.platform == "cuda"]
    raise InputError(
        f"--target: unknown: {name!r:.40}; expected a TPU slice, such as v5e:2x4, of "
        f"{', '.join(tpus)}, or the GPUs of one host, such as h100x8, of {', '.join(gpus)}"
    )


def prepare_environment(target: Target) -> None:
    """What the target's compiler reads from the environment; before JAX is first imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.chip.platform == "tpu":
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        return
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # The assembler comes as a package of its own, which nobody finds by itself.
    found = importlib.util.find_spec("nvidia")
    for folder in [] if found is None else found.submodule_search_locations or []:
        for tools in sorted(Path(folder).glob("*/bin")):
            os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"


def target_devices(target: Target) -> "list[jax.Device]":
    """Devices to compile for, which run nothing.

    Raises:
        InputError: where the compiler is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    try:
        if target.chip.platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=target.name)
        else:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                target_config=gpu_config(target.chip),
                topology=f"1x1x{target.count}",
            )
    except Exception as error:
        # Plugins raise whatever they have; most of it is not for users.
        said = str(error).splitlines()[0]
        if _installed(target.chip.platform):
            raise InputError(
                f"--target {target.name}: its compiler refuses it: {said:.300}"
            ) from None
        extra = "tpu" if target.chip.platform == "tpu" else "compile-gpu"
        raise InputError(
            f"--target {target.name}: its compiler is not there; "
            f"pip install 'gradot_jax[{extra}]' brings it ({said:.200})"
        ) from None
    return list(found.devices)


def _installed(platform: str) -> bool:
    module = "libtpu" if platform == "tpu" else "jax_plugins"
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def gpu_config(chip: Chip) -> str:
    """XLA's `GpuTargetConfigProto` of a chip, as text."""
    info = {
        **_GPU_LIMITS,
        **chip.gpu,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": chip.memory,
    }
    return _proto({"gpu_device_info": info, "platform_name": '"CUDA"', "dnn_version_info": _CUDNN})


def _proto(values: Mapping[str, Any]) -> str:
    lines = (
        f"{name} {{ {_proto(value)} }}" if isinstance(value, Mapping) else f"{name}: {value}"
        for name, value in values.items()
    )
    return " ".join(lines)
