"""SCP, selective channel pruning: removing hidden channels from fc1 and fc2 together."""

import numpy as np

from gradot_jax.nn.linear import Dense


def prune_channels(fc1: Dense, fc2: Dense, kept: np.ndarray) -> tuple[Dense, Dense]:
    """The MLP on the kept channels alone.

    Args:
        fc1: kernel `[D, F]`, bias `[F]` or None.
        fc2: kernel `[F, D]`, bias `[D]` or None; the bias is untouched.
        kept: indices of channels, `[C]`, ascending.

    Returns:
        Maps `D -> C` and `C -> D`.
    """
    bias = None if fc1.bias is None else fc1.bias[kept]
    return Dense(fc1.kernel[:, kept], bias), Dense(fc2.kernel[kept], fc2.bias)
