import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gradot_jax.parallel import make_mesh
from gradot_jax.programs.cost import least_flops, product_flops

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))
ONE = 2 * 3 * 4 * 5


def flops(function, *args):
    return product_flops(jax.make_jaxpr(function)(*args).jaxpr)


def test_products_count_two_for_each_pair_of_numbers():
    assert flops(jnp.dot, A, B) == ONE
    assert flops(jax.vmap(jnp.dot), jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))) == 7 * ONE
    assert flops(lambda a: jnp.tanh(a) + a, A) == 0


def test_what_is_called_counts_and_a_loop_as_often_as_it_runs():
    def loop(a, b):
        return jax.lax.scan(lambda c, _: (c, a @ b), 0, length=6)

    assert flops(jax.jit(loop), A, B) == 6 * ONE
    assert flops(jax.checkpoint(loop), A, B) == 6 * ONE


def test_products_that_nobody_reads_are_no_part_of_the_least():
    unread = jax.jit(lambda a, b: (a @ b, a.sum())[1])
    traced = unread.trace(A, B)
    assert (product_flops(traced.jaxpr.jaxpr), least_flops(traced)) == (ONE, 0)
    # Of a loss that is not asked for, its gradient is left.
    gradient = jax.jit(jax.grad(lambda a: (a @ B).sum())).trace(A)
    assert (product_flops(gradient.jaxpr.jaxpr), least_flops(gradient)) == (2 * ONE, ONE)
    twice = jax.jit(lambda a, b: a @ b @ b.T).trace(A, B)
    assert least_flops(twice) == product_flops(twice.jaxpr.jaxpr) == 2 * ONE


def test_of_branches_the_largest_counts():
    def either(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: (a @ b).sum(), lambda: (a @ b @ b.T).sum())

    assert flops(either, A, B) == 2 * ONE


def test_each_device_counts():
    mesh = make_mesh(data=8).mesh
    share = PartitionSpec("data")
    spread = jax.shard_map(
        lambda a: a @ jnp.ones((4, 5)), mesh=mesh, in_specs=share, out_specs=share
    )
    assert flops(spread, jnp.ones((24, 4))) == 8 * ONE
