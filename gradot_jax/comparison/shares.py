"""How much is shipped, and how much of the original can be read off what is shipped."""

from collections.abc import Iterator

import jax
import numpy as np

from gradot_jax.models.opt.params import Params, Shared, count_params
from gradot_jax.offsite.emulator import Emulator


def share_shipped(params: Params, emulator: Emulator) -> float:
    """Parameters of an emulator over those of the original; what runs twice counts once."""
    return count_params(emulator) / count_params(params)


def share_verbatim(params: Params, emulator: Emulator) -> float:
    """Share of the original's parameters that are shipped unchanged, read from the arrays.

    An array of the original counts where an array of the same site holds the same bits, and of a
    matrix also the rows or columns that a matrix of the same site holds: pruned MLPs keep whole
    channels. Where in the model the shipped array runs does not matter.
    """
    shipped: dict[str, list[np.ndarray]] = {}
    for name, array in _arrays(emulator.shell, (*emulator.adapter.stacks, *emulator.middle)):
        shipped.setdefault(name, []).append(array)
    known = {name: _Known(arrays) for name, arrays in shipped.items()}
    found = sum(
        known[name].count(array)
        for name, array in _arrays(params.shell, params.segments)
        if name in known
    )
    return found / count_params(params)


class _Known:
    """Shipped arrays of one site, by digests of their contents."""

    def __init__(self, arrays: list[np.ndarray]):
        matrices = [array for array in arrays if array.ndim == 2]
        self._whole = {_digest(array) for array in arrays}
        self._rows = {_digest(row) for matrix in matrices for row in matrix}
        self._columns = {_digest(column) for matrix in matrices for column in matrix.T}

    def count(self, array: np.ndarray) -> int:
        """Parameters of an original array that are among the shipped ones."""
        if _digest(array) in self._whole:
            return array.size
        if array.ndim != 2:
            return 0
        rows = sum(_digest(row) in self._rows for row in array) * array.shape[1]
        columns = sum(_digest(column) in self._columns for column in array.T) * array.shape[0]
        return max(rows, columns)


def _digest(array: np.ndarray) -> int:
    return hash((array.shape, array.tobytes()))


def _arrays(shell, segments) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of single layers, named by site alone."""
    for path, leaf in jax.tree.leaves_with_path(shell):
        yield f"shell{jax.tree_util.keystr(path)}", np.asarray(leaf)
    for segment in segments:
        stored = segment.blocks if isinstance(segment, Shared) else segment
        for path, leaf in jax.tree.leaves_with_path(stored):
            for array in np.asarray(leaf):
                yield jax.tree_util.keystr(path), array
