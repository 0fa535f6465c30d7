"""`gradot compress`: the model owner's step."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from gradot_jax.cli.common import Dtype, OnDevices, check_new, fit_batch
from gradot_jax.compression.options import CompressionOptions
from gradot_jax.errors import InputError

_HELD_OUT = 2
"""Batches on which gradients are compared, kept from the calibration where the text is short."""

_SHORTEST = 128
"""Tokens below which a sequence is not shortened to have more of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(OnDevices):
    """Compresses the middle of a model into an emulator.

    Writes OUT/bundle, to ship, and OUT/owner, to keep: the plan with the kept indices, the scores
    and the record of the calibration. Prints how well the emulator preserves the adapter's
    gradient on sequences that were held out.

    Example: gradot compress --model facebook/opt-1.3b --calibration
    wikitext:wikitext-2-raw-v1@train --budget 0.6 --out opt-1.3b-offsite

    Attributes:
        model: a checkpoint folder, or an id on the Hugging Face Hub.
        calibration: text of the owner's: a .txt file, JSON lines with `text`, or with `prompt`
            and `completion`, or the name of a dataset (`name:config@split`).
        out: folder to make.
        options: how to compress.
        num_bottom: first blocks of the model, which the data owner will train.
        num_top: last blocks of the model, likewise.
        sequence_length: tokens a calibration sequence; by default the longest the model takes, up
            to 2,048, halved while the text holds fewer than `num_sequences` of them.
        num_sequences: calibration sequences at most; indices are stable from about 32 on,
            gradients keep gaining to 128 and beyond.
        batch_size: sequences a batch.
        revision: branch, tag or commit on the Hub.
        checkpoints: folder from which a method that trains (offsite-tuning, scaleot) goes on after
            an interruption.
        store_dtype: dtype of the bundle's arrays; that of the checkpoint by default.
        overwrite: replace an existing folder.
    """

    model: str
    calibration: str
    out: Path
    options: Annotated[CompressionOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=CompressionOptions
    )
    num_bottom: int = 2
    num_top: int = 2
    sequence_length: int | None = None
    num_sequences: int = 128
    batch_size: int = 8
    revision: str | None = None
    checkpoints: Path | None = None
    store_dtype: Dtype | None = None
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        check_new(self.out, overwrite=self.overwrite)
        if self.num_sequences < 1 or self.batch_size < 1:
            raise InputError("num_sequences and batch_size must be at least 1")
        import jax
        import jax.numpy as jnp

        from gradot_jax.data.examples import eval_batches
        from gradot_jax.data.records import read_records
        from gradot_jax.data.tokenizer import check_vocabulary, load_tokenizer
        from gradot_jax.evaluation.record import environment
        from gradot_jax.files.folder import output_folder
        from gradot_jax.models.opt.hf import checkpoint_folder, load_opt
        from gradot_jax.models.opt.params import count_params
        from gradot_jax.offsite.bundle import save_bundle
        from gradot_jax.offsite.compress import run_compression
        from gradot_jax.offsite.digest import base_digest
        from gradot_jax.offsite.fidelity import gradient_fidelity
        from gradot_jax.offsite.owner import BUNDLE_DIGEST, save_owner
        from gradot_jax.offsite.split import AdapterSpec

        mesh = self.device_mesh()
        folder = checkpoint_folder(self.model, self.revision)
        config, params = load_opt(folder, mesh=mesh, dtype=None)
        stored = self.store_dtype or params.shell.embed_tokens.dtype.name
        split = AdapterSpec(self.num_bottom, self.num_top)
        # The digest is of the weights before they are cast, and of the split that is shipped.
        chooses = self.options.adapter == "own"
        original = params if chooses else None
        digest = None if chooses else base_digest(config, params, split)
        params = jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, config.vocab_size)
        records = read_records(self.calibration)
        examples = self._examples(tokenizer, config, records)
        batch_size = fit_batch(examples, self.batch_size, mesh)
        batches = list(eval_batches(examples, batch_size))
        batches = batches[: len(examples.input_ids) // batch_size]
        used = min(-(-self.num_sequences // batch_size), max(len(batches) - _HELD_OUT, 1))
        held_out = batches[used : used + _HELD_OUT] or batches[-1:]
        result = run_compression(
            config,
            params,
            split,
            batches[:used],
            self.options,
            mesh=mesh,
            checkpoints=self.checkpoints,
            progress=True,
        )
        if original is not None:
            digest = base_digest(config, original, result.emulator.adapter.spec)
        fidelity = gradient_fidelity(config, params, result.emulator, held_out)
        calibration = {
            **result.calibration,
            "fidelity": fidelity.to_values(),
            "held_out": used < len(batches),
            "data": records.digest,
            "sequence_length": int(examples.input_ids.shape[1]),
            "options": dataclasses.asdict(self.options),
            "environment": environment(),
        }
        with output_folder(self.out, overwrite=self.overwrite) as out:
            calibration[BUNDLE_DIGEST] = save_bundle(
                out / "bundle",
                config,
                result.emulator,
                method=result.plan.method,
                attention_budget=result.plan.attention_budget,
                mlp_budget=result.plan.mlp_budget,
                shapes=result.plan.shapes,
                base_digest=digest,
                dtype=jnp.dtype(stored).name,
                tokenizer_from=folder,
            )
            save_owner(out / "owner", result.plan, result.scores, calibration)
        agreement = fidelity.adapter
        print(
            f"adapter gradient: cosine {agreement.cosine:.4f}, relative error "
            f"{agreement.relative_error:.4f}; loss {fidelity.loss_full:.3f} for the full model, "
            f"{fidelity.loss_emulator:.3f} for the emulator"
            + ("" if used < len(batches) else " (on the calibration text: there is no other)")
        )
        share = count_params(result.emulator) / count_params(params)
        print(f"{self.out / 'bundle'}: to ship, {share:.1%} of the model's parameters")
        print(f"{self.out / 'owner'}: to keep")

    def _examples(self, tokenizer, config, records):
        from gradot_jax.cli.data import example_length, examples_of
        from gradot_jax.data.records import ChoiceRecords, TextRecords

        length = example_length(config, self.sequence_length)
        if isinstance(records, ChoiceRecords):
            raise InputError(f"{records.source}: calibration takes text, not multiple choice")
        while True:
            shortest = self.sequence_length is not None or length <= _SHORTEST
            try:
                examples = examples_of(tokenizer, config, records, length)
            except InputError:
                if shortest:
                    raise
            else:
                enough = len(examples.input_ids) >= self.num_sequences
                if shortest or enough or not isinstance(records, TextRecords):
                    return examples
            length //= 2
