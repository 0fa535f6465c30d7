"""`gradot finetune`: the data owner's step."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradot_jax.cli.common import OnHosts, check_new, fit_batch, say
from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradot_jax.training.loop import Trained

_FIRST_RATES = (1e-4, 2e-4)
_SETTINGS = "b1 b2 accumulate schedule weight_decay clip_norm seed dtype".split()
"""What a resumed run must agree on, besides bundle and data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(OnHosts):
    """Tunes the adapter of a bundle on the data owner's text; all else stays frozen.

    Writes OUT/adapter, to return to the model's owner, OUT/metrics.jsonl, and OUT/checkpoints,
    from which --resume goes on. With validation data the adapter of least validation loss is
    returned, never one worse than the adapter that was shipped. `--learning-rate auto` writes what
    every rate came to into OUT/rates.json, and each rate's history and checkpoints into OUT/rates.

    Example: gradot finetune --bundle opt-1.3b-offsite/bundle --train train.jsonl
    --validation dev.jsonl --num-steps 500 --learning-rate 5e-5 --out tuned

    Attributes:
        bundle: folder that the model's owner shipped.
        train: a .txt file or JSON lines with `text` (loss on all tokens), or JSON lines with
            `prompt` and `completion` (loss on the completion), or the name of a dataset.
        out: folder to make.
        validation: the same kind of data, to choose the best adapter.
        num_steps: batches to train on.
        batch_size: examples a batch.
        accumulate: batches whose gradients make one update.
        learning_rate: the peak of the schedule; `auto` tries rates from 1e-4 on, 12 at most, until
            the one of least validation loss has a lower and a higher one that are no better.
        schedule: how it falls after the warm-up.
        warmup_steps: updates over which it rises; a thirtieth of them by default.
        weight_decay: of matrices.
        b1: decay of AdamW's first moment.
        b2: decay of its second; 0.98 suits runs of a hundred steps.
        clip_norm: largest norm of the gradient.
        sequence_length: tokens an example at most; by default what the model takes, up to 2,048.
        evaluate_every: steps between validations and checkpoints; by default a tenth of the run.
        remat: recompute blocks in the backward pass, to save memory.
        seed: of the order of examples.
        resume: go on from the newest checkpoint in OUT, or start where there is none.
        overwrite: replace an existing folder.
    """

    MEMORY = ("remat", "accumulate", "batch_size", "sequence_length", "dtype", "mesh")

    bundle: Path
    train: str
    out: Path
    validation: str | None = None
    num_steps: int = 300
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float | Literal["auto"] = 1e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0
    sequence_length: int | None = None
    evaluate_every: int | None = None
    remat: bool = False
    seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def run(self) -> None:
        """Executes the command."""
        if self.resume and self.overwrite:
            raise InputError("--resume goes on with a folder that --overwrite would replace")
        if self.accumulate < 1 or self.num_steps % self.accumulate:
            raise InputError(
                f"num_steps must be a multiple of accumulate, got {self.num_steps} and "
                f"{self.accumulate}"
            )
        if self.learning_rate == "auto" and self.validation is None:
            raise InputError("--learning-rate auto chooses by validation loss: give --validation")
        check_new(self.out, overwrite=self.overwrite or self.resume)
        other = self.out / ("checkpoints" if self.learning_rate == "auto" else "rates")
        if self.resume and other.exists():
            how = "given" if self.learning_rate == "auto" else "searched for"
            raise InputError(f"{other}: of a run whose rate was {how}; choose another folder")
        place = self.place()
        import shutil

        from gradot_jax.cli.data import open_tokenizer, training_examples
        from gradot_jax.data.examples import epoch_batches, eval_batches
        from gradot_jax.files.digest import tree_digest
        from gradot_jax.offsite.adapter_file import save_adapter
        from gradot_jax.offsite.bundle import receive, verified_manifest
        from gradot_jax.parallel import one_writer, to_host
        from gradot_jax.training.adapter import train_adapter
        from gradot_jax.training.loop import Trained
        from gradot_jax.training.optimizer import make_optimizer, rated_optimizer

        mesh = place.mesh
        updates = self.num_steps // self.accumulate
        warmup = updates // 30 if self.warmup_steps is None else self.warmup_steps
        first = _FIRST_RATES[0] if self.learning_rate == "auto" else self.learning_rate
        schedule: dict[str, Any] = {
            "learning_rate": first,
            "num_steps": updates,
            "warmup_steps": warmup,
            "schedule": self.schedule,
            "weight_decay": self.weight_decay,
            "betas": (self.b1, self.b2),
            "clip_norm": self.clip_norm,
            "accumulate": self.accumulate,
        }
        optimizer = make_optimizer(**schedule)
        if self.dry_run:
            bundle: Any = verified_manifest(self.bundle)
        else:
            bundle = receive(self.bundle, dtype="float32", with_tokenizer=False)
        tokenizer = open_tokenizer(self.bundle, bundle.config)
        examples = training_examples(tokenizer, bundle.config, self.train, self.sequence_length)
        batch_size = fit_batch(examples, self.batch_size, mesh)
        validation = None
        if self.validation is not None:
            held_out = training_examples(
                tokenizer, bundle.config, self.validation, self.sequence_length
            )
            validation = list(eval_batches(held_out, batch_size))
        if self.dry_run:
            self._foresee(bundle, optimizer, place, batch_size, examples, validation or [])
            return
        with one_writer(self.out) as writes:
            if writes and self.overwrite:
                shutil.rmtree(self.out, ignore_errors=True)
            if writes:
                self.out.mkdir(parents=True, exist_ok=True)

        def train(rate: float, folder: Path) -> Trained:
            searched = self.learning_rate == "auto"
            return train_adapter(
                bundle.config,
                bundle.emulator,
                lambda step: epoch_batches(examples, batch_size, seed=self.seed, start_step=step),
                rated_optimizer(rate / first, **schedule) if searched else optimizer,
                num_steps=self.num_steps,
                validation_batches=validation,
                evaluate_every=self.evaluate_every or max(self.num_steps // 10, 1),
                compute_dtype=self.dtype,
                remat=self.remat,
                mesh=mesh,
                checkpoints=folder / "checkpoints",
                settings={
                    **{name: getattr(self, name) for name in _SETTINGS},
                    "learning_rate": rate,
                    # A constant rate knows no end, so that such a run may go on for longer.
                    "updates": None if self.schedule == "constant" else updates,
                    "warmup_steps": warmup,
                    "batch_size": batch_size,
                    "train": tree_digest(examples),
                },
                resume=self.resume,
                metrics_path=folder / "metrics.jsonl",
                progress=True,
            )

        rate = self.learning_rate
        trained = self._search(train) if rate == "auto" else train(rate, self.out)
        adapter = to_host(trained.kept)
        with one_writer(self.out / "adapter") as writes:
            if writes:
                save_adapter(self.out / "adapter", adapter, bundle, overwrite=self.resume)
                print(f"{self.out / 'adapter'}: to return to the model's owner")

    def _foresee(self, manifest, optimizer, place, batch_size: int, examples, validation) -> None:
        """Says what the programs take of each device; of a search, what one rate takes."""
        from gradot_jax.programs.commands import emulator_shapes
        from gradot_jax.programs.training import finetuning_programs

        config = manifest.config
        model = emulator_shapes(config, manifest.split, manifest.emulator, "float32")
        every = self.evaluate_every or max(self.num_steps // 10, 1)
        programs = finetuning_programs(
            config,
            model,
            optimizer,
            place,
            batch_size=batch_size,
            length=examples.input_ids.shape[1],
            dtype=self.dtype,
            remat=self.remat,
            num_steps=self.num_steps,
            validations=(-(-self.num_steps // every) + 1) * len(validation),
            validation_length=validation[0].input_ids.shape[1] if validation else None,
            received=model,
        )
        self.say_needs(place, programs)

    def _search(self, train: "Callable[[float, Path], Trained]") -> "Trained":
        """The run of the best rate, its history in OUT."""
        import math

        from gradot_jax.evaluation.record import write_result
        from gradot_jax.parallel import one_writer, to_host
        from gradot_jax.training.loop import DivergenceError
        from gradot_jax.training.rate import search_rate

        def run(rate: float) -> "tuple[float, Trained | None]":
            say(f"learning rate {rate:g}", to=sys.stderr)
            try:
                trained = train(rate, self.out / "rates" / f"{rate:g}")
            except DivergenceError as error:
                say(f"learning rate {rate:g}: {error}", to=sys.stderr)
                return math.inf, None
            # One adapter at most waits on the host, and no state of an optimiser.
            loss = math.inf if trained.loss is None else trained.loss
            return loss, trained._replace(kept=to_host(trained.kept), state=None)

        found = search_rate(run, _FIRST_RATES)
        tried = {f"{rate:g}": loss for rate, loss in sorted(found.losses.items())}
        if found.best is None:
            raise DivergenceError(f"no learning rate trains; tried {', '.join(tried)}")
        with one_writer(self.out) as writes:
            if writes:
                chosen = {"learning_rate": found.rate, "bracketed": found.bracketed}
                write_result(self.out / "rates.json", {**chosen, "validation_loss": tried})
                history = self.out / "rates" / f"{found.rate:g}" / "metrics.jsonl"
                (self.out / "metrics.jsonl").write_bytes(history.read_bytes())
        end = "between two that are no better" if found.bracketed else "at the edge of those tried"
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in tried.items())
        say(f"learning rate {found.rate:g}, {end}; validation loss by rate: {losses}")
        return found.best
