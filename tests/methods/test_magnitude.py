import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.methods.magnitude import MAGNITUDE, magnitude_terms
from gradot_jax.methods.scored import propose
from gradot_jax.nn.layout import maps


def test_scores_are_singular_values_and_norms_of_channels(random_layer, assert_close):
    block, _ = random_layer()
    terms = propose(block, None, MAGNITUDE).terms
    for site in block.layout.low_rank:
        kernel = np.asarray(getattr(block, site).kernel, np.float64)
        expected = np.linalg.svd(kernel, compute_uv=False)
        assert_close(terms.components[site].hessian, expected, "float32")
    into = [row for m in (block.gate, block.up) for row in (m.kernel, m.bias[None])]
    columns = np.concatenate([*into, block.down.kernel.T])
    assert_close(terms.channels.hessian, np.linalg.norm(columns, axis=0), "float32")
    assert not any(np.any(t.gradient) for t in (terms.channels, *terms.components.values()))


def test_half_precision_does_not_overflow(random_layer, assert_close):
    big = jax.tree.map(lambda leaf: (1000 * leaf).astype(jnp.float16), random_layer()[0])
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), big)
    parts = propose(big, None, MAGNITUDE).parts
    got, expected = (magnitude_terms(b.layout, maps(b), parts, None) for b in (big, exact))
    assert_close(got, expected, "float32")
