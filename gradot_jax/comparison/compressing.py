"""One compression of a comparison: its record, and the emulator that it left on disk."""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from gradot_jax.comparison.cells import CellStore
from gradot_jax.comparison.memory import (
    peak_device_bytes,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
)
from gradot_jax.comparison.shares import share_shipped, share_verbatim
from gradot_jax.comparison.testbed import Testbed
from gradot_jax.comparison.variants import Subject, variant_options
from gradot_jax.compression.plan import HarmonizerPlan, LayerPlan
from gradot_jax.offsite.bundle import load_bundle, save_bundle
from gradot_jax.offsite.checkpoint import tree_digest
from gradot_jax.offsite.compress import Compression, run_compression
from gradot_jax.offsite.emulator import SplitModel
from gradot_jax.offsite.fidelity import gradient_fidelity


class CompressionCell:
    """A compression that is done at most once for one folder of cells.

    Args:
        bed: what it runs on.
        store: where its record and its bundle lie.
        model: digest of the testbed's weights.
        subject: no reference.
    """

    def __init__(self, bed: Testbed, store: CellStore, model: str, subject: Subject):
        self._bed, self._store, self._subject = bed, store, subject
        self._options = variant_options(subject, bed.training)
        self._batches = list(bed.calibration(subject.draw or 0))
        self._emulator: SplitModel | None = None
        self.settings: Mapping[str, Any] = {
            "cell": "compression",
            "model": model,
            "split": dataclasses.asdict(bed.split),
            "options": dataclasses.asdict(self._options),
            "calibration": tree_digest(self._batches),
            "held_out": tree_digest(list(bed.held_out)),
        }

    @property
    def _name(self) -> str:
        return f"compression-{self._subject.label}"

    @property
    def bundle(self) -> Path:
        """Folder of the shipped emulator."""
        return self._store.path(self._name, self.settings).with_suffix("") / "bundle"

    def record(self) -> dict[str, Any]:
        """Shares, fidelity, cost and what each layer kept; compresses if nobody has.

        Seconds and memory are of the compression alone, and count what was compiled for it.
        Host memory is the process's: its peak, and how far that is above where it began, which is
        less where it had memory to spare. Device memory is the peak since the process began.
        """
        return self._store.get(self._name, self.settings, self._compress)

    def emulator(self) -> SplitModel:
        """The emulator as the data owner loads it."""
        if self._emulator is None:
            if not self.bundle.is_dir():
                self._save(self._run())
            self._emulator = load_bundle(self.bundle).emulator
        return self._emulator

    def drop(self) -> None:
        """Removes the bundle; asked for again, the emulator is made again."""
        shutil.rmtree(self.bundle.parent, ignore_errors=True)

    def _compress(self) -> dict[str, Any]:
        bed = self._bed
        before = resident_bytes() if reset_peak() else None
        began = time.perf_counter()
        compression = self._run()
        seconds = time.perf_counter() - began
        peak = None if before is None else peak_resident_bytes()
        device_peak = peak_device_bytes()
        self._save(compression)
        emulator = self.emulator()
        fidelity = gradient_fidelity(bed.config, bed.params, emulator, bed.held_out)
        return {
            "share_shipped": share_shipped(bed.params, compression.emulator),
            "share_verbatim": share_verbatim(bed.params, compression.emulator),
            "gradient_cosine": fidelity.adapter.cosine,
            "gradient_relative_error": fidelity.adapter.relative_error,
            "gradient_norm_ratio": fidelity.adapter.norm_ratio,
            "loss_gap": fidelity.loss_gap,
            "seconds": seconds,
            "peak_host_bytes": peak,
            "added_host_bytes": None if peak is None else peak - before,
            "peak_device_bytes": device_peak,
            "adapter": dataclasses.asdict(compression.emulator.adapter.spec),
            "kept": [_kept(layer) for layer in compression.plan.layers],
        }

    def _run(self) -> Compression:
        bed = self._bed
        result = run_compression(
            bed.config, bed.params, bed.split, self._batches, self._options, mesh=bed.mesh
        )
        jax.block_until_ready(result.emulator)
        return result

    def _save(self, compression: Compression) -> None:
        plan = compression.plan
        save_bundle(
            self.bundle,
            self._bed.config,
            compression.emulator,
            method=plan.method,
            attention_budget=plan.attention_budget,
            mlp_budget=plan.mlp_budget,
            shapes=plan.shapes,
            overwrite=True,
        )


def _kept(layer: LayerPlan | HarmonizerPlan) -> dict[str, Any]:
    """Counts of what a layer keeps; which ones they are stays with the plan."""
    if isinstance(layer, HarmonizerPlan):
        return {"layer": layer.layer, "harmonizer": layer.rank}
    ranks = {site: None if kept is None else len(kept) for site, kept in layer.components}
    return {"layer": layer.layer, "ranks": ranks, "channels": len(layer.channels)}
