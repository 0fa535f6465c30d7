"""`gradot demo`: the whole method on the bundled model."""

import dataclasses
from pathlib import Path
from typing import Literal

from gradot_jax.cli.common import Debuggable, check_new

Variant = Literal["gradot", "gradot-uniform", "magnitude", "layer-drop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Debuggable):
    """Takes the bundled model through compress, fine-tune, plug-in and evaluate.

    Compares GradOT with magnitude selection and uniform layer drop at the same budget, checks
    that the comparison means something (V1 to V3), prints a table and writes `result.json`,
    `table.md` and `plot.png`. about four minutes on two CPU cores.

    Example: gradot demo --out demo_out

    Attributes:
        out: folder to make.
        budget: share of the middle's parameters that each emulator keeps.
        methods: what to compare: `gradot` ranks the candidates of all layers together,
            `gradot-uniform` those of each layer by themselves.
        tasks: what to fine-tune on: `top` is reference prose, `api` facts about the standard
            library, `syn` facts about made-up people.
        seeds: of the order of fine-tuning examples; one run each.
        draws: seeds of the calibration text; every seed runs on every draw.
        overwrite: replace an existing folder.
    """

    out: Path = Path("demo_out")
    budget: float = 0.3
    methods: tuple[Variant, ...] = ("gradot", "gradot-uniform", "magnitude", "layer-drop")
    tasks: tuple[Literal["top", "api", "syn"], ...] = ("top", "api")
    seeds: tuple[int, ...] = (0,)
    draws: tuple[int, ...] = (0,)
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        check_new(self.out, overwrite=self.overwrite)
        from gradot_jax.demo.run import run_demo

        run_demo(
            self.out,
            budget=self.budget,
            methods=self.methods,
            tasks=self.tasks,
            seeds=self.seeds,
            draws=self.draws,
            overwrite=self.overwrite,
        )
