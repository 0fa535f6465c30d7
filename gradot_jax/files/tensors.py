"""Reading and writing safetensors files; nothing else in the package calls that library."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to a safetensors file and verifies what was written.

    Arrays are made contiguous first: `safetensors.numpy.save_file` writes the memory of a
    transposed view as it lies.

    Args:
        path: the file; its folder exists.
        tensors: any numpy or JAX arrays by name, bfloat16 included.
        metadata: strings for the header; `{"format": "pt"}` makes transformers read the file.

    Raises:
        OSError: when the file cannot be written or reads back differently.
    """
    arrays = {name: np.ascontiguousarray(np.asarray(a)) for name, a in tensors.items()}
    safetensors.numpy.save_file(arrays, str(path), metadata=dict(metadata or {}))
    with safetensors.safe_open(str(path), "np") as file:
        for name, array in arrays.items():
            written = file.get_tensor(name)
            if written.dtype != array.dtype or written.tobytes() != array.tobytes():
                raise OSError(f"{path}: tensor {name} reads back differently from what was written")
