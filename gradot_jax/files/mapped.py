"""Tensors in files that are mapped into memory: found at once, read where they are touched.

A mapping takes addresses and no memory of the process. The system reads a page when it is looked
at and may drop it again, so a checkpoint need not fit beside what is computed from it. A file
must not be cut short while it is mapped; the system would end the process.
"""

import dataclasses
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.files.flax_msgpack import find_arrays
from gradot_jax.files.pages import release_pages
from gradot_jax.files.safetensors import TensorSpec, check_finite, copy_finite, read_layout


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a mapped file; a leaf in trees of JAX.

    Attributes:
        path: of the file.
        name: what it is called in messages.
        shape: its shape; of a transposed tensor, that after the transposition.
        dtype: as stored.
        pieces: its data, one-dimensional views of the file; more than one where a file of Flax
            holds it in chunks.
        transposed: whether rows of this tensor are columns of the stored one.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[np.ndarray, ...]
    transposed: bool = False

    @property
    def spec(self) -> TensorSpec:
        """Shape and dtype name."""
        return TensorSpec(self.shape, self.dtype.name)

    @property
    def T(self) -> "StoredTensor":
        """The transposed tensor; nothing is read."""
        return dataclasses.replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    @property
    def array(self) -> np.ndarray:
        """A read-only view of the file, or a copy where it is in chunks."""
        flat = self.pieces[0] if len(self.pieces) == 1 else np.concatenate(self.pieces)
        flat.flags.writeable = False
        return flat.reshape(self.shape[::-1]).T if self.transposed else flat.reshape(self.shape)

    def check_finite(self) -> None:
        """Raises InputError when it holds NaN or an infinite number."""
        for piece in self.pieces:
            check_finite(str(self.path), self.name, piece)
        release_pages(self.pieces)

    def read_into(self, target: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Copies a part of the tensor, cast to the target's dtype.

        Raises:
            InputError: when a number is not finite, before or after the cast.
        """
        copy_finite(str(self.path), self.name, self.array[index], target)
        release_pages(self.pieces)


def map_safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file.

    Raises:
        InputError: when the file is absent or damaged.
    """
    layout = read_layout(path)
    memory = map_file(path)
    return [
        _stored(path, memory, name, spec, [(offset, math.prod(spec.shape))])
        for name, (spec, offset) in layout.items()
    ]


def map_flax(path: Path) -> list[StoredTensor]:
    """The arrays of a msgpack file of Flax, named by their `/`-joined paths.

    Raises:
        InputError: when the file is absent or damaged, or holds anything else.
    """
    try:
        memory = map_file(path)
        found = find_arrays(memory)
    except ValueError as error:
        raise InputError(f"{path}: damaged or truncated Flax msgpack file: {error}") from None
    return [_stored(path, memory, *array) for array in found]


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, mapped; it must have some.

    Raises:
        InputError: when the file cannot be read.
        ValueError: when it is empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _stored(
    path: Path, memory: mmap.mmap, name: str, spec: TensorSpec, pieces: Sequence[tuple[int, int]]
) -> StoredTensor:
    dtype = jnp.dtype(spec.dtype)
    views = (np.ndarray((count,), dtype, memory, offset) for offset, count in pieces)
    return StoredTensor(path, name, spec.shape, dtype, tuple(views))
