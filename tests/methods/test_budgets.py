"""What every method keeps of a budget: no more, and what is forecast; or a refusal that helps."""

import re

import jax
import pytest

from gradot_jax.errors import InputError
from gradot_jax.memory.forecast import kernel_parameters
from gradot_jax.methods.table import METHODS

MIDDLE = 4 * (4 * 8 * 8 + 2 * 8 * 12)
"""Parameters of the kernels of four layers of width 8 with 12 channels."""
LEAST = re.compile(r"the least is ([\d.]+)|a budget of ([\d.]+);|at least ([\d.]+) of the middle")
BOUNDED = [name for name in METHODS if name != "empty"]


def kept(compression) -> int:
    """Parameters of the kernels in the emulator's middle; of a layer all else are vectors."""
    leaves = jax.tree.leaves(list(compression.emulator.stored_layers()))
    return sum(leaf.size for leaf in leaves if leaf.ndim == 2)


def least(error) -> float:
    """The budget that a refusal names."""
    return float(next(filter(None, LEAST.search(str(error.value)).groups())))


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.5, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_kept_as_forecast_or_refused_with_the_least(method, budget, six_layers):
    try:
        compression = six_layers.compress(method, budget=budget)
    except InputError:
        with pytest.raises(InputError) as error:
            six_layers.compress(method, budget=budget)
        assert budget < least(error) <= 1
        budget = least(error)
        compression = six_layers.compress(method, budget=budget)
    size, outlook = kept(compression), six_layers.forecast(method, budget=budget)
    assert size <= budget * MIDDLE
    assert (size, MIDDLE) == kernel_parameters(six_layers.config, compression.plan)
    assert outlook.middle_kernels == MIDDLE
    if method.startswith("crash"):
        # A copy of an adapter block may stand where a further layer would exceed the budget.
        assert size <= outlook.kept_kernels <= budget * MIDDLE
    elif METHODS[method].options.get("allocation") == "global":
        assert outlook.kept_kernels <= budget * MIDDLE
    else:
        assert size == outlook.kept_kernels


@pytest.mark.parametrize("method", BOUNDED)
def test_a_budget_out_of_reach_is_refused_with_the_least_which_is_accepted(method, six_layers):
    with pytest.raises(InputError) as error:
        six_layers.compress(method, budget=0.02)
    with pytest.raises(InputError, match=re.escape(str(error.value))):
        six_layers.forecast(method, budget=0.02)
    enough = least(error)
    with pytest.raises(InputError):
        six_layers.forecast(method, budget=enough - 2e-4)
    assert six_layers.forecast(method, budget=enough).kept_kernels <= enough * MIDDLE


@pytest.mark.parametrize("method", ["gradot", "gradot+", "magnitude"])
@pytest.mark.parametrize("kind", ["attention_budget", "mlp_budget"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_budget_of_one_kind_leaves_the_whole_within_budget(method, kind, share, six_layers):
    compression = six_layers.compress(method, budget=0.6, **{kind: share})
    assert kept(compression) <= 0.6 * MIDDLE
