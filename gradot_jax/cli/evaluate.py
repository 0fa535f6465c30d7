"""`gradot evaluate`: a model or an emulator on data of one's own or on tasks of lm-eval."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gradot_jax.cli.common import OnHosts, OnModel, data_axis
from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.cli.data import LoadedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(OnHosts, OnModel):
    """Measures a model, a bundle's emulator, or the emulator with a tuned adapter.

    Text is measured by perplexity over windows that share no token, prompts with completions by
    exact match and log-likelihood, questions with choices by accuracy. Instead of data, tasks of
    the lm-evaluation-harness can be named; they need the extra gradot_jax[eval]. The result
    records versions, devices, and a digest of the data or the versions of the tasks.

    Example: gradot evaluate --bundle opt-1.3b-offsite/bundle --adapter tuned/adapter
    --data test.jsonl --out emulator.json

    Attributes:
        data: a .txt file, JSON lines (`text`; `prompt` and `completion`; `question`, `choices`
            and `answer`), or the name of a dataset.
        lm_eval: tasks of the lm-evaluation-harness, instead of data; `paper` for the eight of the
            offsite-tuning papers.
        lm_eval_include: folder of further tasks as YAML. A task may name Python code, which is
            run.
        lm_eval_bos: what a task's prompt begins with, whatever the tokenizer puts in front or
            nothing.
        num_fewshot: solved examples before each question of a task; what the task says by default.
        limit: first items of each task to take; all by default.
        out: JSON file to write.
        batch_size: examples a batch.
        sequence_length: tokens an example at most; by default what the model takes, up to 2,048.
        overwrite: replace an existing file.
    """

    MEMORY = ("batch_size", "sequence_length", "dtype", "mesh")

    out: Path
    data: str | None = None
    lm_eval: tuple[str, ...] = ()
    lm_eval_include: Path | None = None
    lm_eval_bos: Literal["tokenizer", "never"] = "tokenizer"
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    sequence_length: int | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        self._check()
        if self.dry_run:
            return self._foresee()
        from gradot_jax.evaluation.record import environment, write_result
        from gradot_jax.parallel import one_writer

        # What is missing is found before anything large is loaded.
        measure = self._measure_tasks() if self.data is None else self._measure_data(self.data)
        mesh = self.device_mesh()
        result = measure(self.load(mesh), mesh)
        result |= {"dtype": self.dtype, "environment": environment()}
        with one_writer(self.out) as writes:
            if writes:
                write_result(self.out, result)
                _show(result["metrics"])

    def _foresee(self) -> None:
        """Says what the programs take of each device."""
        place = self.place()
        from gradot_jax.cli.data import example_length, examples_of, open_tokenizer
        from gradot_jax.data.records import ChoiceRecords, TextRecords, read_records
        from gradot_jax.evaluation.multiple_choice import tokenise
        from gradot_jax.models.checkpoint import load_config
        from gradot_jax.models.params import model_shapes
        from gradot_jax.models.weight_files import checkpoint_folder
        from gradot_jax.offsite.bundle import verified_manifest
        from gradot_jax.programs.commands import emulator_shapes
        from gradot_jax.programs.evaluation import evaluation_programs

        if self.bundle is None:
            folder = checkpoint_folder(str(self.model), self.revision)
            config = load_config(folder)
            params = model_shapes(config, self.dtype)
        else:
            folder, manifest = self.bundle, verified_manifest(self.bundle)
            config = manifest.config
            emulator = emulator_shapes(config, manifest.split, manifest.emulator, self.dtype)
            params = emulator.assemble()
        records, tokenizer = read_records(str(self.data)), open_tokenizer(folder, config)
        length = example_length(config, self.sequence_length)
        if isinstance(records, ChoiceRecords):
            examples = tokenise(config, tokenizer, records, max_length=length).examples
        else:
            examples = examples_of(tokenizer, config, records, length)
        count, length = examples.input_ids.shape
        batch_size = -(-self.batch_size // place.data) * place.data
        programs = evaluation_programs(
            config,
            params,
            place,
            batch_size=batch_size,
            length=length,
            kind="text" if isinstance(records, TextRecords) else "answers",
            batches=-(-count // batch_size),
        )
        self.say_needs(place, programs)

    def _check(self) -> None:
        self.check_model()
        if self.dry_run and self.data is None:
            raise InputError("--dry-run goes with --data: tasks of lm-eval batch as they like")
        if (self.data is None) == (not self.lm_eval):
            raise InputError("give either --data or --lm-eval")
        if not self.lm_eval and (
            self.lm_eval_include is not None
            or self.num_fewshot is not None
            or self.limit is not None
            or self.lm_eval_bos != "tokenizer"
        ):
            raise InputError(
                "--lm-eval-include, --lm-eval-bos, --num-fewshot and --limit go with --lm-eval"
            )
        if self.out.is_dir():
            raise InputError(f"{self.out}: a folder, expected the name of a JSON file")
        if self.out.exists() and not self.overwrite:
            raise InputError(f"{self.out}: exists; --overwrite replaces it")

    def _measure_tasks(self):
        try:
            import lm_eval  # noqa: F401
        except ModuleNotFoundError as error:
            raise InputError(
                f"--lm-eval needs the lm-evaluation-harness ({error}): "
                "pip install 'gradot_jax[eval]'"
            ) from None
        from gradot_jax.cli.data import example_length
        from gradot_jax.evaluation.harness_tasks import evaluate_tasks, harness_tasks
        from gradot_jax.evaluation.lm_eval import HarnessModel

        tasks = harness_tasks(self.lm_eval)

        def measure(found: "LoadedModel", mesh) -> dict:
            model = HarnessModel(
                found.config,
                found.params,
                found.tokenizer,
                bos=self.lm_eval_bos,
                batch_size=self.batch_size,
                max_length=example_length(found.config, self.sequence_length),
                mesh=mesh,
                end_ids=found.end_ids,
            )
            return evaluate_tasks(
                model,
                tasks,
                include=self.lm_eval_include,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
            )

        return measure

    def _measure_data(self, source: str):
        from gradot_jax.data.records import read_records
        from gradot_jax.data.tokenizer import document_start

        records = read_records(source)

        def measure(found: "LoadedModel", mesh) -> dict:
            return {
                "data": {"kind": type(records).__name__, "digest": records.digest},
                "bos_token": document_start(found.tokenizer, found.config),
                "metrics": self._metrics(found, records, mesh),
            }

        return measure

    def _metrics(self, found: "LoadedModel", records, mesh) -> dict:
        from gradot_jax.cli.data import example_length, examples_of
        from gradot_jax.data.examples import eval_batches
        from gradot_jax.data.records import ChoiceRecords, PromptRecords
        from gradot_jax.evaluation.exact_match import exact_match
        from gradot_jax.evaluation.multiple_choice import multiple_choice
        from gradot_jax.evaluation.perplexity import perplexity
        from gradot_jax.parallel import put

        config, params, tokenizer = found.config, found.params, found.tokenizer
        length = example_length(config, self.sequence_length)
        devices = data_axis(mesh)
        batch_size = -(-self.batch_size // devices) * devices
        if isinstance(records, ChoiceRecords):
            scores = multiple_choice(
                config, params, tokenizer, records, batch_size=batch_size, max_length=length
            )
            return dataclasses.asdict(scores)
        batches = eval_batches(examples_of(tokenizer, config, records, length), batch_size)
        if mesh is not None:
            batches = (put(batch, mesh.batched) for batch in batches)
        measure = exact_match if isinstance(records, PromptRecords) else perplexity
        return dataclasses.asdict(measure(config, params, batches))


def _show(metrics: dict, prefix: str = "") -> None:
    for name, value in metrics.items():
        if isinstance(value, dict):
            _show(value, f"{name} ")
        else:
            shown = f"{value:.6g}" if isinstance(value, float) else value
            print(f"{prefix}{name}: {shown}")
