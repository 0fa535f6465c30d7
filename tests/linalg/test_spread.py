import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.linalg import spread
from gradot_jax.parallel import make_mesh, put

BATCH = {"a": np.arange(60, dtype=np.float32).reshape(5, 3, 4), "b": np.ones((5, 4), np.float32)}


def product(batch, factor):
    return {"product": jnp.einsum("nij,nj->ni", batch["a"], batch["b"]) * factor}


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (2, 4)])
def test_accelerators_take_shares_of_a_batch_filled_up_with_zeros(shape):
    # CPUs take another way, of which the processes are the parts.
    mesh = make_mesh(*shape)
    padded, count = spread._filled_up(BATCH, mesh.mesh.size)
    assert count == 5 and all(len(leaf) % mesh.mesh.size == 0 for leaf in jax.tree.leaves(padded))
    placed = put(padded, mesh.sharding(spread._DEVICES))
    whole = spread._spread(product, placed, mesh, count, (2,))["product"]
    np.testing.assert_array_equal(whole, BATCH["a"].sum(-1) * 2)
    assert whole.sharding.is_fully_replicated and len(whole.sharding.device_set) == mesh.mesh.size


@pytest.mark.parametrize("shape", [None, (1, 1), (2, 4)])
def test_results_are_whole_on_every_device(shape):
    mesh = shape and make_mesh(*shape)
    whole = spread.over_devices(product, BATCH, mesh, 2)["product"]
    np.testing.assert_array_equal(whole, BATCH["a"].sum(-1) * 2)
    assert whole.sharding.is_fully_replicated
    assert len(whole.sharding.device_set) == (1 if mesh is None else mesh.mesh.size)
