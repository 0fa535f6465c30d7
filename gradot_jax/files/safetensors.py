"""Reading and writing safetensors files; nothing else in the package calls that library."""

import json
import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.files.strict_json import parse_json

FLOATS = ("float32", "float16", "bfloat16")
"""Dtypes in which weights are stored."""

_MAX_HEADER_BYTES = 32 * 2**20
_NUMPY_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
"""In the library's order, which is also the reverse of that in a file: large items first, so that
each tensor is aligned to its item size."""

_FORMAT_NAMES = {numpy: name for name, numpy in _NUMPY_NAMES.items()}
_BLOCK = 2**20
"""Elements copied or looked at together; what is temporary is no larger."""


class TensorSpec(NamedTuple):
    """Shape and dtype name of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to a safetensors file and verifies what was written.

    Args:
        path: the file; its folder exists.
        tensors: any numpy or JAX arrays by name, bfloat16 included.
        metadata: strings for the header; `{"format": "pt"}` makes transformers read the file.

    Raises:
        OSError: when the file cannot be written or reads back differently.
    """
    specs = {name: TensorSpec(a.shape, a.dtype.name) for name, a in tensors.items()}
    stream_tensors(path, specs, tensors.items(), metadata)


def stream_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays as they come, so that only one need be in memory, and verifies the file.

    Args:
        path: the file; its folder exists.
        specs: shape and dtype of every tensor to come, by name.
        tensors: names and arrays in any order.
        metadata: strings for the header.

    Raises:
        ValueError: when other tensors come than were announced.
        OSError: when the file cannot be written or reads back differently.
    """
    header, offsets = _layout(specs, metadata)
    sums: dict[str, int] = {}
    with path.open("wb") as file:
        file.write(header)
        for name, array in tensors:
            data = _bytes(_announced(specs, name, array))
            file.seek(offsets[name])
            file.write(data)
            sums[name] = zlib.crc32(data)
    if absent := sorted(specs.keys() - sums.keys()):
        raise ValueError(f"{path}: announced, but not written: {', '.join(absent)}")
    for name, written in iterate_tensors(path):
        same = (written.shape, written.dtype.name) == specs[name]
        if not same or zlib.crc32(_bytes(written)) != sums[name]:
            raise OSError(f"{path}: tensor {name} reads back differently from what was written")


def _announced(specs: Mapping[str, TensorSpec], name: str, array: np.ndarray) -> np.ndarray:
    if specs.get(name) != (array.shape, array.dtype.name):
        raise ValueError(
            f"tensor {name}: got {array.dtype.name} {array.shape}, announced {specs.get(name)}"
        )
    # The memory of a transposed view does not lie as the file wants it.
    return np.asarray(array, order="C")


def _layout(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """Header of a file, its length included, and where in the file each tensor begins."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    order = list(_FORMAT_NAMES)
    for name in sorted(specs, key=lambda n: (-order.index(specs[n].dtype), n)):
        shape, dtype = specs[name]
        starts[name] = end
        end += math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {
            "dtype": _FORMAT_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {name: len(prefix) + start for name, start in starts.items()}


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """Shapes and dtypes of the tensors in a file, without reading their data.

    Raises:
        InputError: when the file is absent, truncated, overlong or inconsistent, names a tensor
            twice, or holds a dtype that numpy has not.
    """
    return {name: spec for name, (spec, _) in read_layout(path).items()}


def read_layout(path: Path) -> dict[str, tuple[TensorSpec, int]]:
    """What `read_specs` reads, and the byte of the file at which each tensor begins.

    Raises:
        InputError: as `read_specs`.
    """
    header, start = _read_header(path)
    header.pop("__metadata__", None)
    _open(path)
    unknown = sorted(name for name, e in header.items() if e["dtype"] not in _NUMPY_NAMES)
    if unknown:
        raise InputError(f"{path}: unknown dtype of {_listed(list(map(_printable, unknown)))}")
    return {
        name: (
            TensorSpec(tuple(entry["shape"]), _NUMPY_NAMES[entry["dtype"]]),
            start + entry["data_offsets"][0],
        )
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
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Collection[str] = FLOATS
) -> dict[str, np.ndarray]:
    """Reads a file that must hold exactly tensors of these names and shapes, all finite.

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
    blocks = _blocks(np.atleast_1d(array))
    number = sum(block.size - np.count_nonzero(np.isfinite(block)) for block in blocks)
    if number:
        raise InputError(
            f"{where}: tensor {name} holds NaN or Inf at {number} of {array.size} "
            "places, expected finite numbers"
        )


def copy_finite(where: str, name: str, source: np.ndarray, target: np.ndarray) -> None:
    """Copies an array into another of the same shape, cast to its dtype.

    Raises:
        InputError: when a number is not finite, before or after the cast.
    """
    pairs = zip(_blocks(np.atleast_1d(source)), _blocks(np.atleast_1d(target)), strict=True)
    for read, written in pairs:
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(written, read, casting="unsafe")
        if not np.isfinite(written).all():
            check_finite(where, name, source)
            raise InputError(
                f"{where}: tensor {name} holds numbers out of the range of {target.dtype}; "
                "choose bfloat16 or float32"
            )


def cast_finite(where: str, name: str, array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """A copy in another dtype; InputError as `copy_finite`."""
    target = np.empty(array.shape, jnp.dtype(dtype))
    copy_finite(where, name, array, target)
    return target


def fitting_tensors(
    where: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, DTypeLike],
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors as they come, if they are exactly those of some shapes, each cast to its dtype.

    Raises:
        InputError: for a name or shape that differs, or a number not finite in its dtype.
    """
    left = dict(shapes)
    for name, array in tensors:
        shape = left.pop(name, None)
        if shape != array.shape:
            raise InputError(
                f"{where}: tensor {name} has shape {array.shape}, the config asks for {shape}"
            )
        yield name, cast_finite(where, name, array, dtypes.get(name, array.dtype))
    if left:
        raise InputError(f"{where}: the weights lack {', '.join(sorted(left)[:8])}")


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(_BLOCK // max(math.prod(array.shape[1:]), 1), 1)
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def float_dtype(dtype: DTypeLike) -> np.dtype:
    """The numpy dtype of anything that `jnp.dtype` takes; InputError for one not in `FLOATS`."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOATS:
        name = dtype if found is None else found.name
        raise InputError(f"dtype {name!r} is not one of {', '.join(FLOATS)}")
    # In this machine's byte order.
    return jnp.dtype(found.name)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _read_header(path: Path) -> tuple[dict, int]:
    """The header, parsed, and its end."""
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
    return parse_json(header, f"{path} (header)"), len(prefix) + length


def _open(path: Path):
    # Opening verifies that the tensors tile the rest of the file: no hole, overlap or remainder.
    try:
        return safetensors.safe_open(str(path), "np")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or truncated safetensors file: {error}") from None
