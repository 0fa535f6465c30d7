"""`gradot compare`: all methods on the same model, text and tasks."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradot_jax.cli.common import OnDevices, check_comparison, data_axis
from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.comparison.stages import Plan
    from gradot_jax.comparison.testbed import Testbed
    from gradot_jax.parallel import DeviceMesh

_ONLY_WITH_A_MODEL = ("data", "limit", "calibration", "sequence_length", "epochs")
_COUNTS = ("steps", "emulator_steps", "batch_size", "limit", "num_sequences", "sequence_length")
_IN_A_PLAN = ("methods", "budgets", "tasks", "seeds", "draws", "learning_rates")
_BUNDLED_TASKS = ("top", "api", "syn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(OnDevices):
    """Measures every method at every budget, and writes one report.

    Without --model it runs on the bundled model and its tasks; with one, on the tasks that are
    named. For each method, budget and task the learning rate is the one of least development loss
    through the emulator, as a data owner would choose it: rates are tried until a lower and a
    higher one are no better. Then the adapter is tuned once a seed, and measured within the
    emulator and plugged in.

    OUT holds result.json, table.md, plots, and a file for each finished part in cells/: the same
    command goes on where it was stopped, and one with more seeds, budgets or methods runs only
    what is new. Several processes may work on one folder; what one is at, the others leave to it.
    Lists are separated by commas.

    Example: gradot compare --methods full-finetune,gradot,layer-drop,empty --budgets 0.6,0.3
    --seeds 3 --out comparison

    Attributes:
        out: folder to make, or to go on with.
        model: a checkpoint folder, or an id on the Hugging Face Hub; the bundled model by default.
        methods: what to compare. gradot is the paper; gradot-global, gradot-lambda, gradot-refit,
            gradot-quadratic and gradot+ vary it; crash-own and scaleot-own train the blocks that
            these methods choose; full-finetune and full-finetune-all tune the full model; empty
            has no middle.
        budgets: shares of the middle's parameters to keep.
        tasks: top, api, syn with the bundled model; else city, gcide, wnkind, social-iqa,
            colored-objects (scripts/real_data.sh makes their data), or those of the papers.
        seeds: fine-tuning runs of each method, budget and task.
        draws: draws of calibration text, each with all seeds.
        plan: a JSON file that says what to run in which order, instead of methods, budgets, tasks,
            seeds, draws and learning_rates; see benchmarks/plans.
        shard: I/N runs the I-th of N parts, for one of N processes on one folder.
        probes: also measure what a few steps through each emulator, on public text, do to the
            plugged-in model: a cheap guess of what its plug-in will be worth.
        again: tune and measure the first run of each method again where other code did, through the
            emulator that is there, and put both beside each other.
        report_only: run nothing; make the report of the cells that are there.
        learning_rates: factors on the task's learning rate to begin a search with, which goes on,
            12 trials at most, until it has the best between two others; a single one is taken.
        learning_rate: of every task, instead of its own.
        steps: of every fine-tuning, instead of the task's own.
        epochs: passes over a task's training part, where no steps are given.
        emulator_steps: of the methods that train their emulator, instead of their own.
        batch_size: examples a step, instead of the task's own.
        preset: text of the question sets: as in the papers, or with what is wrong there set right.
        data: folder with a folder of data for each task; the Hub by default.
        limit: most records of each part of a task.
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
    plan: Path | None = None
    shard: str = "1/1"
    probes: bool = False
    again: bool = False
    report_only: bool = False
    learning_rates: str = "1,2"
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
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be positive and finite, got {value}")
        check_comparison(self.out)
        plan, shard = self._plan(), _shard(self.shard)
        self._check_tasks(plan.tasks)
        from gradot_jax.comparison.comparison import Shard, run_comparison
        from gradot_jax.comparison.stages import shortened
        from gradot_jax.models.split import AdapterSpec

        split = AdapterSpec(self.num_bottom, self.num_top)
        mesh = self.device_mesh()
        bed = self._bundled(plan.tasks) if self.model is None else self._with_model(plan, mesh)
        bed = dataclasses.replace(bed, split=split, compute_dtype=self.dtype, mesh=mesh)
        if self.emulator_steps is not None:
            bed = dataclasses.replace(bed, training=shortened(bed.training, self.emulator_steps))
        run_comparison(
            bed,
            plan,
            self.out,
            drop_bundles=self.drop_bundles,
            shard=Shard(*shard),
            probes=self.probes,
            again=self.again,
            work=not self.report_only,
        )
        print((self.out / "table.md").read_text(encoding="utf-8"))
        print(f"{self.out}: result.json, table.md, plots")

    def _plan(self) -> "Plan":
        from gradot_jax.comparison.stages import read_plan, single

        if self.plan is not None:
            given = [f for f in dataclasses.fields(self) if f.name in _IN_A_PLAN]
            given = [f.name for f in given if getattr(self, f.name) != f.default]
            if given:
                raise InputError(f"{', '.join(given)}: said by the plan {self.plan}; leave it out")
            return read_plan(self.plan)
        if self.model is not None and self.tasks is None:
            raise InputError("--model needs --tasks and --calibration")
        return single(
            _names(self.methods),
            _numbers("budgets", self.budgets),
            _names(self.tasks or "top,api"),
            seeds=self.seeds,
            draws=self.draws,
            rates=_numbers("learning_rates", self.learning_rates),
        )

    def _check_tasks(self, names: tuple[str, ...]) -> None:
        if self.model is not None:
            if self.calibration is None:
                raise InputError("--model needs --tasks and --calibration")
            return
        given = [name for name in _ONLY_WITH_A_MODEL if getattr(self, name) is not None]
        given += ["preset"] if self.preset != "corrected" else []
        if given:
            raise InputError(f"{', '.join(given)}: only with --model; the bundled one has its own")
        if unknown := [name for name in names if name not in _BUNDLED_TASKS]:
            raise InputError(
                f"tasks: got {', '.join(unknown)}; the bundled model has "
                f"{', '.join(_BUNDLED_TASKS)}, others need --model"
            )

    @property
    def _changes(self) -> dict[str, Any]:
        """Fields of `FineTuning` that are asked for."""
        asked = {name: getattr(self, name) for name in ("steps", "batch_size", "learning_rate")}
        return {name: value for name, value in asked.items() if value is not None}

    def _bundled(self, tasks: tuple[str, ...]) -> "Testbed":
        from gradot_jax.demo.bundled import bundled_testbed
        from gradot_jax.demo.bundled_tasks import FINE_TUNING

        tuning = {name: FINE_TUNING[name].changed(**self._changes) for name in tasks}
        return bundled_testbed(tasks, tuning=tuning, num_sequences=self.num_sequences or 512)

    def _with_model(self, plan: "Plan", mesh: "DeviceMesh | None") -> "Testbed":
        from gradot_jax.cli.data import open_tokenizer, training_examples
        from gradot_jax.comparison.question_sets import question_tasks, question_testbed
        from gradot_jax.models.checkpoint import load_model
        from gradot_jax.models.weight_files import checkpoint_folder

        folder = checkpoint_folder(str(self.model), None)
        config, params = load_model(folder, dtype="float32", mesh=mesh)
        tokenizer = open_tokenizer(folder, config)
        tasks = question_tasks(
            plan.tasks,
            config,
            tokenizer,
            preset=self.preset,
            data=self.data,
            limit=self.limit,
            changes=self._changes,
            epochs=None if self.steps else self.epochs,
        )
        return question_testbed(
            str(self.model),
            config,
            params,
            tasks,
            training_examples(tokenizer, config, str(self.calibration), self.sequence_length),
            num_sequences=self.num_sequences or 128,
            batch_size=-(-8 // data_axis(mesh)) * data_axis(mesh),
        )


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise InputError(f"shard: expected I/N with I from 1 to N, got {text!r}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option}: expected numbers separated by commas, got {text!r}") from None
