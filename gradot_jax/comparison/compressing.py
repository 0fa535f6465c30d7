"""One compression of a comparison: its record, and the emulator that it left on disk."""

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradot_jax.calibration.fidelity import gradient_fidelity
from gradot_jax.comparison.cells import CellStore
from gradot_jax.comparison.stages import Case
from gradot_jax.comparison.testbed import Testbed
from gradot_jax.compression.plan import HarmonizerPlan, LayerPlan
from gradot_jax.memory.process import (
    peak_device_bytes,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
)
from gradot_jax.methods.compress import Compression, run_compression
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.params import Params, Shared, count_params
from gradot_jax.models.split import SplitModel
from gradot_jax.offsite.emulator import Emulator
from gradot_jax.offsite.plug_in import plug_in
from gradot_jax.training.adapter import finetune_adapter
from gradot_jax.training.loop import DivergenceError
from gradot_jax.training.optimizer import shared_optimizer

PROBE_STEPS, PROBE_RATE = 8, 3e-4


class CompressionCell:
    """A compression that is done at most once for one folder of cells.

    Args:
        bed: what it runs on.
        store: of its record.
        bundles: folder for its bundle.
        case: no reference.
        options: of the compression.
    """

    def __init__(
        self,
        bed: Testbed,
        store: CellStore,
        bundles: Path,
        case: Case,
        options: CompressionOptions,
    ):
        self._bed, self._store, self._case, self._options = bed, store, case, options
        self._emulator: SplitModel | None = None
        self.settings: Mapping[str, Any] = {
            "cell": "compression",
            "model": bed.model_digest,
            "split": dataclasses.asdict(bed.split),
            "options": self._options.identity,
            "calibration": bed.calibration_digest(case.draw or 0),
            "held_out": bed.held_out_digest,
        }
        name = self._store.path("bundle", case._asdict(), self.settings).stem
        self.bundle = bundles / name
        """Folder of the shipped emulator."""

    def record(self) -> dict[str, Any]:
        """Shares, fidelity, cost and what each layer kept; compresses if nobody has.

        Seconds and memory are of the compression alone, and count what was compiled for it.
        Host memory is the process's: its peak, and how far that is above where it began, which is
        less where it had memory to spare. Device memory is the peak since the process began.
        """
        return self._store.get("compression", self._case._asdict(), self.settings, self._compress)

    def probe(self) -> dict[str, Any]:
        """The cell of `look_ahead`."""
        settings = {
            "cell": "probe",
            "emulator": self.settings,
            "text": self._bed.calibration_digest(0),
            "steps": PROBE_STEPS,
            "rate": PROBE_RATE,
            "compute_dtype": self._bed.compute_dtype,
        }
        return self._store.get(
            "probe",
            self._case._asdict(),
            settings,
            lambda: look_ahead(self._bed, self.emulator()),
        )

    def emulator(self) -> SplitModel:
        """The emulator as the data owner loads it."""
        if self._emulator is None:
            from gradot_jax.offsite.bundle import receive

            with self._store.lock(self.bundle.name):
                if not self.bundle.is_dir():
                    self._ship(self._run())
                self._emulator = receive(self.bundle, with_tokenizer=False).emulator
        return self._emulator

    def drop(self) -> None:
        """Removes the bundle; asked for again, the emulator is made again."""
        with self._store.lock(self.bundle.name):
            if self.bundle.is_dir():
                # Whole or not at all under its name, whatever ends this.
                shutil.rmtree(self.bundle.replace(self.bundle.with_suffix(".dropped")))

    def _compress(self) -> dict[str, Any]:
        bed = self._bed
        before = resident_bytes() if reset_peak() else None
        began = time.perf_counter()
        compression = self._run()
        seconds = time.perf_counter() - began
        peak = None if before is None else peak_resident_bytes()
        device_peak = peak_device_bytes()
        self._ship(compression)
        fidelity = gradient_fidelity(
            bed.config, bed.params, self.emulator(), bed.held_out, mesh=bed.mesh
        )
        return {
            "share_shipped": share_shipped(bed.params, compression.emulator),
            "share_verbatim": share_verbatim(bed.params, compression.emulator),
            "gradient_cosine": fidelity.adapter.cosine,
            "gradient_relative_error": fidelity.adapter.relative_error,
            "gradient_norm_ratio": fidelity.adapter.norm_ratio,
            "loss_gap": fidelity.loss_gap,
            "seconds": seconds,
            "peak_host_bytes": peak,
            "added_host_bytes": None if before is None or peak is None else peak - before,
            "peak_device_bytes": device_peak,
            "adapter": dataclasses.asdict(compression.emulator.adapter.split),
            "kept": [_kept(layer) for layer in compression.plan.layers],
        }

    def _run(self) -> Compression:
        bed = self._bed
        result = run_compression(
            bed.config,
            bed.params,
            bed.split,
            list(bed.calibration(self._case.draw or 0)),
            self._options,
            mesh=bed.mesh,
        )
        jax.block_until_ready(result.emulator)
        return result

    def _ship(self, compression: Compression) -> None:
        from gradot_jax.offsite.bundle import ship

        ship(self.bundle, self._bed.config, compression.plan, compression.emulator, overwrite=True)


