"""How well something is measured is not tested: few runs, of programs that compile fast."""

import jax
import pytest

from benchmarks import harness


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    """`MIN_RUNS` and no more."""
    monkeypatch.setattr(harness, "_ENOUGH_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch):
    """Machine code is not optimised, neither here nor in processes that a test starts.

    That changes neither the memory of a program nor the operations that XLA counts.
    """
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def small_rates(monkeypatch):
    """The rates of the machine are those of a small product, and of no copy."""
    monkeypatch.setattr(harness, "product_shapes", lambda workload: [(8, 8, 8)])
    monkeypatch.setattr(harness, "copy_rate", lambda: 1e9)
