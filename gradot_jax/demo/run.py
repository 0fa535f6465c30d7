"""The demo: every quantity of offsite-tuning on the bundled model, one cell after another.

Per seed the full model is tuned once; per method, draw of calibration text and seed the emulator
is tuned and its adapter plugged in. All five quantities are measured on the same test data.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optax

from gradot_jax.compression.options import CompressionOptions
from gradot_jax.data.examples import epoch_batches, eval_batches, take
from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.demo.corpus import bundled_facts, bundled_model
from gradot_jax.demo.report import bench_validity, draw_plot, summarise, table
from gradot_jax.demo.tasks import FINE_TUNING, Task, calibration_examples, load_tasks
from gradot_jax.evaluation.exact_match import exact_match
from gradot_jax.evaluation.perplexity import perplexity
from gradot_jax.evaluation.record import environment, write_result
from gradot_jax.files.folder import output_folder
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.hf import load_opt
from gradot_jax.models.opt.params import Params, count_params
from gradot_jax.offsite.compress import Compression, run_compression
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.offsite.fidelity import gradient_fidelity
from gradot_jax.offsite.finetune import finetune_adapter
from gradot_jax.offsite.optimizer import make_optimizer
from gradot_jax.offsite.plug_in import plug_in
from gradot_jax.offsite.split import Adapter, AdapterSpec, split_blocks

logger = logging.getLogger("gradot_jax")

SPLIT = AdapterSpec(2, 2)
VARIANTS: dict[str, dict[str, str]] = {
    "gradot": {"method": "gradot", "allocation": "global"},
    "gradot-uniform": {"method": "gradot"},
    "magnitude": {"method": "magnitude"},
    "layer-drop": {"method": "layer-drop"},
    "empty": {"method": "empty"},
}
"""What the demo compares. Global allocation helps GradOT and harms magnitude selection, so each
has the one that suits it."""
FLOOR = "empty"
"""The method without a middle, which shows whether the middle matters (V2)."""
HEADLINES = {"top": "perplexity", "api": "exact_match", "syn": "syn_exact_match"}
"""Name of each task's metric in a result; exact match is in percent."""

_EVALUATION_BATCH = 30
_CALIBRATION_BATCH = 16
_FIDELITY_WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class Testbed:
    """The bundled model with its tasks and one optimiser per task, shared so that runs share code.

    Attributes:
        config: of the model.
        params: its weights, float32.
        tokenizer: its tokenizer.
        tasks: by name.
        optimizers: by name of the task.
    """

    config: OPTConfig
    params: Params
    tokenizer: Any
    tasks: dict[str, Task]
    optimizers: dict[str, optax.GradientTransformation]

    @classmethod
    def load(cls, tasks: Sequence[str]) -> "Testbed":
        """Reads the bundled files and makes the examples of the named tasks."""
        config, params = load_opt(bundled_model())
        tokenizer = load_tokenizer(bundled_model())
        optimizers = {}
        for name in tasks:
            settings = FINE_TUNING[name]
            optimizers[name] = make_optimizer(
                learning_rate=settings.learning_rate,
                num_steps=settings.steps,
                warmup_steps=settings.warmup,
                weight_decay=settings.weight_decay,
                betas=(settings.b1, settings.b2),
                clip_norm=settings.clip_norm,
            )
        loaded = load_tasks(tokenizer, bundled_facts(), tasks)
        return cls(config, params, tokenizer, loaded, optimizers)

    @property
    def original(self) -> Emulator:
        """The full model in the form in which its adapter can be trained: the upper bound."""
        adapter, middle = split_blocks(self.params, SPLIT)
        return Emulator(self.params.shell, adapter, (middle,))

    def compress(self, variant: str, budget: float, draw: int) -> Compression:
        """An emulator by one of `VARIANTS`, calibrated on one draw of text."""
        examples = calibration_examples(self.tokenizer, bundled_facts(), seed=draw)
        batches = list(eval_batches(examples, _CALIBRATION_BATCH))
        options = CompressionOptions(budget=budget, **VARIANTS[variant])
        return run_compression(self.config, self.params, SPLIT, batches, options)

    def fidelity_batches(self) -> list:
        """Development prose, on which gradients are compared."""
        examples = take(self.tasks["top"].parts.development, slice(_FIDELITY_WINDOWS))
        return list(eval_batches(examples, _CALIBRATION_BATCH))

    def finetune(self, emulator: Emulator, task: str, seed: int) -> Adapter:
        """The adapter of an emulator tuned on one task; the best by development loss."""
        settings, parts = FINE_TUNING[task], self.tasks[task].parts
        return finetune_adapter(
            self.config,
            emulator,
            lambda step: epoch_batches(
                parts.train, settings.batch_size, seed=seed, start_step=step
            ),
            self.optimizers[task],
            num_steps=settings.steps,
            validation_batches=list(eval_batches(parts.development, _EVALUATION_BATCH)),
            evaluate_every=settings.steps // 2,
        )

    def measure(self, params: Params, task: str) -> dict[str, float]:
        """The task's metric on its test part, and the loss or likelihood behind it."""
        batches = eval_batches(self.tasks[task].parts.test, _EVALUATION_BATCH)
        name = HEADLINES[task]
        if self.tasks[task].metric == "perplexity":
            return {name: perplexity(self.config, params, batches).perplexity}
        score = exact_match(self.config, params, batches)
        prefix = name.removesuffix("exact_match")
        return {
            name: 100 * score.exact_match,
            f"{prefix}answer_log_likelihood": score.log_likelihood,
        }


