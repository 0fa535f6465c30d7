import numpy as np
import pytest

from gradot_jax.compression.channel import prune_channels
from gradot_jax.nn.linear import Dense

D, F = 3, 5
RNG = np.random.default_rng(0)
FC2 = Dense(RNG.normal(size=(F, D)), RNG.normal(size=D))
KEPT = np.array([0, 2, 4])


@pytest.mark.parametrize("bias", [RNG.normal(size=F), None])
def test_pruned_mlp_is_the_mlp_with_those_channels_zeroed(bias):
    fc1 = Dense(RNG.normal(size=(D, F)), bias)
    x = RNG.normal(size=(7, D))

    def mlp(fc1, fc2):
        hidden = x @ fc1.kernel + (0 if fc1.bias is None else fc1.bias)
        return np.maximum(hidden, 0) @ fc2.kernel + fc2.bias

    alive = np.isin(np.arange(F), KEPT)
    zeroed1 = Dense(fc1.kernel * alive, None if bias is None else bias * alive)
    zeroed2 = Dense(FC2.kernel * alive[:, None], FC2.bias)
    small1, small2 = prune_channels(fc1, FC2, KEPT)
    assert small1.shape == (D, 3) and small2.shape == (3, D)
    np.testing.assert_allclose(mlp(small1, small2), mlp(zeroed1, zeroed2), rtol=1e-12)
    assert small2.bias is FC2.bias
