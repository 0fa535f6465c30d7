"""That decompositions never wait for each other: how their programs are built, and a trial.

A LAPACK call for several matrices occupies a worker of the CPU's pool until other workers have
done them. As many such calls at once as there are workers wait for ever.
"""

import faulthandler
import importlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.linalg import spread
from gradot_jax.linalg.svd import svd
from gradot_jax.linalg.whitened import whitened_svd
from gradot_jax.parallel import make_mesh

DOORS = ["svd", "polar", "gram", "inputs", "both", "both, tall", "both, wide"]
COUNT = 4
# (door, size, calls, devices). Two CPUs have been seen to need up to 100 calls until they wait; the
# doors that are left to few calls make the same ones, or have never been seen to wait.
TRIALS = [
    *[(name, size, 200, 1) for name in ("svd", "inputs", "both") for size in (128, 256)],
    *[(name, 128, 40, 2) for name in ("svd", "inputs", "both")],
    *[(name, 128, 40, 1) for name in ("both, tall", "both, wide")],
    *[(name, 128, 5, 1) for name in ("polar", "gram")],
]
# Of silence that count as for ever; a call takes less than one of them.
SECONDS = 120

COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) .*\{$")
INSTRUCTION = re.compile(r" +(?:ROOT )?%(\S+) = .*? [\w-]+\(([^)]*)\)(.*)")
NAME = re.compile(r"%([\w.-]+)")


def door(name, size):
    """A public function with random matrices of this size."""
    d_in = size // 2 if name == "both, wide" else size
    d_out = size // 2 if name == "both, tall" else size
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(COUNT, d_in, d_out)).astype(np.float32)
    if name in ("svd", "polar", "gram"):
        return partial(svd, kernels, algorithm=name)
    a, g = (jnp.asarray(x.mT @ x) for x in (kernels.mT, kernels))
    return partial(whitened_svd, kernels, a, None if name == "inputs" else g, damping=1e-4)


def lapack_calls(program):
    """LAPACK calls of a compiled program, and pairs of instructions with such that may overlap."""
    calls, overlapping, callers = [], [], set()
    for line in program.splitlines():
        if match := COMPUTATION.match(line):
            computation, before, busy = match[1], {}, []
        elif match := INSTRUCTION.match(line):
            name, operands, rest = match.groups()
            before[name] = set().union(*(before[other] for other in NAME.findall(operands)))
            if is_call := 'custom_call_target="lapack' in rest:
                calls.append(line)
            # Loops and branches are busy where a computation that they name is.
            if is_call or callers.intersection(NAME.findall(rest)):
                overlapping += [(other, name) for other in busy if other not in before[name]]
                busy.append(name)
                callers.add(computation)
                before[name].add(name)
    return calls, overlapping


@pytest.mark.parametrize("name", DOORS)
def test_a_call_is_for_one_matrix_and_waits_for_those_before(name, monkeypatch):
    calls = []

    def checked(function, batch, mesh, *options):
        program = spread._alone.lower(function, batch, options).compile()
        found, overlapping = lapack_calls(program.as_text())
        assert not overlapping
        calls.extend(found)
        return spread._alone(function, batch, options)

    for module in ("svd", "whitened"):
        monkeypatch.setattr(
            importlib.import_module(f"gradot_jax.linalg.{module}"), "over_devices", checked
        )
    door(name, 8)()
    assert calls and all('num_batch_dims="0"' in call for call in calls)


def test_calls_that_may_overlap_are_told_from_those_that_wait():
    both = jax.jit(lambda a, b: (jnp.linalg.eigh(a), jax.lax.map(jnp.linalg.eigh, b)))
    chain = jax.jit(lambda a, b: jax.lax.map(jnp.linalg.eigh, b + jnp.linalg.eigh(a)[1]))
    for program, count in ((both, 1), (chain, 0)):
        text = program.lower(jnp.ones((1, 4, 4)), jnp.ones((3, 4, 4))).compile().as_text()
        calls, overlapping = lapack_calls(text)
        assert (len(calls), len(overlapping)) == (2, count)


def test_one_cpu_device_of_a_process_works_for_all(monkeypatch):
    batches = []
    monkeypatch.setattr(spread, "_alone", lambda function, batch, options: batches.append(batch))
    spread.over_devices(None, np.ones((3, 4)), make_mesh(2, 2))
    assert [batch.shape for batch in batches] == [(3, 4)]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process chooses no CPUs here")
def test_two_cpus_decompose_again_and_again():
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, __file__], env=os.environ | environment, capture_output=True, text=True
    )
    last = [None, *child.stdout.splitlines()][-1]
    assert child.returncode == 0, f"never came back, or failed: {last}\n{child.stderr[-4000:]}"


def again_and_again():
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    for name, size, calls, devices in TRIALS:
        run, mesh = door(name, size), None if devices == 1 else make_mesh(devices)
        for call in range(calls):
            alive(f"{name}, size {size}, devices {devices}, call {call}", run, mesh=mesh)
    run = door("svd", 256)
    with ThreadPoolExecutor(3) as pool:
        for call in range(20):
            alive(f"svd in three threads, call {call}", lambda: [*pool.map(lambda _: run(), "abc")])


def alive(what, run, **options):
    print(what, flush=True)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    jax.block_until_ready(run(**options))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    again_and_again()
