"""The model owner's step: a model, a split and calibration text in; a plan and an emulator out."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from gradot_jax.compression.plan import Plan
from gradot_jax.errors import InputError
from gradot_jax.methods.allocation import kind_budgets, layer_pools
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.problem import Problem
from gradot_jax.models.family import ModelConfig, attention_windows
from gradot_jax.models.params import Params
from gradot_jax.models.split import AdapterSpec, adapter_of
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.layout import maps
from gradot_jax.offsite.emulator import Emulator, build_emulator
from gradot_jax.parallel import DeviceMesh


class Compression(NamedTuple):
    """All that a compression yields.

    Attributes:
        plan: stays with the model owner.
        emulator: to ship.
        scores: what the method scored, by name: terms of components `[M, S, K]` and channels
            `[M, F]`, similarities, importance; stay with the model owner.
        calibration: record of the calibration or training; stays with the model owner.
    """

    plan: Plan
    emulator: Emulator
    scores: dict[str, np.ndarray]
    calibration: dict[str, Any]


def compress(
    config: ModelConfig,
    params: Params,
    split: AdapterSpec,
    calibration_batches: Iterable[Batch],
    **options: Any,
) -> tuple[Plan, Emulator]:
    """Compresses the middle of a model into an emulator.

    Args:
        config: the model's configuration.
        params: the full original model.
        split: which blocks are the adapter.
        calibration_batches: text of the model owner's, of one shape; read by methods that score
            with it or train on it.
        **options: fields of `CompressionOptions`, such as `method` and `budget`.

    Returns:
        The plan, to keep, and the emulator, to ship.

    Raises:
        InputError: for an option out of range, a split without a middle or unfit calibration.
        DivergenceError: from methods that train.
    """
    result = run_compression(
        config, params, split, calibration_batches, CompressionOptions(**options)
    )
    return result.plan, result.emulator


def run_compression(
    config: ModelConfig,
    params: Params,
    split: AdapterSpec,
    calibration_batches: Iterable[Batch],
    options: CompressionOptions,
    *,
    mesh: DeviceMesh | None = None,
    checkpoints: Path | None = None,
    scratch: Path | None = None,
    progress: bool = False,
    dtype: DTypeLike | None = None,
    offload: bool = False,
) -> Compression:
    """`compress`, returning scores and the calibration record as well.

    Weights may be numpy arrays, of a mapped file for one: methods that score layer by layer have
    those of a single layer on the devices. With `options.adapter = "own"` the emulator's split is
    the method's; it has as many blocks as `split`.

    Args:
        config: as in `compress`, like `params`, `split` and `calibration_batches`.
        params: the full original model.
        split: which blocks are the adapter.
        calibration_batches: text of the model owner's.
        options: how to compress.
        mesh: devices to spread the work over.
        checkpoints: folder from which an interrupted compression goes on.
        scratch: empty folder for finished layers where there are no checkpoints; memory otherwise.
        progress: whether to report.
        dtype: of the arithmetic, see `nn.dtypes.compute_dtype`; methods that train have that of
            the weights.
        offload: keep the residual streams at the boundaries of layers, most of what a calibration
            takes, in host memory.
    """
    block = config.family.block_shapes(config)
    if options.compensate_attention == "bias":
        without = [site for site in block.layout.low_rank if maps(block)[site].bias is None]
        if without:
            raise InputError(
                "compensate_attention = 'bias' needs a model with biases, there are none of "
                f"{', '.join(without)}"
            )
    split.check(params.num_layers)
    outcome = options.record.compress(
        Problem(
            config=config,
            params=params,
            split=split,
            batches=list(calibration_batches),
            options=options,
            mesh=mesh,
            checkpoints=checkpoints,
            scratch=scratch,
            progress=progress,
            dtype=dtype,
            offload=offload,
        )
    )
    split = outcome.split or split
    adapter = adapter_of(params, split)
    emulator = build_emulator(params.shell, adapter, outcome.blocks, outcome.layer_map)
    # Refuses a model whose layers attend differently, and of which some are gone.
    attention_windows(config, emulator.assemble().num_layers)
    attention_budget, mlp_budget = _budgets(config, options)
    plan = Plan(
        method=options.method,
        attention_budget=attention_budget,
        mlp_budget=mlp_budget,
        num_bottom=split.num_bottom,
        num_top=split.num_top,
        inner=split.inner,
        layers=tuple(outcome.layers),
        layer_map=emulator.layer_map,
    )
    return Compression(plan, emulator, dict(outcome.scores), dict(outcome.calibration))


def _budgets(config: ModelConfig, options: CompressionOptions) -> tuple[float, float]:
    """Budgets of attention and MLPs that the method had."""
    if options.record.scores:
        return kind_budgets(layer_pools(config, options), options)
    return options.budget, options.budget
