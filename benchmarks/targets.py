"""The targets of speed and memory, and what was measured of each.

Every figure is a number in the JSON of a workload or study, so that a target is no more than
where to look and what to ask for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workloads import Suite
from gradot_jax.files.strict_json import read_json

Results = Mapping[str, Mapping[str, Any]]
"""Contents of the files of one folder, by name."""

RESULTS = Path(__file__).parent / "results"
"""A folder for each kind of device."""

TARGETS_FILE = "targets.json"


class Target(NamedTuple):
    """One figure that is asked for.

    Attributes:
        name: what is measured.
        cpu: where in the results of the CPU suite, as `file.key.key`; empty if not there.
        device: the same for accelerators.
        limit: the largest value that reaches it, or with `at_least` the smallest; None where the
            figure is only reported.
        at_least: whether more is better.
        unit: of the value: a format of `str.format`.
        beside: what is demanded, in words, where it is no limit.
        reason: why it is not reached, where it is not.
    """

    name: str
    cpu: str = ""
    device: str = ""
    limit: float | None = None
    at_least: bool = False
    unit: str = "{:.2f} x"
    beside: str = ""
    reason: str = ""

    @property
    def demanded(self) -> str:
        """The limit, as text."""
        if self.limit is None:
            return self.beside
        return f"{'≥' if self.at_least else '≤'} {self.unit.format(self.limit)}"

    def where(self, suite: Suite) -> str:
        """Where the figure is in the results of a suite."""
        return self.cpu if suite == "cpu" else self.device

    def reached(self, value: float) -> bool | None:
        """Whether a value is within the limit; None without a limit."""
        if self.limit is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit


_TUNING = "opt-125m.totals.tuning.step_emulator"
_TUNING_DEVICE = "opt-1.3b-512.totals.tuning.step_emulator"
_PUBLISHED = "published for offsite-tuning: {}"

TARGETS = (
    Target(
        "calibration with all factors, over its floor: factor products dense",
        cpu="opt-125m.totals.calibration.over_floor",
        device="opt-125m.totals.calibration.over_floor",
        limit=1.25,
        reason="the floor leaves out what is no product: softmax, norms, rectifiers, the head's "
        "softmax over 50,272 tokens, copies in loops; and block rows of a factor of width 3,072 "
        "run at about two thirds of the rate of a square product, on which the floor rests",
    ),
    Target(
        "the same: each pair of a factor's product once",
        cpu="opt-125m.totals.calibration.over_symmetric_floor",
        device="opt-125m.totals.calibration.over_symmetric_floor",
        limit=1.25,
        reason="as above, over a floor with half the factor products",
    ),
    Target(
        "the sweep's temporaries, over one gradient's with recomputation and the factors of two "
        "layers, OPT-1.3B: as compiled",
        cpu="memory.sweep_compiled.share",
        limit=1.0,
    ),
    Target("the same: as held", cpu="memory.sweep_resident.share", limit=1.0),
    Target(
        "host memory of `gradot compress`, over checkpoint, one layer in float32 with its factors "
        "and boundaries, OPT-1.3B",
        cpu="memory.compress.share",
        limit=1.0,
        reason="the layers stay within it (`memory.compress.runs.layers`); what comes after them "
        "does not: there the gradients of two models are compared, each summed in float32 with "
        "compensation, and the pages of checkpoint and bundle are read",
    ),
    Target(
        "the same: without pages of mapped files, which the system drops at need",
        cpu="memory.compress.anonymous_share",
        limit=1.0,
        reason="as above",
    ),
    Target(
        "share of decompositions in a compression",
        cpu="opt-125m.totals.compression.decomposition",
        device="opt-1.3b.totals.compression.decomposition",
        unit="{:.0%}",
    ),
    *(
        Target(
            f"fine-tuning step in the emulator: throughput over PyTorch's, {count}",
            cpu=f"torch-step.threads.{threads}.over_torch",
            limit=1.0,
            at_least=True,
        )
        for threads, count in ((1, "one thread"), (2, "two threads"))
    ),
    Target(
        "the emulator's speed-up of a step, as a share of what its arithmetic allows",
        cpu="torch-step.threads.1.speedup_share",
        unit="{:.0%}",
    ),
    Target(
        "fine-tuning step in the emulator: share of the published peak, OPT-1.3B",
        device="opt-1.3b.phases.step_emulator.utilisation",
        unit="{:.0%}",
    ),
    Target(
        "fine-tuning step in the emulator: throughput over tuning all weights",
        cpu=f"{_TUNING}.speedup",
        device=f"{_TUNING_DEVICE}.speedup",
        beside=_PUBLISHED.format("6.5 x"),
    ),
    Target(
        "the same: memory",
        cpu=f"{_TUNING}.memory_reduction",
        device=f"{_TUNING_DEVICE}.memory_reduction",
        beside=_PUBLISHED.format("5.6 x"),
    ),
    Target(
        "the same: memory as compiled, OPT-1.3B",
        cpu="memory.tuning.step_emulator.memory_reduction",
        beside=_PUBLISHED.format("5.6 x"),
    ),
    *(
        Target(
            f"growth of the {phase.replace('_', ' ')} with {quantity}: exponent",
            cpu=f"growth.exponents.{quantity}.{phase}",
            device=f"growth.exponents.{quantity}.{phase}",
            unit="{:.2f}",
        )
        for quantity, phase in (
            ("tokens", "factor_sweep"),
            ("layers", "factor_sweep"),
            ("width", "factor_sweep"),
            ("width", "decomposition"),
        )
    ),
)


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The workloads and studies in one folder, by name."""
    return {
        path.stem: read_json(path)
        for path in sorted(folder.glob("*.json"))
        if path.name != TARGETS_FILE
    }


def measured(suite: Suite, results: Results) -> list[dict[str, Any]]:
    """What the results of one folder say of each target, as JSON values.

    Returns:
        `target`, `demanded`, `measured` (None where it was not), `reached` (None where it was not
        measured or nothing is demanded) and `where`.
    """
    rows = []
    for target in TARGETS:
        value = find(results, target.where(suite))
        row = {"target": target.name, "demanded": target.demanded, "measured": value}
        row["reached"] = None if value is None else target.reached(value)
        rows.append(row | {"where": target.where(suite)})
    return rows


def find(results: Results, where: str) -> float | None:
    """The number at `file.key.key`, or None; names of files may hold dots."""
    for name, node in results.items():
        if where.startswith(f"{name}."):
            for key in where.removeprefix(f"{name}.").split("."):
                node = node.get(key) if isinstance(node, Mapping) else None
            return node if isinstance(node, int | float) else None
    return None
