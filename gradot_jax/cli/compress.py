"""`gradot compress`: the model owner's step."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from gradot_jax.cli.common import Dtype, OnHosts, check_new, fit_batch, say
from gradot_jax.cli.forecast import Need, check_fits, forecast_lines, line, memory_lines, needs
from gradot_jax.errors import InputError
from gradot_jax.methods.options import CompressionOptions

if TYPE_CHECKING:
    from gradot_jax.nn.batch import Batch

_HELD_OUT = 2
"""Batches on which gradients are compared, kept from the calibration where the text is short."""

_SHORTEST = 128
"""Tokens below which a sequence is not shortened to have more of them."""


class _Text(NamedTuple):
    """Batches to calibrate on and to compare gradients on, and whether these are others."""

    calibration: "list[Batch]"
    held_out: "list[Batch]"
    spare: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress(OnHosts):
    """Compresses the middle of a model into an emulator.

    Writes OUT/bundle, to ship, and OUT/owner, to keep: the plan with the kept indices, the scores
    and the record of the calibration. Prints how well the emulator preserves the adapter's
    gradient on sequences that were held out.

    Example: gradot compress --model facebook/opt-1.3b --calibration
    wikitext:wikitext-2-raw-v1@train --budget 0.6 --out opt-1.3b-offsite

    Attributes:
        model: a checkpoint folder, or an id on the Hugging Face Hub.
        calibration: text of the model owner's: a .txt file, JSON lines with `text`, or with
            `prompt` and `completion`, or the name of a dataset (`name:config@split`).
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
        checkpoints: folder from which an interrupted compression goes on: layers that are done,
            or, of a method that trains, its state.
        store_dtype: dtype of the bundle's arrays; the checkpoint's by default; where tensors
            differ, each its own, or float32 by methods that need the whole model on the devices.
        overwrite: replace an existing folder.
        offload: keep the residual streams at the boundaries of layers, most of what calibration
            takes of a device, in the host's memory.
        ignore_memory: start even if the memory it takes is more than there is.
    """

    MEMORY = ("offload", "num_sequences", "batch_size", "sequence_length", "dtype", "mesh")

    model: str
    calibration: str
    out: Path
    # Without a default: one would be `gradot`'s own values, asked for of every method.
    options: Annotated[CompressionOptions, tyro.conf.arg(name="")]
    num_bottom: int = 2
    num_top: int = 2
    sequence_length: int | None = None
    num_sequences: int = 128
    batch_size: int = 8
    revision: str | None = None
    checkpoints: Path | None = None
    store_dtype: Dtype | None = None
    overwrite: bool = False
    offload: bool = False
    ignore_memory: bool = False

    def run(self) -> None:
        """Executes the command."""
        check_new(self.out, overwrite=self.overwrite)
        if self.num_sequences < 1 or self.batch_size < 1:
            raise InputError("num_sequences and batch_size must be at least 1")
        place = self.place()
        from gradot_jax.calibration.fidelity import gradient_fidelity
        from gradot_jax.cli.data import open_tokenizer
        from gradot_jax.data.records import read_records
        from gradot_jax.methods.compress import run_compression
        from gradot_jax.models.checkpoint import load_model
        from gradot_jax.models.split import AdapterSpec
        from gradot_jax.models.weight_files import checkpoint_folder

        mesh = place.mesh
        folder = checkpoint_folder(self.model, self.revision)
        config, original = load_model(folder, memory_map=True)
        split = AdapterSpec(self.num_bottom, self.num_top)
        tokenizer = open_tokenizer(folder, config)
        records = read_records(self.calibration)
        text = self._text(tokenizer, config, records, mesh)
        length, skipped = text.held_out[0].input_ids.shape[1], self.options.skip_positions or 0
        if skipped >= length:
            raise InputError(
                f"--skip-positions {skipped} leaves no token of sequences of {length} to take "
                "factors from"
            )
        self._foresee(config, original, split, text.calibration, mesh)
        if self.dry_run:
            if self.target is not None:
                self._compile(config, original, split, text, place)
            return
        params = original
        if not self.options.record.streams:
            _, params = load_model(folder, mesh=mesh, dtype=self.dtype)
        with self._scratch() as scratch:
            result = run_compression(
                config,
                params,
                split,
                text.calibration,
                self.options,
                mesh=mesh,
                checkpoints=self.checkpoints,
                scratch=Path(scratch) if scratch else None,
                progress=True,
                dtype=self.dtype,
                offload=self.offload,
            )
            fidelity = gradient_fidelity(
                config, params, result.emulator, text.held_out, mesh=mesh, dtype=self.dtype
            )
            record = {
                **result.calibration,
                "fidelity": fidelity.to_values(),
                "held_out": text.spare,
                "data": records.digest,
                "sequence_length": int(text.held_out[0].input_ids.shape[1]),
            }
            self._write(folder, config, original, result, record)
        agreement = fidelity.adapter
        say(
            f"adapter gradient: cosine {agreement.cosine:.4f}, relative error "
            f"{agreement.relative_error:.4f}; loss {fidelity.loss_full:.3f} for the full model, "
            f"{fidelity.loss_emulator:.3f} for the emulator"
            + ("" if text.spare else " (on the calibration text: there is no other)")
        )

    def _text(self, tokenizer, config, records, mesh) -> _Text:
        from gradot_jax.data.examples import eval_batches

        examples = self._examples(tokenizer, config, records)
        batch_size = fit_batch(examples, self.batch_size, mesh)
        batches = list(eval_batches(examples, batch_size))
        batches = batches[: len(examples.input_ids) // batch_size]
        used = min(-(-self.num_sequences // batch_size), max(len(batches) - _HELD_OUT, 1))
        held_out = batches[used : used + _HELD_OUT]
        return _Text(batches[:used], held_out or batches[-1:], bool(held_out))

    def _foresee(self, config, params, split, batches, mesh) -> None:
        """Says what will be stored and the memory it takes; refuses what does not fit."""
        import jax
        import jax.numpy as jnp

        from gradot_jax.memory.estimate import estimate_memory
        from gradot_jax.memory.forecast import forecast

        stored = params.shell.embed_tokens.dtype
        size, length = batches[0].input_ids.shape
        shape = {"data": 1, "model": 1} if mesh is None else mesh.mesh.shape
        estimate = estimate_memory(
            config,
            stored,
            split,
            batch_size=size,
            num_batches=len(batches),
            length=length,
            options=self.options,
            compute_dtype=self.dtype,
            offload=self.offload,
            **shape,
        )
        if self.target is None:
            found = needs(estimate, 1 if mesh is None else jax.local_device_count())
        else:
            found = [
                Need("on the host", estimate.host, None),
                Need("on each device, by formulas", estimate.device, None),
            ]
        if self.dry_run:
            shipped = jnp.dtype(self.store_dtype or stored)
            wider = "" if self.store_dtype or len(_dtypes(params)) == 1 else ", some tensors wider"
            outlook = forecast(config, split, self.options)
            lines = forecast_lines(outlook, shipped.name + wider, shipped.itemsize)
            text = f"{len(batches)} batches of {size} sequences of {length} tokens"
            say(*lines, line("calibration", text), *memory_lines(estimate, found))
            return
        say(f"memory: about {', '.join(map(str, found))}")
        if not self.ignore_memory:
            check_fits(found)

    def _compile(self, config, params, split, text: _Text, place) -> None:
        """Says what the compiler of the target makes of all programs."""
        from gradot_jax.programs.commands import compression_programs
        from gradot_jax.programs.compression_run import Run

        size, length = text.calibration[0].input_ids.shape
        run = Run(
            config=config,
            split=split,
            options=self.options,
            place=place,
            # Methods that need the whole model load it in the dtype of the arithmetic.
            stored=params.shell.embed_tokens.dtype if self.options.record.streams else self.dtype,
            dtype=self.dtype,
            batch_size=size,
            num_batches=len(text.calibration),
            length=length,
            held_out=len(text.held_out),
            offload=self.offload,
        )
        self.say_needs(place, compression_programs(run))

    def _write(self, folder, config, original, result, record) -> None:
        from gradot_jax.evaluation.record import environment
        from gradot_jax.files.folder import output_folder
        from gradot_jax.memory.forecast import kernel_parameters
        from gradot_jax.models.params import count_params
        from gradot_jax.offsite.bundle import ship
        from gradot_jax.offsite.owner import BUNDLE_DIGEST, save_owner
        from gradot_jax.offsite.sealed_folder import base_digest
        from gradot_jax.parallel import one_writer, to_host

        plan, emulator = result.plan, to_host(result.emulator)
        dtypes = _dtypes(original)
        record |= {"options": dataclasses.asdict(self.options), "environment": environment()}
        with one_writer(self.out) as writes:
            if not writes:
                return
            with output_folder(self.out, overwrite=self.overwrite) as out:
                record[BUNDLE_DIGEST] = ship(
                    out / "bundle",
                    config,
                    plan,
                    emulator,
                    # Of the weights as they are stored, and of the split that is shipped.
                    base_digest=base_digest(config, original, emulator.adapter.split),
                    dtype=self.store_dtype or (dtypes.pop() if len(dtypes) == 1 else None),
                    tokenizer_from=folder,
                )
                save_owner(out / "owner", plan, result.scores, record)
            share = count_params(emulator) / count_params(original)
            kept, whole = kernel_parameters(config, plan)
            of_attention, of_mlps = plan.attention_budget, plan.mlp_budget
            budget = f"{of_attention:.1%}"
            if of_mlps != of_attention:
                budget += f" of attention, {of_mlps:.1%} of the MLPs"
            print(f"kept: {kept / whole:.1%} of the middle's kernels, budget {budget}")
            print(f"{self.out / 'bundle'}: to ship, {share:.1%} of the model's parameters")
            print(f"{self.out / 'owner'}: to keep")

    def _scratch(self):
        """Where finished layers are kept: on disk rather than in memory, wherever that is known."""
        import jax

        if self.checkpoints or jax.process_count() > 1 or not self.options.record.scores:
            return nullcontext()
        parent = self.out.resolve().parent
        parent.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(prefix=f".{self.out.name}.", dir=parent)

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


def _dtypes(params) -> set:
    import jax

    return {leaf.dtype for leaf in jax.tree.leaves(params)}
