"""Memory at the shapes of OPT-1.3B and Llama-3.2-1B, which a CPU can hold though not run for long.

Three questions. Does the sweep need no more than one gradient with recomputation and the factors
of two layers: as XLA lays the programs out, for the calibration's own text, and as a process
holds, for a short one? How much does a step need, of the adapter in the emulator, in the full
model, and of all weights, as XLA lays it out? And how much does `gradot compress` hold of a
checkpoint in float16? What it holds does not depend on how many layers it has done already, so
that two of them do, and what comes after them.
"""

import dataclasses
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp

from benchmarks.floor import block_weights, factor_entries
from benchmarks.harness import ROOT, Phase, analysis, new_process, program_bytes, timed
from benchmarks.phases import PHASES, lower_gradient, lower_step, lower_sweep
from benchmarks.workloads import LLAMA_1B, OPT_1_3B, STEPS, Suite, Workload, random_array
from gradot_jax.demo.corpus import bundled_model, prose_documents
from gradot_jax.files.safetensors import TensorSpec, stream_tensors
from gradot_jax.memory.process import (
    peak_resident_bytes,
    process_memory,
    reset_peak,
    resident_bytes,
)
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import count_params
from gradot_jax.models.tensors import model_schema

CALIBRATION = Workload(
    config=OPT_1_3B, length=2048, batch_size=8, num_batches=1, remat=True, num_swept=2
)
SHORT = dataclasses.replace(CALIBRATION, length=128, batch_size=1, num_batches=2)
TUNING = dataclasses.replace(CALIBRATION, length=512, batch_size=1, remat=False)

_SEQUENCES, _LENGTH = 4, 128
"""Of the command's calibration."""

_PEAKS = {"VmRSS": "peak_bytes", "RssAnon": "peak_anonymous_bytes", "RssFile": "peak_file_bytes"}


def study(suite: Suite) -> Iterator[dict[str, Any]]:
    """The growing record, of the CPU suite alone."""
    del suite
    record: dict[str, Any] = {"complete": False}
    record["sweep_compiled"] = compiled_sweep(CALIBRATION)
    yield record
    record["sweep_resident"] = resident_sweep(SHORT)
    yield record
    record["tuning"] = compiled_steps(TUNING)
    yield record
    record["compress"] = compress_command(OPT_1_3B, "float16")
    yield record | {"complete": True}


def study_llama(suite: Suite) -> Iterator[dict[str, Any]]:
    """The record of `gradot compress` alone, with all middle layers of Llama-3.2-1B, on CPU."""
    del suite
    yield {"compress": compress_command(LLAMA_1B, "bfloat16", whole=True), "complete": True}


def compiled_sweep(workload: Workload) -> dict[str, Any]:
    """Bytes of the sweep of one layer, and of what it may need, as XLA lays them out.

    Temporaries are those of the program; the sums of the factors, which are results of the
    sweep's, count with them.
    """
    sweep = analysis(lower_sweep(workload).compile())
    gradient = analysis(lower_gradient(workload).compile())
    tokens = workload.num_batches * workload.tokens
    cotangents = tokens * workload.config.hidden_size * jnp.dtype(workload.dtype).itemsize
    used = sweep["temp_bytes"] + sweep["output_bytes"] - cotangents
    return _compared(workload, used, gradient["temp_bytes"])


def resident_sweep(workload: Workload) -> dict[str, Any]:
    """The same as processes hold them, above what they held before and besides the gradient."""
    used, gradient = (_held_alone(name, workload) for name in ("factor_sweep", "gradient"))
    return _compared(workload, used, gradient - 4 * count_params(workload.shapes()))


def _compared(workload: Workload, used: int, gradient: int) -> dict[str, Any]:
    allowed = gradient + 2 * 4 * factor_entries(workload)
    return {
        "workload": workload.describe(),
        "sweep_bytes": used,
        "gradient_bytes": gradient,
        "layer_factor_bytes": 4 * factor_entries(workload),
        "allowed_bytes": allowed,
        "share": used / allowed,
    }


def _held_alone(name: str, workload: Workload) -> int:
    with new_process() as process:
        return process.submit(_held, name, workload).result()


def _held(name: str, workload: Workload) -> int:
    return held_by(PHASES[name](workload))


def held_by(phase: Phase) -> int:
    """Bytes that a second run of a phase holds at its worst above those before it.

    The first run compiles, which takes memory of its own.

    Raises:
        RuntimeError: where the system cannot reset the peak of a process; Linux can.
    """
    timed(phase.run, *phase.prepare())
    arguments = phase.prepare()
    _settle()
    if not reset_peak():
        raise RuntimeError("the peak of a process cannot be reset on this system")
    before = peak_resident_bytes()
    # The result must be held until the peak was read.
    _, result = timed(phase.run, *arguments)
    peak = peak_resident_bytes()
    del result
    return peak - before


def _settle() -> None:
    """Waits until what was let go of has been given back, which happens in the background."""
    gc.collect()
    for _ in range(20):
        before = resident_bytes() or 0
        time.sleep(0.5)
        if before - (resident_bytes() or 0) < 2**20:
            return


