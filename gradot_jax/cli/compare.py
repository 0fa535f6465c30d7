"""`gradot compare`: all methods on the same model, text and tasks."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradot_jax.cli.common import OnDevices, check_comparison, check_distinct, data_axis
from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.comparison.testbed import FineTuning, Testbed
    from gradot_jax.parallel import DeviceMesh

_ONLY_WITH_A_MODEL = ("data", "limit", "calibration", "sequence_length", "epochs")
_COUNTS = ("steps", "emulator_steps", "batch_size", "limit", "num_sequences", "sequence_length")
_BUNDLED_TASKS = ("top", "api", "syn")
_TUNING: dict[str, Any] = {
    "steps": 300,
    "batch_size": 32,
    "learning_rate": 5e-5,
    "warmup": 0,
    "b2": 0.999,
    "evaluations": 10,
}
"""As offsite-tuning trains OPT-1.3B on question sets, but for the number of steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(OnDevices):
    """Measures every method at every budget, and writes one report.

    Without --model it runs on the bundled model and its tasks; with one, on the question sets of
    the offsite-tuning papers. For each method, budget and task the learning rate is the one of
    least development loss through the emulator, as a data owner would choose it; then the adapter
    is tuned once a seed, and measured within the emulator and plugged in.

    OUT holds result.json, table.md, plots, and a file for each finished part in cells/: the same
    command goes on where it was stopped, and one with more seeds, budgets or methods runs only
    what is new. Lists are separated by commas.

    Example: gradot compare --methods full-finetune,gradot,layer-drop,empty --budgets 0.6,0.3
    --seeds 3 --out comparison

    Attributes:
        out: folder to make, or to go on with.
        model: a checkpoint folder, or an id on the Hugging Face Hub; the bundled model by default.
        methods: what to compare. gradot is the paper; gradot-global, gradot-refit,
            gradot-quadratic and gradot+ vary it; crash-own and scaleot-own train the blocks that
            these methods choose; full-finetune and full-finetune-all tune the full model; empty
            has no middle.
        budgets: shares of the middle's parameters to keep.
        tasks: top, api, syn with the bundled model; else names of question sets.
        seeds: fine-tuning runs of each method, budget and task.
        draws: draws of calibration text, each with all seeds.
        learning_rates: factors on the task's learning rate to choose from.
        learning_rate: of every task, instead of its own.
        steps: of every fine-tuning, instead of the task's own.
        epochs: passes over a question set's training part, where no steps are given.
        emulator_steps: of the methods that train their emulator, instead of their own.
        batch_size: examples a step, instead of the task's own.
        preset: text of the question sets: as in the papers, or with what is wrong there set right.
        data: folder with a folder of data for each question set; the Hub by default.
        limit: most records of each part of a question set.
        calibration: the model owner's text, as for compress; needed with --model.
        num_sequences: sequences of calibration text.
        sequence_length: their tokens.
        num_bottom: first blocks, that are the adapter's.
        num_top: last blocks, that are the adapter's.
        drop_bundles: remove each emulator once its runs are finished, to save disk; runs that are
            added later make it again.
    """

    MEMORY = ("batch_size", "sequence_length", "num_sequences", "dtype", "mesh")

    out: Path
    model: str | None = None
    methods: str = (
        "full-finetune,full-finetune-all,gradot,gradot+,magnitude,activation-svd,random,layer-drop,"
        "offsite-tuning,crash,scaleot,empty"
    )
    budgets: str = "0.6,0.3"
    tasks: str | None = None
    seeds: int = 3
    draws: int = 1
    learning_rates: str = "0.5,1,2"
    learning_rate: float | None = None
    steps: int | None = None
    epochs: float | None = None
    emulator_steps: int | None = None
    batch_size: int | None = None
    preset: Literal["paper", "corrected"] = "corrected"
    data: Path | None = None
    limit: int | None = None
    calibration: str | None = None
    num_sequences: int | None = None
    sequence_length: int | None = None
    num_bottom: int = 2
    num_top: int = 2
    drop_bundles: bool = False

    def run(self) -> None:
        """Executes the command."""
        from gradot_jax.comparison.variants import cases

        methods = _names(self.methods)
        budgets = _numbers("budgets", self.budgets)
        rates = _numbers("learning_rates", self.learning_rates)
        for name in ("seeds", "draws", *_COUNTS):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be positive and finite, got {value}")
        cases(methods, budgets, range(self.draws))
        check_comparison(self.out)
        tasks = self._task_names()
        check_distinct("tasks", tasks)
        from gradot_jax.comparison.grid import Grid, run_comparison
        from gradot_jax.comparison.variants import shortened
        from gradot_jax.models.split import AdapterSpec

        grid = Grid(
            methods=methods,
            budgets=budgets,
            seeds=tuple(range(self.seeds)),
            draws=tuple(range(self.draws)),
            rates=rates,
        )
        split = AdapterSpec(self.num_bottom, self.num_top)
        mesh = self.device_mesh()
        bed = self._bundled(tasks) if self.model is None else self._with_model(tasks, mesh)
        bed = dataclasses.replace(bed, split=split, compute_dtype=self.dtype, mesh=mesh)
        if self.emulator_steps is not None:
            bed = dataclasses.replace(bed, training=shortened(bed.training, self.emulator_steps))
        run_comparison(bed, grid, self.out, drop_bundles=self.drop_bundles)
        print((self.out / "table.md").read_text(encoding="utf-8"))
        print(f"{self.out}: result.json, table.md, plots")

    def _task_names(self) -> tuple[str, ...]:
        if self.model is not None:
            if self.tasks is None or self.calibration is None:
                raise InputError("--model needs --tasks and --calibration")
            return _names(self.tasks)
        given = [name for name in _ONLY_WITH_A_MODEL if getattr(self, name) is not None]
        given += ["preset"] if self.preset != "corrected" else []
        if given:
            raise InputError(f"{', '.join(given)}: only with --model; the bundled one has its own")
        names = _names(self.tasks or "top,api")
        if unknown := [name for name in names if name not in _BUNDLED_TASKS]:
            raise InputError(
                f"tasks: got {', '.join(unknown)}; the bundled model has "
                f"{', '.join(_BUNDLED_TASKS)}, others need --model"
            )
        return names

    def _tuning(self, tuning: "FineTuning") -> "FineTuning":
        asked = {name: getattr(self, name) for name in ("steps", "batch_size", "learning_rate")}
        tuning = dataclasses.replace(tuning, **{k: v for k, v in asked.items() if v is not None})
        return dataclasses.replace(tuning, warmup=min(tuning.warmup, tuning.steps - 1))

    def _bundled(self, tasks: tuple[str, ...]) -> "Testbed":
        from gradot_jax.demo.bundled import bundled_testbed
        from gradot_jax.demo.bundled_tasks import FINE_TUNING

        tuning = {name: self._tuning(FINE_TUNING[name]) for name in tasks}
        return bundled_testbed(tasks, tuning=tuning, num_sequences=self.num_sequences or 512)

    def _with_model(self, names: tuple[str, ...], mesh: "DeviceMesh | None") -> "Testbed":
        from gradot_jax.cli.data import open_tokenizer, training_examples
        from gradot_jax.comparison.question_sets import question_tasks, question_testbed
        from gradot_jax.comparison.testbed import FineTuning
        from gradot_jax.models.checkpoint import load_model
        from gradot_jax.models.weight_files import checkpoint_folder

        folder = checkpoint_folder(self.model, None)
        config, params = load_model(folder, dtype="float32", mesh=mesh)
        tokenizer = open_tokenizer(folder, config)
        tuning = self._tuning(FineTuning(**_TUNING))
        tasks = question_tasks(
            names,
            config,
            tokenizer,
            tuning,
            preset=self.preset,
            data=self.data,
            limit=self.limit,
            batch_size=tuning.batch_size,
            epochs=None if self.steps else self.epochs,
        )
        return question_testbed(
            str(self.model),
            config,
            params,
            tasks,
            training_examples(tokenizer, config, self.calibration, self.sequence_length),
            num_sequences=self.num_sequences or 128,
            batch_size=-(-8 // data_axis(mesh)) * data_axis(mesh),
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option}: expected numbers separated by commas, got {text!r}") from None
