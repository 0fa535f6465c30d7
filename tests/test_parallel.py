import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gradot_jax.errors import InputError
from gradot_jax.parallel import (
    agree,
    along_data,
    initialize_distributed,
    is_writer,
    make_mesh,
    one_writer,
    put,
    row_spec,
    spread_rows,
    sync,
    to_host,
    use_compile_cache,
)


def test_meshes_are_auto_and_take_all_devices_along_the_batch():
    mesh = make_mesh(model=2).mesh
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="data=4 x model=3 needs 12 devices, there are 8"):
        make_mesh(4, 3)


def test_put_takes_one_sharding_for_a_branch_or_one_for_each_leaf():
    mesh = make_mesh(4, 2)
    tree = {"a": np.arange(16.0).reshape(4, 4), "b": [jnp.ones(4), None]}
    placed = put(tree, {"a": mesh.sharding("model", "data"), "b": mesh.batched})
    assert placed["a"].addressable_shards[0].data.shape == (2, 1)
    assert placed["b"][0].addressable_shards[0].data.shape == (1,)
    whole = put(tree, mesh.replicated)
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(whole)} == {PartitionSpec()}


def test_to_host_undoes_put():
    tree = {"a": np.arange(16, dtype=np.float32).reshape(4, 4), "b": None}
    placed = put(tree, make_mesh(4, 2).sharding("data", "model"))
    host = to_host(placed | {"c": np.ones(3)})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    np.testing.assert_array_equal(host["a"], tree["a"])


def test_rows_lie_over_as_many_devices_as_divide_them():
    sizes = {"data": 4, "model": 2}
    assert row_spec((16, 3), sizes) == PartitionSpec(("data", "model"))
    assert row_spec((5, 12, 12), sizes) == PartitionSpec(None, ("data",))
    assert row_spec((6, 6), sizes) == PartitionSpec(("model",))
    assert row_spec((5, 5), sizes) == PartitionSpec()


def test_sums_over_tokens_are_spread_where_they_are_computed():
    mesh = make_mesh(4, 2)
    x = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)

    @jax.jit
    def moments(x):
        return spread_rows({"product": x.T @ x, "sum": x.sum(0)})

    spread = moments(put(x, mesh.batched))
    assert spread["product"].addressable_shards[0].data.shape == (2, 16)
    np.testing.assert_allclose(spread["product"], moments(x)["product"], rtol=1e-5, atol=1e-5)


def test_a_single_process_writes_agrees_and_waits_for_nobody():
    assert is_writer()
    assert agree(3) == 3
    sync("here")
    with one_writer("a file") as writes:
        assert writes
    with pytest.raises(OSError, match="disk"), one_writer("a file"):
        raise OSError("disk")


def test_number_of_processes_is_a_number(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES: expected a number, got 'two'"):
        initialize_distributed()


def test_compile_cache_goes_where_it_is_told(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        use_compile_cache(tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        use_compile_cache(None)
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        use_compile_cache(before)


def test_activations_lie_along_data_where_their_rows_divide():
    mesh = make_mesh(4, 2)
    x = put(np.ones((8, 4), np.float32), mesh.sharding(None, "model"))
    placed = jax.jit(along_data)(x)
    assert placed.sharding.is_equivalent_to(mesh.batched, 2)
    for unplaced in (put(np.ones((6, 4), np.float32), mesh.replicated), jnp.ones((8, 4))):
        assert not jax.make_jaxpr(along_data)(unplaced).eqns