def run_demo(
    out: Path,
    *,
    budget: float = 0.3,
    methods: Sequence[str] = ("gradot", "gradot-uniform", "magnitude", "layer-drop"),
    tasks: Sequence[str] = ("top", "api"),
    seeds: Sequence[int] = (0,),
    draws: Sequence[int] = (0,),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Runs the comparison and writes `result.json`, `table.md` and `plot.png`.

    Args:
        out: folder to make.
        budget: share of the middle's parameters to keep.
        methods: of `VARIANTS`, to compare.
        tasks: of `top`, `api` and `syn`; `top` is always measured.
        seeds: of fine-tuning.
        draws: of calibration text.
        overwrite: replace an existing folder.

    Returns:
        The contents of `result.json`.

    Raises:
        InputError: when `out` may not be written.
    """
    with output_folder(out, overwrite=overwrite) as folder:
        result = _compare(budget, methods, tuple(dict.fromkeys(("top", *tasks))), seeds, draws)
        write_result(folder / "result.json", result)
        text = table(summarise(result["rows"]), result["bench"])
        (folder / "table.md").write_text(text)
        draw_plot(folder / "plot.png", result["rows"])
    print(text)
    print(f"{out}: result.json, table.md, plot.png")
    return result


def _compare(budget, methods, tasks, seeds, draws) -> dict[str, Any]:
    began = time.monotonic()
    bed = Testbed.load(tasks)
    zero_shot = _measure_all(bed, dict.fromkeys(tasks, bed.params))
    tuned = {seed: {t: bed.finetune(bed.original, t, seed) for t in tasks} for seed in seeds}
    full = {
        seed: _measure_all(bed, {t: plug_in(bed.params, a) for t, a in adapters.items()})
        for seed, adapters in tuned.items()
    }
    logger.info("full model tuned, %.0f s", time.monotonic() - began)
    rows = []
    for method in dict.fromkeys((*methods, FLOOR)):
        calibrated = VARIANTS[method]["method"] == "gradot"
        for draw in draws if calibrated else draws[:1]:
            compression = bed.compress(method, budget, draw)
            shared = _compression_row(bed, method, budget, compression)
            for seed in seeds:
                row = _tuning_row(bed, compression.emulator, tasks, seed, zero_shot, full[seed])
                drawn = draw if calibrated else None
                rows.append({**shared, "seed": seed, "calibration_draw": drawn, **row})
            logger.info("%s, draw %d: %.0f s", method, draw, time.monotonic() - began)
    return {
        "rows": rows,
        "bench": bench_validity(rows),
        "units": {
            "perplexity": "per token, reference prose",
            "exact_match": "percent, API facts",
            "syn_exact_match": "percent, made-up people",
            "delta": "positive where the plug-in is better than the tuned emulator",
        },
        "environment": environment(),
        "seconds": round(time.monotonic() - began, 1),
    }


def _measure_all(bed: Testbed, params: dict[str, Params]) -> dict[str, float]:
    measured: dict[str, float] = {}
    for task, model in params.items():
        measured |= bed.measure(model, task)
    return measured


def _compression_row(bed, method, budget, compression) -> dict[str, Any]:
    fidelity = gradient_fidelity(
        bed.config, bed.params, compression.emulator, bed.fidelity_batches()
    )
    return {
        "method": method,
        "budget": 0.0 if method == FLOOR else budget,
        "share_shipped": count_params(compression.emulator) / count_params(bed.params),
        "gradient_cosine": fidelity.adapter.cosine,
        "gradient_relative_error": fidelity.adapter.relative_error,
        "loss_gap": fidelity.loss_gap,
    }


def _tuning_row(bed, emulator, tasks, seed, zero_shot, full) -> dict[str, Any]:
    began = time.monotonic()
    adapters = {task: bed.finetune(emulator, task, seed) for task in tasks}
    tuned = _measure_all(bed, {t: emulator.assemble(a) for t, a in adapters.items()})
    plugged = _measure_all(bed, {t: plug_in(bed.params, a) for t, a in adapters.items()})
    sign = {name: -1 if name == "perplexity" else 1 for name in plugged}
    return {
        "zero_shot": zero_shot,
        "full_finetuned": full,
        "emulator_zero_shot": _measure_all(bed, dict.fromkeys(tasks, emulator.assemble())),
        "emulator_finetuned": tuned,
        "plug_in": plugged,
        "delta": {name: sign[name] * (plugged[name] - tuned[name]) for name in plugged},
        "seconds": round(time.monotonic() - began, 1),
    }
