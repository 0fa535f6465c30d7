"""`gradot evaluate`: a model or an emulator on data of one's own or on tasks of lm-eval."""

import dataclasses
from pathlib import Path
from typing import Literal

from gradot_jax.cli.common import OnHosts, data_axis
from gradot_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(OnHosts):
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
        model: a checkpoint folder, or an id on the Hugging Face Hub.
        bundle: a bundle, instead of a model.
        adapter: a tuned adapter for the bundle.
        batch_size: examples a batch.
        sequence_length: tokens an example at most; by default what the model takes, up to 2,048.
        revision: branch, tag or commit on the Hub.
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
    model: str | None = None
    bundle: Path | None = None
    adapter: Path | None = None
    batch_size: int = 8
    sequence_length: int | None = None
    revision: str | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        self._check()
        from gradot_jax.data.tokenizer import check_vocabulary
        from gradot_jax.evaluation.record import environment, write_result
        from gradot_jax.parallel import one_writer

        # What is missing is found before anything large is loaded.
        measure = self._measure_tasks() if self.data is None else self._measure_data(self.data)
        mesh = self.device_mesh()
        config, params, tokenizer = self._load(mesh)
        check_vocabulary(tokenizer, config.vocab_size)
        result = measure(config, params, tokenizer, mesh)
        result |= {"dtype": self.dtype, "environment": environment()}
        with one_writer(self.out) as writes:
            if writes:
                write_result(self.out, result)
                _show(result["metrics"])

    def _check(self) -> None:
        if (self.model is None) == (self.bundle is None):
            raise InputError("give either --model or --bundle")
        if (self.data is None) == (not self.lm_eval):
            raise InputError("give either --data or --lm-eval")
        if self.adapter is not None and self.bundle is None:
            raise InputError("--adapter goes with --bundle; plug-in puts it into a model")
        if not self.lm_eval and (
            self.lm_eval_include is not None
            or self.num_fewshot is not None
            or self.limit is not None
            or self.lm_eval_bos != "tokenizer"
        ):
            raise InputError(
                "--lm-eval-include, --lm-eval-bos, --num-fewshot and --limit go with --lm-eval"
            )
        if self.revision is not None and self.bundle is not None:
            raise InputError("--revision goes with --model; a bundle is a local folder")
        if self.out.is_dir():
            raise InputError(f"{self.out}: a folder, expected the name of a JSON file")
        if self.out.exists() and not self.overwrite:
            raise InputError(f"{self.out}: exists; --overwrite replaces it")

    def _load(self, mesh):
        from gradot_jax.data.tokenizer import load_tokenizer
        from gradot_jax.models.checkpoint import load_model
        from gradot_jax.models.partition import shard_params
        from gradot_jax.models.weight_files import checkpoint_folder
        from gradot_jax.offsite.adapter_file import load_adapter_for
        from gradot_jax.offsite.bundle import receive

        if self.bundle is None:
            folder = checkpoint_folder(self.model, self.revision)
            config, params = load_model(folder, mesh=mesh, dtype=self.dtype)
            return config, params, load_tokenizer(folder)
        bundle = receive(self.bundle, dtype=self.dtype, with_tokenizer=False)
        tuned = None
        if self.adapter is not None:
            tuned = load_adapter_for(self.adapter, bundle, dtype=self.dtype)
        params = bundle.emulator.assemble(tuned)
        params = params if mesh is None else shard_params(params, mesh)
        return bundle.config, params, load_tokenizer(self.bundle)

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

        def measure(config, params, tokenizer, mesh) -> dict:
            model = HarnessModel(
                config,
                params,
                tokenizer,
                bos=self.lm_eval_bos,
                batch_size=self.batch_size,
                max_length=example_length(config, self.sequence_length),
                mesh=mesh,
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
        from gradot_jax.data.tokenizer import BOS_RULE

        records = read_records(source)

        def measure(config, params, tokenizer, mesh) -> dict:
            return {
                "data": {"kind": type(records).__name__, "digest": records.digest},
                "bos": BOS_RULE,
                "metrics": self._metrics(config, params, tokenizer, records, mesh),
            }

        return measure

    def _metrics(self, config, params, tokenizer, records, mesh) -> dict:
        from gradot_jax.cli.data import example_length, examples_of
        from gradot_jax.data.examples import eval_batches
        from gradot_jax.data.records import ChoiceRecords, PromptRecords
        from gradot_jax.evaluation.exact_match import exact_match
        from gradot_jax.evaluation.multiple_choice import multiple_choice
        from gradot_jax.evaluation.perplexity import perplexity
        from gradot_jax.parallel import put

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
