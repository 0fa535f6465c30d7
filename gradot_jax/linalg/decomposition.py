"""Three algorithms for the singular value decomposition of matrices in float32.

`W = U diag(s) V^T` of a tall `[m, n]` matrix costs, in units of n^3 for m = n:

- `svd`, what `jnp.linalg.svd` is on the platform. CPU: LAPACK's gesdd, 22/3. NVIDIA: cuSOLVER's
  one-sided Jacobi up to 1,024 columns, above it QR iteration, both poor in large products.
- `polar`: the polar decomposition `W = (U V^T)(V diag(s) V^T)` by six QDWH iterations (Nakatsukasa
  and Higham 2013), about 40, nearly all in products, QR and Cholesky; then one `eigh`. That is
  `jnp.linalg.svd` on TPUs too, where a batch of them runs both branches of every iteration.
- `gram`: `eigh(W^T W)` and a QR of `W V`, 7 beside each `eigh`. Squaring loses values below
  sqrt(eps) of the largest; it is done again on the small ones alone until none is lost.

`eigh` is a tridiagonalisation on CPUs and GPUs, about 9, half of it bound by memory; on TPUs it
is itself a chain of polar decompositions, so that one less is worth more than anything else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Algorithm = Literal["svd", "polar", "gram"]

_SPLIT = 1 / 16
_TOLERANCE = 5e-6
_MAX_PASSES = 5


def default_algorithm(platform: str) -> Algorithm:
    """What the costs above suggest; `benchmarks.decomposition` measures whether they are right.

    Args:
        platform: `cpu`, `gpu` or `tpu`, as a device names it.
    """
    defaults: dict[str, Algorithm] = {"cpu": "svd", "tpu": "polar"}
    return defaults.get(platform, "gram")


def decompose(matrices: jax.Array, algorithm: Algorithm) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Singular value decompositions of finite float32 matrices.

    Args:
        matrices: `[N, m, n]`.
        algorithm: see above.

    Returns:
        U `[N, m, k]`, s `[N, k]` falling and V `[N, n, k]`, with k = min(m, n).
    """
    if algorithm == "svd":
        u, s, vt = each(partial(jnp.linalg.svd, full_matrices=False), matrices)
        return u, s, jnp.swapaxes(vt, -1, -2)
    # One by one: in a batch each step of every loop is taken for as long as any matrix needs it.
    return jax.lax.map(partial(_decompose_one, algorithm=algorithm), matrices)


def each(routine: Callable[[jax.Array], Any], matrices: jax.Array) -> Any:
    """A routine of `jnp.linalg` for each of a batch; on a CPU one call per matrix.

    A LAPACK call for a batch holds a worker of the CPU's only pool of threads while others do the
    work. As many such calls at once as there are workers, in one program, on several virtual
    devices or from several threads, wait for each other for ever (jaxlib 0.10.0 to 0.11.0). A call
    for one matrix waits for nobody, and is as fast: LAPACK has threads of its own.

    Args:
        routine: of one matrix `[m, n]`, to a tree of arrays `[...]`.
        matrices: `[N, m, n]`.

    Returns:
        Arrays `[N, ...]`.
    """
    return jax.lax.platform_dependent(
        matrices, cpu=partial(jax.lax.map, routine), default=jax.vmap(routine)
    )


