import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.linalg.summation import add, zero_sum


def test_compensated_sum_is_exact_where_the_naive_one_drifts():
    terms = np.random.default_rng(0).uniform(0.5, 1.5, (20_000, 3)).astype(np.float32)
    exact = terms.astype(np.float64).sum(0)

    @jax.jit
    def sums(terms):
        def step(carry, term):
            running, naive = carry
            return (add(running, term), naive + term), None

        (running, naive), _ = jax.lax.scan(step, (zero_sum(terms[0]), terms[0] * 0), terms)
        return running.total, naive

    total, naive = (np.asarray(part, np.float64) for part in sums(terms))
    spacing = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(total - exact) <= spacing).all()
    assert np.abs(naive - exact).max() > 10 * spacing.max()


def test_sum_of_trees_keeps_structure_and_dtype():
    tree = {"a": jnp.ones((2, 3)), "b": (jnp.float32(2.0), None)}
    running = add(add(zero_sum(tree), tree), tree)
    assert jax.tree.structure(running.total) == jax.tree.structure(tree)
    np.testing.assert_array_equal(running.total["a"], 2 * np.ones((2, 3)))
    assert running.total["b"][0] == 4 and running.total["b"][0].dtype == jnp.float32
