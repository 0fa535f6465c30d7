"""DRD, dynamic rank decomposition: which singular components a matrix keeps (GradOT, 3.2)."""

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.linalg.svd import SVD


def keep_order(scores: jax.Array, floor: int) -> jax.Array:
    """Order in which candidates are kept: the first `floor`, then by falling score.

    Ties go to the lower index, so that the order is the same everywhere.

    Args:
        scores: `[K]`, larger is more worth keeping; candidates in order of falling singular value.
        floor: number always kept whatever their score.

    Returns:
        `[K]` int32, a permutation.
    """
    protected = jnp.arange(scores.shape[0]) < floor
    return jnp.argsort(jnp.where(protected, jnp.inf, scores), descending=True, stable=True)


def factorise(decomposition: SVD, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two factors from the kept components, each carrying the root of the singular values.

    On the host: on a device each new rank would be a new program to compile.

    Args:
        decomposition: of the kernel `[D_in, D_out]`.
        kept: indices of components, `[R]`.

    Returns:
        `left [D_in, R]` and `right [R, D_out]`.
    """
    u, s, v = map(np.asarray, decomposition)
    root = np.sqrt(s[kept])
    return u[:, kept] * root, np.ascontiguousarray(v.T[kept]) * root[:, None]
