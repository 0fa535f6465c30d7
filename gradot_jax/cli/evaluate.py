"""`gradot evaluate`: perplexity, exact match or multiple choice of a model or an emulator."""

import dataclasses
from pathlib import Path

from gradot_jax.cli.common import OnDevices, data_axis
from gradot_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(OnDevices):
    """Measures a model, a bundle's emulator, or the emulator with a tuned adapter.

    Text is measured by perplexity over windows that share no token, prompts with completions by
    exact match and log-likelihood, questions with choices by accuracy. The result records
    versions, devices and a digest of the data.

    Example: gradot evaluate --bundle opt-1.3b-offsite/bundle --adapter tuned/adapter
    --data test.jsonl --out emulator.json

    Attributes:
        data: a .txt file, JSON lines (`text`; `prompt` and `completion`; `question`, `choices`
            and `answer`), or the name of a dataset.
        out: JSON file to write.
        model: a checkpoint folder, or an id on the Hugging Face Hub.
        bundle: a bundle, instead of a model.
        adapter: a tuned adapter for the bundle.
        batch_size: examples a batch.
        sequence_length: tokens an example at most; by default what the model takes, up to 2,048.
        revision: branch, tag or commit on the Hub.
        overwrite: replace an existing file.
    """

    data: str
    out: Path
    model: str | None = None
    bundle: Path | None = None
    adapter: Path | None = None
    batch_size: int = 8
    sequence_length: int | None = None
    revision: str | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        if (self.model is None) == (self.bundle is None):
            raise InputError("give either --model or --bundle")
        if self.adapter is not None and self.bundle is None:
            raise InputError("--adapter goes with --bundle; plug-in puts it into a model")
        if self.out.exists() and not self.overwrite:
            raise InputError(f"{self.out}: exists; --overwrite replaces it")
        from gradot_jax.data.records import read_records
        from gradot_jax.data.tokenizer import BOS_RULE, check_vocabulary
        from gradot_jax.evaluation.record import environment, write_result

        mesh = self.device_mesh()
        config, params, tokenizer = self._load(mesh)
        check_vocabulary(tokenizer, config.vocab_size)
        records = read_records(self.data)
        metrics = self._measure(config, params, tokenizer, records, mesh)
        result = {
            "data": {"kind": type(records).__name__, "digest": records.digest},
            "bos": BOS_RULE,
            "dtype": self.dtype,
            "metrics": metrics,
            "environment": environment(),
        }
        write_result(self.out, result)
        for name, value in metrics.items():
            print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")

    def _load(self, mesh):
        from gradot_jax.data.tokenizer import load_tokenizer
        from gradot_jax.models.opt.hf import checkpoint_folder, load_opt
        from gradot_jax.models.opt.partition import shard_params
        from gradot_jax.offsite.adapter_file import load_adapter_for
        from gradot_jax.offsite.bundle import load_bundle

        if self.bundle is None:
            folder = checkpoint_folder(self.model, self.revision)
            config, params = load_opt(folder, mesh=mesh, dtype=self.dtype)
            return config, params, load_tokenizer(folder)
        bundle = load_bundle(self.bundle, dtype=self.dtype)
        tuned = None
        if self.adapter is not None:
            tuned = load_adapter_for(self.adapter, bundle, dtype=self.dtype)
        params = bundle.emulator.assemble(tuned)
        params = params if mesh is None else shard_params(params, mesh)
        return bundle.config, params, load_tokenizer(self.bundle)

    def _measure(self, config, params, tokenizer, records, mesh) -> dict:
        import jax

        from gradot_jax.cli.data import example_length, examples_of
        from gradot_jax.data.examples import eval_batches
        from gradot_jax.data.records import ChoiceRecords, PromptRecords
        from gradot_jax.evaluation.exact_match import exact_match
        from gradot_jax.evaluation.multiple_choice import multiple_choice
        from gradot_jax.evaluation.perplexity import perplexity

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
            batches = (jax.device_put(batch, mesh.batched) for batch in batches)
        measure = exact_match if isinstance(records, PromptRecords) else perplexity
        return dataclasses.asdict(measure(config, params, batches))
