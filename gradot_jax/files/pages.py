"""Pages of mapped files that are looked at and let go of."""

import mmap
from collections.abc import Iterable

import numpy as np


def release_pages(arrays: Iterable[np.ndarray]) -> None:
    """Lets go of the pages of arrays that are views of mapped files; a look reads them again."""
    mappings = {id(m): m for array in arrays if (m := _mapping(array)) is not None}
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapping in mappings.values():
            mapping.madvise(mmap.MADV_DONTNEED)


def _mapping(array: object) -> mmap.mmap | None:
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None
