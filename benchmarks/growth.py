"""How the cost of each phase grows with tokens, layers, width and devices.

Around one base shape one quantity at a time is varied; a line through the logarithms of seconds
gives the exponent. Virtual devices of a CPU share its cores, so there the curve over devices
shows what splitting the work costs and not what more hardware gains.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import new_process, run_times, summary
from benchmarks.phases import PHASES, hand_on, optimizer
from benchmarks.workloads import Suite, Workload, model
from gradot_jax.calibration.sweep import kronecker_factors
from gradot_jax.models.partition import place_batch
from gradot_jax.models.split import AdapterSpec
from gradot_jax.parallel import make_mesh
from gradot_jax.training.adapter import init_training, train_step

BASE: dict[Suite, dict[str, Any]] = {
    "cpu": {"width": 256, "layers": 4, "tokens": 1024, "length": 128, "dtype": jnp.float32},
    "device": {"width": 1024, "layers": 4, "tokens": 16384, "length": 512, "dtype": jnp.bfloat16},
}
"""The shape around which quantities are varied: `layers` of the middle, `tokens` of the batch."""

VALUES: dict[Suite, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "tokens": (512, 1024, 2048, 4096),
        "layers": (2, 4, 8, 16),
        "width": (128, 256, 512, 768),
    },
    "device": {
        "tokens": (8192, 16384, 32768, 65536),
        "layers": (2, 4, 8, 16),
        "width": (512, 1024, 2048, 4096),
    },
}
"""Those that each quantity takes."""

DEVICES = (1, 2, 4, 8)

_OVER_TEXT = ("calibration_forward", "factor_sweep", "step_emulator")
_PER_LAYER = ("decomposition", "selection")
_MEASURED = {"tokens": _OVER_TEXT, "layers": _OVER_TEXT, "width": (*_OVER_TEXT, *_PER_LAYER)}


def shape(suite: Suite, **changed: int) -> Workload:
    """A shape with 1 + `layers` + 1 blocks: the base, or with some of its quantities changed."""
    sizes = BASE[suite] | changed
    width, layers = sizes["width"], sizes["layers"]
    return Workload(
        config=model(layers + 2, width, max(width // 64, 1), vocabulary=4096),
        length=sizes["length"],
        batch_size=sizes["tokens"] // sizes["length"],
        num_batches=1,
        split=AdapterSpec(1, 1),
        dtype=sizes["dtype"],
        num_swept=layers,
    )


def study(suite: Suite) -> Iterator[dict[str, Any]]:
    """The growing record: points, and at the end exponents by quantity and phase."""
    points: list[dict[str, Any]] = []
    record = {"base": shape(suite).describe(), "points": points, "complete": False}
    for quantity, values in VALUES[suite].items():
        for value in values:
            seconds = _seconds(shape(suite, **{quantity: value}), _MEASURED[quantity])
            points.append({"quantity": quantity, "value": value, "seconds": seconds})
            yield record
    for count in device_counts():
        seconds = _over_devices(suite, count)
        points.append({"quantity": "devices", "value": count, "seconds": seconds})
        yield record
    yield record | {"exponents": exponents(points), "complete": True}


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


def _over_devices(suite: Suite, count: int) -> dict[str, float]:
    if jax.default_backend() != "cpu":
        return spread(suite, count)
    # The number of virtual devices is fixed once for a process.
    with new_process(_make_devices, count) as process:
        return process.submit(spread, suite, count).result()


def _make_devices(count: int) -> None:
    jax.config.update("jax_num_cpu_devices", count)


def spread(suite: Suite, count: int) -> dict[str, float]:
    """Median seconds of a calibration and of a step, their batch over some devices."""
    workload, mesh = shape(suite), make_mesh(count)
    params, batches = workload.params(), workload.batches()
    frozen, state = init_training(
        workload.emulator(), optimizer(), compute_dtype=workload.dtype, mesh=mesh
    )
    arguments = state, frozen, place_batch(batches[0], mesh)

    def calibrate() -> None:
        factors = kronecker_factors(
            workload.config, params, workload.split, batches, with_gradient=False, mesh=mesh
        )
        for _, sites in factors:
            jax.block_until_ready(sites)

    step = partial(train_step, workload.config, optimizer(), mesh=mesh)
    steps = run_times(step, lambda: arguments, hand_on)
    return {
        "calibration": summary(run_times(calibrate))["median_seconds"],
        "step_emulator": summary(steps)["median_seconds"],
    }


def _seconds(workload: Workload, names: Sequence[str]) -> dict[str, float]:
    result = {}
    for name in names:
        phase = PHASES[name](workload)
        seconds = run_times(phase.run, phase.prepare, phase.advance)
        result[name] = summary(seconds)["median_seconds"]
    return result
