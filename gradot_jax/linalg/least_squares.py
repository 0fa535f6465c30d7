"""Least squares in the norm of a second moment, in float64 on the host."""

import numpy as np


def refit_rows(
    second_moment: np.ndarray, kernel: np.ndarray, kept: np.ndarray, damping: float
) -> np.ndarray:
    """Refits the kept rows of a kernel so that they stand in for all of them.

    With `A = E[x x^T]`, k the kept and r the removed rows, returns the minimiser over V of

        E || x_k V - x W ||^2 + ridge || V - W_k ||^2,   V = W_k + (A_kk + ridge I)^-1 A_kr W_r

    The ridge pulls towards the original weights, not towards zero.

    Args:
        second_moment: A, `[F, F]`.
        kernel: W, `[F, D]`.
        kept: indices of the kept rows, `[C]`.
        damping: ridge as a multiple of the mean diagonal of `A_kk`.

    Returns:
        V, `[C, D]`, float64.

    Raises:
        ValueError: when the result is not finite.
    """
    a = np.asarray(second_moment, np.float64)
    w = np.asarray(kernel, np.float64)
    removed = np.setdiff1d(np.arange(a.shape[0]), kept)
    inner = a[np.ix_(kept, kept)]
    inner = inner + _ridge(inner, damping) * np.eye(len(kept))
    return w[kept] + _solve(inner, a[np.ix_(kept, removed)] @ w[removed])


def refit_right(
    second_moment: np.ndarray, kernel: np.ndarray, left: np.ndarray, damping: float
) -> np.ndarray:
    """Refits the right factor of a low-rank kernel in the norm of its inputs.

    Args:
        second_moment: A, `[D_in, D_in]`.
        kernel: W, `[D_in, D_out]`.
        left: L, `[D_in, R]`.
        damping: ridge as a multiple of the mean diagonal of `A`.

    Returns:
        `(L^T B L)^-1 L^T B W` with `B = A + ridge I`, `[R, D_out]`, float64: the minimiser of
        `tr((W - L V)^T B (W - L V))`.

    Raises:
        ValueError: when the result is not finite.
    """
    a = np.asarray(second_moment, np.float64)
    a = a + _ridge(a, damping) * np.eye(a.shape[0])
    basis = np.asarray(left, np.float64)
    weighted = basis.T @ a
    return _solve(weighted @ basis, weighted @ np.asarray(kernel, np.float64))


def _ridge(matrix: np.ndarray, damping: float) -> float:
    mean = float(np.trace(matrix)) / max(matrix.shape[0], 1)
    return damping * (mean if mean > 0 else 1.0)


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    try:
        solution = np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError:
        # Kept components of singular value zero make it singular; every solution fits as well.
        solution = np.linalg.lstsq(matrix, right, rcond=None)[0]
    if not np.isfinite(solution).all():
        raise ValueError(f"least squares of size {matrix.shape[0]} gave a non-finite solution")
    return solution
