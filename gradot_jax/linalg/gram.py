"""Gram matrices `X^T X` by the products that differ: block rows on and right of the diagonal.

A product of a matrix with itself is symmetric, so that half of its arithmetic would be done
twice. With k block rows `(k + 1) / 2k` of it is done, and as much of the memory of a sum is held,
until `symmetric` mirrors the rest.
"""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp

_BLOCKS = 8
_TILE = 128


class Gram(NamedTuple):
    """A symmetric `[D, D]` matrix, or a sum of such, as its upper block rows.

    Attributes:
        rows: for each block of `b` rows, from the top one down, its entries from the diagonal
            block on: `[b, D]`, `[b, D - b]`, ...; float32.
    """

    rows: tuple[jax.Array, ...]


def _bounds(width: int) -> list[tuple[int, int]]:
    # Eight blocks leave 9/16 of the arithmetic; thinner ones starve the units that multiply.
    tiles = -(-width // (_BLOCKS * _TILE))
    return list(pairwise([*range(0, width, tiles * _TILE), width]))


def zero_gram(width: int) -> Gram:
    """The zero matrix `[D, D]`."""
    shapes = [(stop - start, width - start) for start, stop in _bounds(width)]
    return Gram(tuple(jnp.zeros(shape, jnp.float32) for shape in shapes))


def gram(x: jax.Array, weights: jax.Array | None = None) -> Gram:
    """The sum over rows of `w_n x_n x_n^T`, in float32.

    Args:
        x: `[N, D]`.
        weights: `[N]`; None for ones.
    """
    weighted = x if weights is None else x * weights[:, None].astype(x.dtype)
    return Gram(
        tuple(
            jax.lax.dot_general(
                x[:, start:stop],
                weighted[:, start:],
                (((0,), (0,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
            for start, stop in _bounds(x.shape[1])
        )
    )


def symmetric(matrix: Gram) -> jax.Array:
    """The whole matrix, `[D, D]`."""
    width = matrix.rows[0].shape[1]
    upper = jnp.concatenate(
        [jnp.pad(row, ((0, 0), (width - row.shape[1], 0))) for row in matrix.rows]
    )
    return jnp.where(jnp.tri(width, dtype=bool).T, upper, upper.T)