def compiled_steps(workload: Workload) -> dict[str, Any]:
    """Bytes of each kind of step, and how many times less than of all weights it is."""
    programs = {kind: analysis(lower_step(workload, kind).compile()) for kind in STEPS}
    every = program_bytes(programs["step_all"])
    record: dict[str, Any] = {"workload": workload.describe()}
    for kind, program in programs.items():
        used = program_bytes(program)
        record[kind] = {**program, "bytes": used, "memory_reduction": every / used}
    return record


def compress_command(config: ModelConfig, dtype: str, *, whole: bool = False) -> dict[str, Any]:
    """Peaks of `gradot compress` on a checkpoint with random weights.

    Args:
        config: of the model; its checkpoint is written to a folder that is deleted.
        dtype: of the checkpoint.
        whole: run the command to its end. Else its two halves are: with all blocks but two in the
            adapter, up to the end of the last layer; and with a method that decomposes nothing
            and ships as much, all that comes after the layers.

    Returns:
        `runs` by name, each with seconds and the peaks in bytes of what the process held: all,
        anonymous, and mapped files; the largest of those peaks; what the target allows: checkpoint,
        one layer's weights and factors in float32, and the residual stream at the boundaries of the
        middle; the shares of it that all memory and the anonymous part are (the system drops pages
        of a mapped file when it needs them); what the command's `--dry-run` says, and itself holds,
        at rest; the peak beyond that and beside mapped files that it predicts; and what was held of
        such over the prediction.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = write_checkpoint(folder / "model", config, dtype)
        command = _command(folder, model)
        if whole:
            runs = {"whole": _watch(command)}
        else:
            two_layers = _command(folder, model, num_top=config.num_hidden_layers - 4)
            runs = {
                "layers": _watch(two_layers, until="layers: 2 of 2"),
                "after": _watch([*command, "--method", "layer-drop"]),
            }
        estimate, rest = (ask([*command, "--dry-run"]) for ask in (_output, _watch))
        checkpoint = (model / "model.safetensors").stat().st_size
    shape = Workload(config=config, length=_LENGTH, batch_size=_SEQUENCES, num_batches=1)
    layer = 4 * (block_weights(shape) + factor_entries(shape))
    boundaries = 4 * (shape.num_middle + 1) * shape.tokens * config.hidden_size
    allowed = checkpoint + layer + boundaries
    peaks = {kind: max(run[kind] for run in runs.values()) for kind in _PEAKS.values()}
    predicted = predicted_bytes(estimate)
    return {
        "model": config.family.describe(config),
        "dtype": dtype,
        "tokens": shape.tokens,
        "runs": runs,
        **peaks,
        "checkpoint_bytes": checkpoint,
        "layer_bytes": layer,
        "boundary_bytes": boundaries,
        "allowed_bytes": allowed,
        "share": peaks["peak_bytes"] / allowed,
        "anonymous_share": peaks["peak_anonymous_bytes"] / allowed,
        "estimate": estimate,
        "predicted_bytes": predicted,
        "rest_bytes": rest["peak_anonymous_bytes"],
        "over_predicted": (peaks["peak_anonymous_bytes"] - rest["peak_anonymous_bytes"])
        / predicted,
    }


def predicted_bytes(estimate: list[str]) -> int:
    """The peak that the lines of a `--dry-run` name, in MiB: `at the peak  4,946 MiB of ...`."""
    (line,) = (line for line in estimate if line.startswith("at the peak"))
    return int(line.split()[3].replace(",", "")) * 2**20


def write_checkpoint(folder: Path, config: ModelConfig, dtype: str) -> Path:
    """Writes a checkpoint with random weights and the bundled model's tokenizer.

    A tensor is drawn in its own dtype as it is written: there is never more than one.
    """
    folder.mkdir()
    specs = {name: TensorSpec(shape, dtype) for name, shape in model_schema(config).items()}
    tensors = ((name, random_array(*spec)) for name, spec in specs.items())
    stream_tensors(folder / "model.safetensors", specs, tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    for file in bundled_model().glob("tokenizer*.json"):
        copy(file, folder)
    return folder


def _command(folder: Path, model: Path, *, num_top: int = 2) -> list[str]:
    text = folder / "calibration.txt"
    text.write_text("\n\n".join(prose_documents())[:20_000])
    settings = {
        "model": model,
        "calibration": text,
        "sequence-length": _LENGTH,
        "num-sequences": _SEQUENCES,
        "batch-size": 1,
        "num-bottom": 2,
        "num-top": num_top,
        "out": folder / "out",
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "gradot_jax.cli.main", "compress", *options, "--overwrite"]


def _output(command: list[str]) -> list[str]:
    """The lines that a command prints."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    return done.stdout.strip().splitlines()


def _watch(command: list[str], *, until: str = "", every: float = 0.05) -> dict[str, Any]:
    """Peaks of what a process holds while it runs, or until it says something."""
    peaks = dict.fromkeys(_PEAKS, 0)
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as said:
            process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        while process.poll() is None:
            held = process_memory(process.pid)
            peaks = {name: max(value, held.get(name, 0)) for name, value in peaks.items()}
            if until and until in log.read_text():
                process.kill()
                process.wait()
                break
            time.sleep(every)
        else:
            if process.returncode or until:
                end = log.read_text()[-2000:]
                raise RuntimeError(f"ended with code {process.returncode}: {end}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, **{_PEAKS[name]: value for name, value in peaks.items()}}
