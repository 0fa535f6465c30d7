"""GGUF, the files of llama.cpp: metadata by key and quantised tensors, read as a stranger's.

Nothing is believed before it is measured against the file: lengths, counts, offsets and shapes.
The values of tensors are computed by the `gguf` package, rows at a time.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.files.mapped import map_file
from gradot_jax.files.pages import release_pages
from gradot_jax.files.safetensors import copy_finite

T = TypeVar("T")

_HEADER_BYTES = 2**26
_MOST_DIMENSIONS = 4
_DEQUANTISED = 2**21
"""Elements whose values are computed together."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
"""How values are packed, by GGUF's numbers of their types."""

_STRING, _ARRAY = 8, 9
_NAMES = {str: "text", int: "a whole number in [0, 2^31)", float: "a finite number"}
_NAMES |= {bool: "true or false", list: "a list of texts", np.ndarray: "a list of numbers"}
_REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor in a mapped file.

    Attributes:
        path: of the file.
        name: in the file.
        shape: as numpy and torch count dimensions, the reverse of the file's order.
        kind: its quantisation, a `gguf.GGMLQuantizationType`.
        rows: its bytes, `[rows, bytes of a row]`.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: Any
    rows: np.ndarray

    def read(self, dtype: DTypeLike) -> np.ndarray:
        """The values, cast to a dtype; float32 holds those of every quantisation exactly.

        Raises:
            InputError: when a number is not finite, before or after the cast.
        """
        import gguf

        values = np.empty((len(self.rows), self.shape[-1]), dtype)
        step = max(_DEQUANTISED // self.shape[-1], 1)
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            with np.errstate(all="ignore"):
                exact = gguf.dequantize(self.rows[part], self.kind)
            copy_finite(str(self.path), self.name, exact, values[part])
        release_pages([self.rows])
        return values.reshape(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFFile:
    """What a file holds. It remembers which keys were read, so that none is passed over.

    Attributes:
        path: the file.
        metadata: numbers, booleans, texts, lists of texts and arrays of numbers, by key.
        tensors: by name.
        read: the keys that `get` was asked for.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    read: set[str] = dataclasses.field(default_factory=set)

    def get(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The value of a key; the default where there is none.

        Args:
            key: of the metadata.
            kind: str, int, float, bool, list (of texts) or `np.ndarray`.
            default: what an absent key means; without one it is required.

        Raises:
            InputError: when the key is absent and required, or its value of another kind.
        """
        self.read.add(key)
        if key not in self.metadata and default is not _REQUIRED:
            return default
        value = self.metadata.get(key, _REQUIRED)
        fits = type(value) is kind
        if fits and kind is int:
            fits = 0 <= value < 2**31
        elif fits and kind in (float, np.ndarray):
            fits = bool(np.isfinite(value).all())
        if not fits:
            raise self.refused(key, _NAMES[kind])
        return value

    def refused(self, key: str, expected: str) -> InputError:
        """What to raise for the value of a key."""
        shown = "absent" if key not in self.metadata else f"{self.metadata[key]!r:.60}"
        return InputError(f"{self.path}: {key} is {' '.join(shown.split())}, expected {expected}")

    def check_read(self, *prefixes: str) -> None:
        """Raises InputError for keys that begin so and nothing has asked for."""
        left = sorted(key for key in self.metadata.keys() - self.read if key.startswith(prefixes))
        if left:
            raise InputError(
                f"{self.path}: holds metadata that a checkpoint cannot carry: "
                f"{', '.join(f'{key!r:.80}' for key in left[:20])}"
            )


def open_gguf(path: Path) -> GGUFFile:
    """Reads the header of a file and maps its tensors.

    Raises:
        InputError: when the `gguf` package is absent; when the file is, or is damaged, truncated,
            of another version or in parts; or holds a tensor that the package cannot dequantise.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(
            f"{path}: reading GGUF takes the gguf package: pip install 'gradot_jax[gguf]'"
        ) from None
    try:
        header = _Header(path, map_file(path))
    except ValueError as error:
        raise InputError(f"{path}: not a GGUF file: {error}") from None
    if header.take(4) != b"GGUF":
        raise InputError(f"{path}: not a GGUF file: it does not begin with GGUF")
    version = header.number("I")
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF of version {version}, expected 2 or 3, little-endian")
    num_tensors, num_keys = header.number("Q"), header.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = header.text("a key")
        if key in metadata:
            raise InputError(f"{path}: key {key!r:.80} occurs twice")
        metadata[key] = header.value(key, header.number("I"))
    described = [header.tensor() for _ in range(num_tensors)]
    file = GGUFFile(path, metadata, {})
    alignment = file.get("general.alignment", int, 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise file.refused("general.alignment", "a power of two")
    if file.get("split.count", int, 0) > 1:
        raise file.refused("split.count", "a model in one file; merge its parts first")
    start = end = -(-header.position // alignment) * alignment
    known: set[Any] = set()
    for name, shape, number, offset in described:
        where = f"{path}: tensor {name!r:.80}"
        if name in file.tensors:
            raise InputError(f"{where} occurs twice")
        if number not in gguf.GGML_QUANT_SIZES:
            raise InputError(f"{where} is of an unknown type, {number}")
        kind = gguf.GGMLQuantizationType(number)
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % elements:
            raise InputError(f"{where} has rows of {shape[-1]}, expected blocks of {elements}")
        rows, width = math.prod(shape[:-1]), shape[-1] // elements * size
        if start + offset != end:
            raise InputError(f"{where} begins at {offset} of the data, expected {end - start}")
        if end + rows * width > len(header.data):
            raise InputError(f"{where} of shape {shape} goes beyond the end of the file")
        data = np.ndarray((rows, width), np.uint8, header.data, end)
        if kind not in known:
            _check_kind(gguf, where, kind, size)
            known.add(kind)
        file.tensors[name] = GGUFTensor(path, name, shape, kind, data)
        end += -(-rows * width // alignment) * alignment
    if end + alignment <= len(header.data):
        raise InputError(f"{path}: holds {len(header.data) - end} bytes beyond its last tensor")
    return file


def _check_kind(gguf, where: str, kind: Any, size: int) -> None:
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        raise InputError(f"{where} is of type {kind.name}, which is not dequantised") from None


@dataclasses.dataclass
class _Header:
    """The beginning of a file, read from front to back."""

    path: Path
    data: mmap.mmap
    position: int = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise InputError(f"{self.path}: truncated in its header, at byte {self.position}")
        if end > _HEADER_BYTES:
            raise InputError(f"{self.path}: a header beyond {_HEADER_BYTES} bytes is not read")
        taken, self.position = self.data[self.position : end], end
        return taken

    def number(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if code == "f" else value

    def text(self, what: str) -> str:
        start, data = self.position, self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: {what} is not UTF-8, at byte {start}") from None

    def value(self, key: str, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text(f"{key!r:.80}")
        inner = self.number("I") if kind == _ARRAY else None
        if inner == _STRING:
            return [self.text(f"{key!r:.80}") for _ in range(self.number("Q"))]
        if inner not in _SCALARS:
            raise InputError(f"{self.path}: {key!r:.80} is of type {kind}, {inner}; not read")
        dtype = np.dtype("<" + _SCALARS[inner])
        return np.frombuffer(self.take(self.number("Q") * dtype.itemsize), dtype)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset in the data."""
        name, dimensions = self.text("the name of a tensor"), self.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise InputError(f"{self.path}: tensor {name!r:.80} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        if not all(shape):
            raise InputError(f"{self.path}: tensor {name!r:.80} has the shape {shape}")
        return name, shape, self.number("I"), self.number("Q")
