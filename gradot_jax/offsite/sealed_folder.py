"""Folders that travel between the parties: flat, listed in full by a manifest, and verified.

A manifest lists every other file with size and SHA-256. On the way in nothing is parsed before
all of that holds, so that a damaged or altered file meets a hash and not a parser.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.files.digest import bytes_digest, file_digest, tensors_digest
from gradot_jax.files.folder import regular_file
from gradot_jax.files.safetensors import (
    FLOATS,
    TensorSpec,
    cast_finite,
    fitting_tensors,
    float_dtype,
    read_tensors,
    stream_tensors,
)
from gradot_jax.files.strict_json import parse_json, write_json
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.models.split import Adapter, AdapterSpec, adapter_of
from gradot_jax.models.tensors import Schema, adapter_to_tensors, shell_to_tensors
from gradot_jax.offsite.manifest import MIXED, FileRecord

MANIFEST = "manifest.json"
CARD = "README.md"
ADAPTER_FILE = "adapter.safetensors"
CARD_BYTES = 2**20

_MANIFEST_BYTES = 16 * 2**20
_HEADER_BYTES_PER_TENSOR = 1024


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and digest of every file of a folder that is about to be sealed."""
    return {
        path.name: FileRecord(file_digest(path), path.stat().st_size)
        for path in sorted(folder.iterdir())
    }


def write_manifest(folder: Path, values: Mapping[str, Any]) -> str:
    """Writes the manifest into a folder and returns its SHA-256."""
    write_json(folder / MANIFEST, values)
    return file_digest(folder / MANIFEST)


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a folder as parsed JSON, and the SHA-256 of the bytes parsed.

    Raises:
        InputError: when there is none, or it is no strict JSON.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path = regular_file(folder, MANIFEST)
    with path.open("rb") as file:
        text = file.read(_MANIFEST_BYTES + 1)
    if len(text) > _MANIFEST_BYTES:
        raise InputError(f"{path}: larger than {_MANIFEST_BYTES} bytes")
    return parse_json(text, str(path)), bytes_digest(text)


@contextlib.contextmanager
def verified_folder(
    folder: Path, files: Mapping[str, FileRecord], limits: Mapping[str, int]
) -> Iterator[None]:
    """Verifies a folder on entry; on exit, that it did not change while it was read.

    Args:
        folder: the folder.
        files: what its manifest lists.
        limits: names that such a folder may hold, with the most bytes of each.

    Raises:
        InputError: for a file that is not listed, not there, not allowed, no regular file, too
            large, or of another size or digest than listed.
    """
    check_listing(folder, files)
    for name, record in files.items():
        if name not in limits:
            raise InputError(f"{folder / name}: a file of this name has no place here")
        size = (folder / name).stat().st_size
        if size != record.bytes or size > limits[name]:
            raise InputError(
                f"{folder / name}: {size} bytes, the manifest says {record.bytes} and at most "
                f"{limits[name]} are expected"
            )
    stamps = {name: _stamp(folder / name) for name in files}
    for name, record in files.items():
        if file_digest(folder / name) != record.sha256:
            raise InputError(f"{folder / name}: altered or damaged, its SHA-256 is not the listed")
    yield
    for name, stamp in stamps.items():
        if _stamp(folder / name) != stamp:
            raise InputError(f"{folder / name}: changed while it was read")


def check_listing(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raises InputError unless a folder holds exactly the listed regular files and a manifest."""
    present = set(os.listdir(folder))
    listed = {MANIFEST, *files}
    missing, extra = sorted(listed - present), sorted(present - listed)
    if missing or extra:
        raise InputError(f"{folder}: files missing {missing}, files not listed {extra[:8]}")
    for name in sorted(listed):
        regular_file(folder, name)
        if (folder / name).is_symlink():
            raise InputError(f"{folder / name}: is a symbolic link, expected a regular file")


def digest_matches(folder: Path, name: str, record: FileRecord) -> bool:
    """Whether a listed file is there, regular, and has the size and digest listed."""
    path = folder / name
    if path.is_symlink() or not path.is_file() or path.stat().st_size != record.bytes:
        return False
    return file_digest(path) == record.sha256


def tensor_file_limit(schema: Schema, dtype: str) -> int:
    """The most bytes that a file of these tensors can have, in a dtype or `MIXED`."""
    itemsize = 4 if dtype == MIXED else jnp.dtype(dtype).itemsize
    data = sum(int(np.prod(shape, dtype=object)) for shape in schema.values()) * itemsize
    return data + (len(schema) + 1) * _HEADER_BYTES_PER_TENSOR


def write_stored(
    path: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    schema: Schema,
    dtypes: Mapping[str, DTypeLike],
) -> None:
    """Writes tensors that fit a schema, each cast to its dtype.

    Raises:
        InputError: for a name or shape that differs from the schema, or a number that is not
            finite in the stored dtype.
    """
    stored = {name: float_dtype(dtype) for name, dtype in dtypes.items()}
    specs = {name: TensorSpec(shape, stored[name].name) for name, shape in schema.items()}
    stream_tensors(path, specs, fitting_tensors(path.name, tensors, schema, stored))


def read_stored(
    path: Path, schema: Schema, stored: str, dtype: DTypeLike | None
) -> dict[str, np.ndarray]:
    """Reads tensors that fit a schema exactly, cast to a dtype unless it is None.

    Raises:
        InputError: when the file is damaged, holds other tensors, or a number that is not finite.
    """
    tensors = read_tensors(path, schema, FLOATS if stored == MIXED else (stored,))
    if dtype is None or float_dtype(dtype).name == stored:
        return tensors
    return {name: cast_finite(str(path), name, array, dtype) for name, array in tensors.items()}


def _stamp(path: Path) -> tuple[int, ...]:
    # The change time, unlike the modification time, cannot be set back.
    status = path.lstat()
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns


def base_digest(config: ModelConfig, params: Params, split: AdapterSpec) -> str:
    """SHA-256 of what an emulator of this model and split ships unchanged.

    By it the model owner knows, at plug-in, which model and split an adapter is for. The middle
    does not enter: a digest of it would let anyone check a guess at it. The model may be in any
    dtype that holds it exactly.
    """
    return shipped_digest(config, params.shell, adapter_of(params, split))


def shipped_digest(config: ModelConfig, shell: Any, adapter: Adapter) -> str:
    """The same digest from the original shell and outer blocks: split, names, shapes, numbers."""
    split = adapter.split
    tensors = chain(shell_to_tensors(config, shell), adapter_to_tensors(config, adapter))
    return tensors_digest([split.num_bottom, split.num_top, split.inner], tensors)
