"""What the compilers of TPUs and GPUs make of the programs, on any machine.

    python -m benchmarks.compile_for --target v5e:2x4 --models opt-6.7b llama-1b \
        --out benchmarks/results/compiled/v5e-2x4.json

Nothing is run. OUT holds a record for each program, by model, dtype, mesh and name; what is there
is not compiled again. `--programs` names some, without the method before the colon; by default it
is all of a compression by each of `METHODS`, of tuning an emulator and of evaluating it, at the
shapes of `workloads.py`. A program that does not compile has the reason in its place, and is tried
again.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradot_jax.programs.target import Target, parse_target, prepare_environment, target_devices

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
DTYPES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
METHODS = ("gradot", "gradot+", "activation-svd", "offsite-tuning", "scaleot", "crash")
HOST = ("infeed", "outfeed", "send(", "recv(", "host_compute", "MoveToHost", "xla_python_cpu")

_COMPUTATION = re.compile(
    r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) )?->.*\{$|^(?:ENTRY )?%?([\w.\-]+) \{$"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=\{?%?([\w.\-, %]+)\}?")
_BODY = re.compile(r"body=%?([\w.\-]+)")


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program's text."""
    found: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line.strip()):
                name = match[1] or match[2]
                found[name] = []
        elif line.strip() == "}":
            name = None
        else:
            found[name].append(line.strip())
    return found


def in_loops(found: dict[str, list[str]]) -> set[str]:
    """Names of the computations that run in a loop."""
    calls = {
        name: {
            part.strip(" %")
            for line in lines
            for match in _CALLED.findall(line)
            for part in match.split(",")
        }
        for name, lines in found.items()
    }
    left = {body for lines in found.values() for line in lines for body in _BODY.findall(line)}
    inside: set[str] = set()
    while left:
        name = left.pop()
        inside.add(name)
        left |= (calls.get(name, set()) & found.keys()) - inside
    return inside


