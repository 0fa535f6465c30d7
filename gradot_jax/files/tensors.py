"""Reading and writing safetensors files; nothing else in the package calls that library."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import parse_json

FLOATS = ("float32", "float16", "bfloat16")
"""Dtypes in which weights are stored."""

_MAX_HEADER_BYTES = 32 * 2**20
_NUMPY_NAMES = {
    "BOOL": "bool",
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
}


class TensorSpec(NamedTuple):
    """Shape and dtype name of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


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
    arrays = {name: np.asarray(a, order="C") for name, a in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.numpy.save_file(arrays, str(path), metadata=dict(metadata or {}))
    except safetensors.SafetensorError as error:
        # The library tells a full disk from other failures only in its text.
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else 0, str(error), str(path)) from error
    # The library makes the file readable by its owner alone, whatever the umask.
    path.chmod(mode)
    for name, written in iterate_tensors(path):
        array = arrays[name]
        same = (written.shape, written.dtype) == (array.shape, array.dtype)
        if not same or not np.array_equal(_bytes(written), _bytes(array)):
            raise OSError(f"{path}: tensor {name} reads back differently from what was written")


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """Shapes and dtypes of the tensors in a file, without reading their data.

    Raises:
        InputError: when the file is absent, truncated, overlong or inconsistent, names a tensor
            twice, or holds a dtype that numpy has not.
    """
    header = _read_header(path)
    header.pop("__metadata__", None)
    _open(path)
    unknown = sorted(name for name, e in header.items() if e["dtype"] not in _NUMPY_NAMES)
    if unknown:
        raise InputError(f"{path}: unknown dtype of {_listed(list(map(_printable, unknown)))}")
    return {
        name: TensorSpec(tuple(entry["shape"]), _NUMPY_NAMES[entry["dtype"]])
        for name, entry in header.items()
    }


def iterate_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a file one at a time, each an array of its own.

    Raises:
        InputError: when the file is absent or damaged.
    """
    file = _open(path)
    for name in file.keys():  # noqa: SIM118 - the handle is no mapping
        try:
            array = file.get_tensor(name)
        except (safetensors.SafetensorError, ValueError) as error:
            raise InputError(f"{path}: tensor {name} cannot be read: {error}") from None
        yield name, array


def read_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Collection[str] = FLOATS,
) -> dict[str, np.ndarray]:
    """Reads a file that must hold exactly the expected tensors, all finite.

    Args:
        path: the file.
        shapes: expected shape of every tensor, by name.
        dtypes: names of the dtypes allowed.

    Raises:
        InputError: as `read_specs`, `check_specs` and `check_finite`; shapes are compared before
            any data is read.
    """
    check_specs(str(path), read_specs(path), shapes, dtypes)
    tensors = dict(iterate_tensors(path))
    for name, array in tensors.items():
        check_finite(str(path), name, array)
    return tensors


def check_specs(
    where: str,
    specs: Mapping[str, TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Collection[str] = FLOATS,
) -> None:
    """Compares what a file holds with what is expected, and reports every difference at once.

    Raises:
        InputError: when a name is missing or unexpected, or a shape or dtype differs.
    """
    both = sorted(specs.keys() & shapes.keys())
    problems = {
        "missing": sorted(shapes.keys() - specs.keys()),
        "unexpected": list(map(_printable, sorted(specs.keys() - shapes.keys()))),
        "wrong shape": [
            f"{name} (got {specs[name].shape}, expected {tuple(shapes[name])})"
            for name in both
            if specs[name].shape != tuple(shapes[name])
        ],
        f"wrong dtype (expected {' or '.join(sorted(dtypes))})": [
            f"{name} (got {specs[name].dtype})" for name in both if specs[name].dtype not in dtypes
        ],
    }
    found = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
    if found:
        raise InputError(f"{where}: tensors differ from those expected; " + "; ".join(found))


def _printable(name: str) -> str:
    # A name in a file is the other party's: no control characters, and no end of it.
    return name if name.isprintable() and len(name) <= 200 else repr(name[:200])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 100} more" if len(names) > 100 else ""
    return ", ".join(names[:100]) + more


def check_finite(where: str, name: str, array: np.ndarray) -> None:
    """Raises InputError when an array holds NaN or an infinite number."""
    finite = np.isfinite(array)
    if not finite.all():
        raise InputError(
            f"{where}: tensor {name} holds NaN or Inf at {int((~finite).sum())} of {array.size} "
            "places, expected finite numbers"
        )


def copy_finite(where: str, name: str, source: np.ndarray, target: np.ndarray) -> None:
    """Copies an array into another of the same shape, cast to its dtype.

    Raises:
        InputError: when a number is not finite, before or after the cast.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(target, source, casting="unsafe")
    if not np.isfinite(target).all():
        check_finite(where, name, source)
        raise InputError(
            f"{where}: tensor {name} holds numbers out of the range of {target.dtype}; "
            "choose bfloat16 or float32"
        )


def float_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name in `FLOATS`; InputError for any other name."""
    if name not in FLOATS:
        raise InputError(f"dtype {name!r} is not one of {', '.join(FLOATS)}")
    return jnp.dtype(name)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _read_header(path: Path) -> dict:
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > _MAX_HEADER_BYTES:
                raise InputError(f"{path}: not a safetensors file, or truncated in its header")
            header = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(header) < length:
        raise InputError(f"{path}: truncated in its header")
    return parse_json(header, f"{path} (header)")


def _open(path: Path):
    # Opening verifies that the tensors tile the rest of the file: no hole, overlap or remainder.
    try:
        return safetensors.safe_open(str(path), "np")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or truncated safetensors file: {error}") from None
