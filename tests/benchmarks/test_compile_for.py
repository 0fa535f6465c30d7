"""What is read off a compiled program; and, where their compilers are, the programs for chips."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from benchmarks.compile_for import (
    array_bytes,
    collectives,
    computations,
    in_loops,
    kernel_faults,
    result_bytes,
)

TEXT = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[4,8]) -> bf16[32,8] {
  %inner = bf16[32,8]{1,0} all-gather(%p), dimensions={0}
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %one = bf16[32,8]{1,0} fusion(%p), kind=kLoop, calls=%fused
  %two = (f32[8]{0}, f32[2,2]{1,0}) all-reduce-start(%x, %y), to_apply=%add
  %three = f32[8]{0} all-reduce-done(%two)
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p0: bf16[4,8]) -> f32[] {
  %loop = (s32[], bf16[4,8]) while(%start), condition=%condition, body=%body
  %whole = bf16[2,32,8]{2,1,0} all-gather(%p0), dimensions={1}
}
"""


def test_collectives_are_counted_inside_and_outside_of_loops():
    found = computations(TEXT)
    assert found.keys() == {"add", "fused", "body", "condition", "main"}
    assert in_loops(found) >= {"body", "fused"} and "main" not in in_loops(found)
    assert collectives(TEXT) == {
        "all-gather in loops": {"count": 1, "bytes": 2 * 32 * 8},
        "all-reduce in loops": {"count": 1, "bytes": 4 * (8 + 4)},
        "all-gather": {"count": 1, "bytes": 2 * 2 * 32 * 8},
    }


def test_a_collective_that_is_started_yields_its_operand_too():
    started = "(bf16[4,8]{1,0}, bf16[32,8]{1,0})"
    assert result_bytes(started, "all-gather", started=True) == 2 * 32 * 8
    assert result_bytes("(f32[8], f32[8], u32[], u32[])", "collective-permute", started=True) == 32
    assert result_bytes("(f32[8], f32[2])", "all-reduce", started=True) == 40
    assert result_bytes("s64[3]", "all-gather", started=False) == 24


class Leaf:
    """A stack of kernels, by its shape and that of a device's part."""

    def __init__(self, shape, part):
        self.shape = shape
        self.sharding = SimpleNamespace(shard_shape=lambda _: part)


class Frozen:
    """A step's frozen part, as far as its kernels are looked for."""

    middle: ClassVar = [Leaf((2, 32, 8), (2, 4, 8))]


FAULTS = {
    "ROOT %convert.1 = f32[2,4,8]{2,1,0} convert(%p)": ["f32[2,4,8] made"],
    "%fusion.2 = f32[2,32,8]{2,1,0} convert(%p)": ["f32[2,32,8] made"],
    "%x = bf16[2,32,8]{2,1,0} all-gather(%p), dimensions={1}": ["bf16[2,32,8] gathered as a whole"],
    "%x = bf16[32,8]{1,0} all-gather(%p), dimensions={0}": [],
    "%x = f32[2,4,8]{2,1,0} dot(%a, %b)": [],
}


@pytest.mark.parametrize("line", FAULTS)
def test_what_a_step_must_not_do_to_frozen_kernels_is_found(line):
    text = "ENTRY %main (p: f32[]) -> f32[] {\n  " + line + "\n}\n"
    assert kernel_faults(text, "bfloat16", SimpleNamespace(args=(Frozen,))) == FAULTS[line]
    if "convert" in line:
        assert not kernel_faults(text, "float32", SimpleNamespace(args=(Frozen,)))


def test_bytes_of_a_shape_are_those_of_all_its_arrays():
    assert array_bytes("(bf16[3,4]{1,0}, (f32[], pred[5]))") == 24 + 4 + 5


def installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


TARGETS = {"v5e:2x4": "libtpu", "h100x8": "jax_plugins.xla_cuda12"}


def compile_for(target, out, *options):
    command = [
        sys.executable,
        "-m",
        "benchmarks.compile_for",
        "--target",
        target,
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, *options], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())["programs"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_program_compiles_for_chips(target, tmp_path):
    if not installed(TARGETS[target]):
        pytest.skip(f"its compiler is not installed: {TARGETS[target]}")
    models = ("--models", "smoke", "smoke-llama")
    found = compile_for(target, tmp_path / "all.json", *models)
    assert not {name: p["failed"] for name, p in found.items() if "failed" in p}
    assert not {name for name, program in found.items() if program["to_host"] or program["dynamic"]}
    steps = ("training step", "validation step", "factor sweep, one layer")
    options = (*models, "--mesh", "8x1", "4x2", "1x8", "--dtypes", "bfloat16", "float32")
    found = compile_for(target, tmp_path / "steps.json", *options, "--programs", *steps)
    # Two steps, and the sweep with the removal Fisher and without.
    assert len(found) == 2 * 3 * 2 * 4
    for name, program in found.items():
        assert "failed" not in program, name
        assert not (program["to_host"] or program["dynamic"] or program["kernel_faults"]), name
        if name.endswith("training step"):
            # The state is given up, and comes back where it was; the metrics are small.
            assert program["outputs"] - program["aliases"] < 512 * 16, name
            assert program["aliases"] > 0.9 * program["state"], name