def _decompose_one(
    matrix: jax.Array, algorithm: Algorithm
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = _decompose_one(matrix.T, algorithm)
        return u, s, v
    # Squares of the entries must neither overflow nor vanish.
    scale = jnp.abs(matrix).max()
    scale = jnp.where(scale > 0, scale, 1)
    with jax.default_matmul_precision("highest"):
        u, s, v = (_polar if algorithm == "polar" else _gram)(matrix / scale)
    return u, s * scale, v


def _polar(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Of zero there is no polar decomposition: 0/0.
    zero = ~w.any()
    unitary, hermitian, _, _ = jax.lax.linalg.qdwh(w + zero * jnp.eye(*w.shape, dtype=w.dtype))
    s, v = jnp.linalg.eigh(hermitian)
    v = v[:, ::-1]
    # Where a value vanishes the polar factor is not orthonormal.
    u, r = jnp.linalg.qr(unitary @ v)
    return u * _sign(r), jnp.maximum(s[::-1], 0) * ~zero, v


class _Passes(NamedTuple):
    """`W = Q R V^T` after some passes, of which `resolved` leading rows of R are diagonal."""

    q: jax.Array
    r: jax.Array
    v: jax.Array
    resolved: jax.Array
    done: int | jax.Array


def _gram(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Passes of `eigh` and QR, `W = Q R V^T`, until R is diagonal.

    A pass makes the columns of `W V` orthogonal to about eps times the square of the largest
    value. In R, the rows of values above 1/16 of the largest are then diagonal to 16 eps, and the
    others at least small; the next pass takes the block of these, scaled up by at least as much.
    """
    size = w.shape[1]

    def unfinished(passes: _Passes) -> jax.Array:
        r = passes.r
        off = jnp.linalg.norm(r - jnp.diag(jnp.diag(r)))
        left = (passes.resolved < size) & (passes.done < _MAX_PASSES)
        return (off > _TOLERANCE * jnp.linalg.norm(r)) & left

    def again(passes: _Passes) -> _Passes:
        start = passes.resolved
        turn = _eigenvectors(_trailing(passes.r, start), start)
        step, r = jnp.linalg.qr(passes.r @ turn)
        return _Passes(passes.q @ step, r, passes.v @ turn, _resolved(r, start), passes.done + 1)

    v = _eigenvectors(w, jnp.int32(0))
    q, r = jnp.linalg.qr(w @ v)
    first = _Passes(q, r, v, _resolved(r, jnp.int32(0)), 1)
    last = jax.lax.while_loop(unfinished, again, first)
    values = jnp.abs(jnp.diag(last.r))
    order = jnp.argsort(values, descending=True)
    return (last.q * _sign(last.r))[:, order], values[order], last.v[:, order]


def _trailing(r: jax.Array, start: jax.Array) -> jax.Array:
    """R with the rows and columns before `start` zero, its longest column of length one."""
    kept = jnp.arange(r.shape[0]) >= start
    block = r * (kept[:, None] & kept[None])
    largest = jnp.linalg.norm(block, axis=0).max()
    return block / jnp.where(largest > 0, largest, 1)


def _eigenvectors(block: jax.Array, start: jax.Array) -> jax.Array:
    """Of `block^T block`, by falling eigenvalue, after `start` unit vectors that are left alone."""
    size = block.shape[1]
    before = jnp.arange(size) < start
    # Far below every other eigenvalue, so that the two parts cannot mix.
    moments = block.T @ block - jnp.diag(before.astype(block.dtype))
    vectors = jnp.roll(jnp.linalg.eigh(moments)[1][:, ::-1], start, axis=1)
    vectors = jnp.where(before[:, None], 0, vectors)
    return jnp.where(before[None], jnp.eye(size, dtype=block.dtype), vectors)


def _resolved(r: jax.Array, start: jax.Array) -> jax.Array:
    """The number of leading rows that a pass has dealt with, more than `start` of them."""
    values = jnp.where(jnp.arange(r.shape[0]) >= start, jnp.abs(jnp.diag(r)), jnp.inf)
    small = values < _SPLIT * values.at[start].get(mode="clip")
    first_small = jnp.where(small.any(), small.argmax(), r.shape[0])
    return jnp.maximum(first_small, start + 1).astype(jnp.int32)


def _sign(r: jax.Array) -> jax.Array:
    """Turns columns so that the diagonal of R is positive, `[1, n]`."""
    return jnp.where(jnp.diag(r) < 0, -1.0, 1.0).astype(r.dtype)[None]