def array_bytes(shape: str) -> int:
    """Bytes of the arrays that are named in a shape, tuples included."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count * DTYPES.get(dtype, 4)
    return total


def result_bytes(shape: str, kind: str, *, started: bool) -> int:
    """Bytes of a collective's result: one that is started yields its operand as well."""
    if started and kind in ("all-gather", "collective-permute"):
        arrays = [f"{dtype}[{sizes}]" for dtype, sizes in _ARRAY.findall(shape)]
        # Numbers without a size are of the bookkeeping.
        arrays = [array for array in arrays if not array.endswith("[]")]
        return array_bytes(" ".join(arrays[len(arrays) // 2 :]))
    return array_bytes(shape)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Number and bytes of results of each kind, by `KIND` and `KIND in loops`."""
    found = computations(text)
    loops, counted = in_loops(found), dict[str, dict[str, int]]()
    kinds = "|".join(COLLECTIVES)
    pattern = re.compile(rf"= (.*?) ({kinds})(-start)?\(")
    for name, lines in found.items():
        for line in lines:
            if match := pattern.search(line):
                key = match[2] + (" in loops" if name in loops else "")
                entry = counted.setdefault(key, {"count": 0, "bytes": 0})
                entry["count"] += 1
                entry["bytes"] += result_bytes(match[1], match[2], started=bool(match[3]))
    return counted


def programs_of(workload: Any, place: Any) -> Iterator[Any]:
    """Those of compressions by methods of every kind, of tuning an emulator and evaluating it."""
    from benchmarks.phases import optimizer
    from gradot_jax.methods.options import ScaleOTOptions
    from gradot_jax.programs.commands import compression_programs
    from gradot_jax.programs.evaluation import decoding_programs, evaluation_programs

    # The step first: it is what a data owner rents chips for.
    yield from workload.tuning(place, optimizer())
    known = set()
    # On small models the usual width would cost more than what it stands in for.
    rank = min(64, max(workload.config.hidden_size // 32, 1))
    for method in METHODS:
        options = {"scaleot": ScaleOTOptions(harmonizer_rank=rank)} if method == "scaleot" else {}
        run = workload.compression(place, method=method, **options)
        for program in compression_programs(run):
            if program.key not in known:
                known.add(program.key)
                yield dataclasses.replace(program, name=f"{method}: {program.name}")
    emulator = workload.emulator_shapes().assemble()
    sizes = {"batch_size": workload.batch_size, "length": workload.length}
    for kind in ("text", "answers"):
        yield from evaluation_programs(workload.config, emulator, place, **sizes, kind=kind)
    length = workload.length // 2
    rows = workload.batch_size
    yield from decoding_programs(
        workload.config, emulator, place, batch_size=rows, length=length, steps=length
    )


def compile_all(
    target: Target,
    models: list[str],
    meshes: list[tuple[int, int]],
    dtypes: list[str],
    wanted: list[str],
    out: Path,
) -> None:
    """Compiles what is not in the file yet, and writes it after each program."""
    import jax.numpy as jnp

    from benchmarks.workloads import WORKLOADS
    from gradot_jax.evaluation.record import environment, write_result
    from gradot_jax.programs.compiled import compile_programs
    from gradot_jax.programs.program import mesh_of

    devices = target_devices(target)
    record = (
        json.loads(out.read_text()) if out.exists() else {"target": target.name, "programs": {}}
    )
    if record["target"] != target.name:
        raise SystemExit(f"{out}: of the target {record['target']}")
    for model in models:
        for data, axis in meshes:
            place = mesh_of(devices, data, axis)
            for dtype in dtypes:
                workload = dataclasses.replace(
                    WORKLOADS["device"][model],
                    dtype=jnp.dtype(dtype),
                    batch_size=max(WORKLOADS["device"][model].batch_size, data),
                )
                for program in programs_of(workload, place):
                    key = f"{model} {dtype} {data}x{axis} {program.name}"
                    short = program.name.rpartition(": ")[2]
                    there = record["programs"].get(key, {"failed": ""})
                    if "failed" not in there or (wanted and short not in wanted):
                        continue
                    print(key, file=sys.stderr, flush=True)
                    try:
                        ((_, compiled, executable),) = compile_programs([program], place.platform)
                    except Exception as error:
                        reason = f"{type(error).__name__}: {str(error).splitlines()[0]:.300}"
                        record["programs"][key] = {"failed": reason}
                    else:
                        text = executable.as_text()
                        record["programs"][key] = {
                            **dataclasses.asdict(compiled),
                            "collectives": collectives(text),
                            "to_host": [mark for mark in HOST if mark in text],
                            "dynamic": "<=" in "".join(re.findall(r"\[[\d,<=]*\]", text)),
                            "kernel_faults": kernel_faults(text, dtype, program),
                            "state": state_bytes(program),
                        }
                    write_result(out, {**record, "environment": environment()})


def state_bytes(program: Any) -> int:
    """Bytes of the state that a step is given, per device; 0 of what has none."""
    from gradot_jax.programs.program import device_bytes

    return device_bytes([arg for arg in program.args if hasattr(arg, "optimizer")])


def kernel_faults(text: str, dtype: str, program: Any) -> list[str]:
    """What a step does to the stacks of frozen kernels that it should not.

    A copy of one in float32 where the arithmetic is in less, and one that is gathered as a whole,
    outside the loop over layers. A single layer's cannot be told from those that are trained.
    """
    import jax

    frozen = next((arg for arg in program.args if hasattr(arg, "middle")), None)
    stacks = jax.tree.leaves(() if frozen is None else frozen.middle)
    stacks = [leaf for leaf in stacks if len(leaf.shape) == 3]
    whole = {f"[{','.join(map(str, leaf.shape))}]" for leaf in stacks if leaf.shape[0] > 1}
    parts = {leaf.sharding.shard_shape(leaf.shape) for leaf in stacks}
    parts |= {leaf.shape for leaf in stacks}
    wide = {f"f32[{','.join(map(str, shape))}]" for shape in parts} if dtype != "float32" else ()
    found = computations(text)
    loops, faults = in_loops(found), set()
    for name, lines in found.items():
        for line in lines:
            own, _, made = line.partition(" = ")
            shape = made.partition("{")[0]
            if shape in wide and ("convert" in own or re.search(r"^\S+ convert\(", made)):
                faults.add(f"{shape} made")
            gathers = re.search(r" all-gather(-start)?\(", made)
            if gathers and name not in loops and any(size in shape for size in whole):
                faults.add(f"{shape} gathered as a whole")
    return sorted(faults)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="chips, such as v5e:2x4 or h100x8")
    parser.add_argument("--models", nargs="+", required=True, help="of the device workloads")
    parser.add_argument(
        "--mesh", nargs="+", default=[], help="such as 8x1 4x2; all along the batch"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--programs", nargs="+", default=[], help="names; all by default")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    target = parse_target(given.target)
    prepare_environment(target)
    meshes = [tuple(map(int, mesh.split("x"))) for mesh in given.mesh] or [(target.count, 1)]
    compile_all(target, given.models, meshes, given.dtypes, given.programs, given.out)


if __name__ == "__main__":
    main()
