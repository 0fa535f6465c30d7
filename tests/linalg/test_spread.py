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


@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_of_tpus_the_host_does_the_work_and_they_get_the_result(shape, monkeypatch):
    # A CPU device as one, of which the process has the CPU beside it.
    class TPU:
        platform = "tpu"

    worked, honest, beside = [], spread._alone, jax.devices()[5]

    def watched(function, batch, options):
        result = honest(function, batch, options)
        worked.extend(leaf.devices() for leaf in jax.tree.leaves(result))
        return result

    mesh = shape and make_mesh(*shape)
    batch = BATCH if mesh else jax.device_put(BATCH, beside)
    assert spread.host_device(TPU()) == jax.local_devices(backend="cpu")[0]
    monkeypatch.setattr(spread, "_alone", watched)
    host = jax.devices()[6]
    monkeypatch.setattr(spread, "host_device", lambda device: host)
    whole = spread.over_devices(product, batch, mesh, 2)["product"]
    np.testing.assert_array_equal(whole, BATCH["a"].sum(-1) * 2)
    assert worked == [{host}]
    assert whole.devices() == ({beside} if mesh is None else set(mesh.mesh.devices.flat))
