"""`gradot demo`: the whole method on the bundled model."""

import dataclasses
import shutil
from pathlib import Path
from typing import Literal

from gradot_jax.cli.common import Debuggable, check_comparison, check_distinct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Debuggable):
    """Takes the bundled model through compress, fine-tune, plug-in and evaluate.

    Compares GradOT, as in the paper and improved (gradot+), with magnitude selection and uniform
    layer drop at the same budget, checks that the comparison means something (V1 to V3), prints
    tables and writes them with plots. About five minutes on two CPU cores. `gradot compare` is
    the same with every method, budget and learning rate.

    Example: gradot demo --out demo_out

    Attributes:
        out: folder to make, or to go on with after an interruption.
        budget: share of the middle's parameters that each emulator keeps.
        methods: what to compare, see `gradot compare --help`.
        tasks: what to fine-tune on: `top` is reference prose, `api` facts about the standard
            library, `syn` facts about made-up people.
        seeds: fine-tuning runs of each method and task.
        draws: draws of calibration text, each with all seeds.
        overwrite: start anew where there is a comparison already.
    """

    out: Path = Path("demo_out")
    budget: float = 0.3
    methods: tuple[str, ...] = ("gradot", "gradot+", "magnitude", "layer-drop")
    tasks: tuple[Literal["top", "api", "syn"], ...] = ("top", "api")
    seeds: int = 1
    draws: int = 1
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        check_comparison(self.out)
        check_distinct("tasks", self.tasks)
        from gradot_jax.comparison.stages import single
        from gradot_jax.demo.bundled import run_demo

        single(self.methods, (self.budget,), self.tasks, seeds=self.seeds, draws=self.draws)
        if self.overwrite:
            for part in ("cells", "bundles", "curves"):
                shutil.rmtree(self.out / part, ignore_errors=True)
        run_demo(
            self.out,
            budget=self.budget,
            methods=self.methods,
            tasks=self.tasks,
            seeds=self.seeds,
            draws=self.draws,
        )
        print((self.out / "table.md").read_text(encoding="utf-8"))
        print(f"{self.out}: result.json, table.md, plots")
