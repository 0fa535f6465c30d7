"""How the cost of each phase grows with tokens, layers, width and devices.

Around one base shape one quantity at a time is varied; a line through the logarithms of seconds
gives the exponent. Virtual devices of a CPU share its cores, so there the curve over devices
shows what splitting the work costs and not what more hardware gains.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import run_times
from benchmarks.phases import PHASES
from benchmarks.workloads import Suite, Workload, model
from gradot_jax.offsite.calibrate import kronecker_factors
from gradot_jax.offsite.optimizer import make_optimizer
from gradot_jax.offsite.split import AdapterSpec
from gradot_jax.offsite.training import init_training, place_batch, train_step
from gradot_jax.parallel import make_mesh

_ROOT = Path(__file__).parents[1]
_OVER_TEXT = ("calibration_forward", "factor_sweep", "step_emulator")
_PER_LAYER = ("decomposition", "selection")


class Axis(NamedTuple):
    """One quantity that is varied.

    Attributes:
        name: of the quantity.
        values: it takes.
        phases: measured at each.
    """

    name: str
    values: tuple[int, ...]
    phases: tuple[str, ...]


AXES: dict[Suite, tuple[Axis, ...]] = {
    "cpu": (
        Axis("tokens", (512, 1024, 2048, 4096), _OVER_TEXT),
        Axis("layers", (2, 4, 8, 16), _OVER_TEXT),
        Axis("width", (128, 256, 512, 768), (*_OVER_TEXT, *_PER_LAYER)),
    ),
    "device": (
        Axis("tokens", (8192, 16384, 32768, 65536), _OVER_TEXT),
        Axis("layers", (2, 4, 8, 16), _OVER_TEXT),
        Axis("width", (512, 1024, 2048, 4096), (*_OVER_TEXT, *_PER_LAYER)),
    ),
}
DEVICES = (1, 2, 4, 8)


def base(suite: Suite) -> Workload:
    """The shape around which quantities are varied: 1 + 4 + 1 blocks."""
    if suite == "cpu":
        return _workload(width=256, layers=4, tokens=1024, length=128, dtype=jnp.float32)
    return _workload(width=1024, layers=4, tokens=16384, length=512, dtype=jnp.bfloat16)


def _workload(*, width: int, layers: int, tokens: int, length: int, dtype) -> Workload:
    return Workload(
        config=model(layers + 2, width, max(width // 64, 1), vocabulary=4096),
        length=length,
        batch_size=tokens // length,
        num_batches=1,
        split=AdapterSpec(1, 1),
        dtype=dtype,
        num_swept=layers,
    )


def varied(workload: Workload, quantity: str, value: int) -> Workload:
    """The shape with one quantity changed.

    Args:
        workload: the base.
        quantity: `tokens` of the batch, `layers` of the middle or `width`.
        value: of it.
    """
    sizes = {
        "width": workload.config.hidden_size,
        "layers": workload.num_middle,
        "tokens": workload.tokens,
    }
    sizes |= {quantity: value}
    return _workload(**sizes, length=workload.length, dtype=workload.dtype)


def study(suite: Suite) -> Iterator[dict[str, Any]]:
    """The growing record: points, and at the end exponents by quantity and phase."""
    shape = base(suite)
    record: dict[str, Any] = {"base": shape.describe(), "points": [], "complete": False}
    for axis in AXES[suite]:
        for value in axis.values:
            workload = varied(shape, axis.name, value)
            record["points"].append(_point(axis.name, value, _seconds(workload, axis.phases)))
            yield record
    for count in device_counts():
        seconds = _apart(suite, count) if jax.default_backend() == "cpu" else spread(suite, count)
        record["points"].append(_point("devices", count, seconds))
        yield record
    record["exponents"] = exponents(record["points"])
    yield record | {"complete": True}


def _point(quantity: str, value: int, seconds: dict[str, float]) -> dict[str, Any]:
    return {"quantity": quantity, "value": value, "seconds": seconds}


def _seconds(workload: Workload, phases: Sequence[str]) -> dict[str, float]:
    result = {}
    for name in phases:
        phase = PHASES[name](workload)
        _, *times = run_times(phase.run, phase.prepare, phase.advance)
        result[name] = statistics.median(times)
    return result


def exponents(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Slopes of log seconds over the log of the quantity, by least squares.

    Args:
        points: `quantity`, `value` and `seconds` by phase.

    Returns:
        By quantity and phase; a quantity with one value has none.
    """
    result: dict[str, dict[str, float]] = {}
    for quantity in dict.fromkeys(point["quantity"] for point in points):
        chosen = [point for point in points if point["quantity"] == quantity]
        if len(chosen) < 2:
            continue
        values = np.log([point["value"] for point in chosen])
        result[quantity] = {
            phase: float(np.polyfit(values, np.log([p["seconds"][phase] for p in chosen]), 1)[0])
            for phase in chosen[0]["seconds"]
        }
    return result


def device_counts() -> tuple[int, ...]:
    """Numbers of devices to spread the work over; on CPU they are virtual."""
    if jax.default_backend() == "cpu":
        return DEVICES
    return tuple(count for count in DEVICES if count <= jax.device_count())


def spread(suite: Suite, count: int) -> dict[str, float]:
    """Median seconds of a calibration and of a step, their batch over some devices."""
    workload, mesh = base(suite), make_mesh(count)
    params, batches = workload.params(), workload.batches()
    optimizer = make_optimizer(learning_rate=1e-3, num_steps=1000)
    frozen, state = init_training(
        workload.emulator(), optimizer, compute_dtype=workload.dtype, mesh=mesh
    )
    placed = place_batch(batches[0], mesh)

    def calibrate() -> None:
        factors = kronecker_factors(
            workload.config, params, workload.split, batches, with_gradient=False, mesh=mesh
        )
        for _, sites in factors:
            jax.block_until_ready(sites)

    step = partial(train_step, workload.config, optimizer, mesh=mesh)
    _, *calibrations = run_times(calibrate, tuple)
    _, *steps = run_times(
        step, lambda: (state, frozen, placed), lambda arguments, result: (result[0], *arguments[1:])
    )
    return {
        "calibration": statistics.median(calibrations),
        "step_emulator": statistics.median(steps),
    }


def _apart(suite: Suite, count: int) -> dict[str, float]:
    """`spread` in a process of its own: the number of virtual devices is fixed at the start."""
    command = [sys.executable, "-m", "benchmarks.growth", suite, str(count)]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures the spread over some virtual devices, as `study` asks for."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("suite", choices=AXES)
    parser.add_argument("devices", type=int)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    print(json.dumps(spread(options.suite, options.devices)))


if __name__ == "__main__":
    main()