def look_ahead(bed: Testbed, emulator: SplitModel) -> dict[str, Any]:
    """What a few steps through an emulator do to the plugged-in model, cheap to know beforehand.

    The model owner has no task of the data owner's, but public text: the adapter is tuned on
    `PROBE_STEPS` batches of it through the emulator, and plugged in.

    Returns:
        `plug_in_gain` and `emulator_gain`, nats per token by which losses on held-out text fell,
        and the relative error of the adapter's gradient after the steps, `moved_relative_error`.
    """
    batches = list(bed.calibration(0))
    steps = min(PROBE_STEPS, len(batches))
    try:
        adapter = finetune_adapter(
            bed.config,
            emulator,
            batches,
            shared_optimizer(learning_rate=PROBE_RATE, num_steps=steps, betas=(0.9, 0.98)),
            num_steps=steps,
            compute_dtype=bed.compute_dtype,
            mesh=bed.mesh,
        )
    except DivergenceError:
        lost = ("plug_in_gain", "emulator_gain", "moved_relative_error")
        return {"probe_steps": steps, **dict.fromkeys(lost, math.nan)}
    moved, plugged = dataclasses.replace(emulator, adapter=adapter), plug_in(bed.params, adapter)
    before = gradient_fidelity(bed.config, bed.params, emulator, bed.held_out, mesh=bed.mesh)
    after = gradient_fidelity(bed.config, plugged, moved, bed.held_out, mesh=bed.mesh)
    return {
        "probe_steps": steps,
        "plug_in_gain": before.loss_full - after.loss_full,
        "emulator_gain": before.loss_emulator - after.loss_emulator,
        "moved_relative_error": after.adapter.relative_error,
    }


def _kept(layer: LayerPlan | HarmonizerPlan) -> dict[str, Any]:
    """Counts of what a layer keeps; which ones they are stays with the plan."""
    if isinstance(layer, HarmonizerPlan):
        return {"layer": layer.layer, "harmonizer": layer.rank}
    ranks = {site: None if kept is None else len(kept) for site, kept in layer.components}
    return {"layer": layer.layer, "ranks": ranks, "channels": len(layer.channels)}


def share_shipped(params: Params, emulator: Emulator) -> float:
    """Parameters of an emulator over those of the original; what runs twice counts once."""
    return count_params(emulator) / count_params(params)


def share_verbatim(params: Params, emulator: Emulator) -> float:
    """Share of the original's parameters that are shipped unchanged, read from the arrays.

    An array of the original counts where an array of the same site holds the same bits, and of a
    matrix also the rows or columns that a matrix of the same site holds: pruned MLPs keep whole
    channels. Where in the model the shipped array runs does not matter.
    """
    shipped: dict[str, list[np.ndarray]] = {}
    for name, array in _arrays(emulator.shell, (*emulator.adapter.stacks, *emulator.middle)):
        shipped.setdefault(name, []).append(array)
    known = {name: _Known(arrays) for name, arrays in shipped.items()}
    found = sum(
        known[name].count(array)
        for name, array in _arrays(params.shell, params.segments)
        if name in known
    )
    return found / count_params(params)


class _Known:
    """Shipped arrays of one site, by digests of their contents."""

    def __init__(self, arrays: list[np.ndarray]):
        matrices = [array for array in arrays if array.ndim == 2]
        self._whole = {_digest(array) for array in arrays}
        self._rows = {_digest(row) for matrix in matrices for row in matrix}
        self._columns = {_digest(column) for matrix in matrices for column in matrix.T}

    def count(self, array: np.ndarray) -> int:
        """Parameters of an original array that are among the shipped ones."""
        if _digest(array) in self._whole:
            return array.size
        if array.ndim != 2:
            return 0
        rows = sum(_digest(row) in self._rows for row in array) * array.shape[1]
        columns = sum(_digest(column) in self._columns for column in array.T) * array.shape[0]
        return max(rows, columns)


def _digest(array: np.ndarray) -> int:
    return hash((array.shape, array.tobytes()))


def _arrays(shell, segments) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of single layers, named by site alone."""
    for path, leaf in jax.tree.leaves_with_path(shell):
        yield f"shell{jax.tree_util.keystr(path)}", np.asarray(leaf)
    for segment in segments:
        stored = segment.blocks if isinstance(segment, Shared) else segment
        for path, leaf in jax.tree.leaves_with_path(stored):
            for array in np.asarray(leaf):
                yield jax.tree_util.keystr(path), array
