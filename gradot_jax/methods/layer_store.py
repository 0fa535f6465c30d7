"""Layers that a compression is done with: in memory, or in a folder from which it goes on.

A layer is arrays by name and JSON values. In a folder each is a folder of its own that appears
whole or not at all; beside them lies what the compression was of, so that no other goes on there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.files.folder import output_folder
from gradot_jax.files.mapped import map_safetensors
from gradot_jax.files.safetensors import write_tensors
from gradot_jax.files.strict_json import read_json, write_json
from gradot_jax.parallel import is_writer, sync

_IDENTITY = "compression.json"
_ARRAYS = "arrays.safetensors"
_VALUES = "values.json"


class StoredLayer(NamedTuple):
    """What is kept of a layer.

    Attributes:
        arrays: on the host.
        values: JSON.
    """

    arrays: dict[str, np.ndarray]
    values: dict[str, Any]


class LayerStore:
    """Finished layers by their index in the middle."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any] | None = None):
        """Opens a store.

        Args:
            folder: where layers are kept; None keeps them in memory.
            identity: JSON values that must be equal for a compression to go on; None for a
                folder that is deleted at the end.

        Raises:
            InputError: when the folder is that of another compression, or of none.
        """
        self._folder = folder
        self._memory: dict[int, StoredLayer] = {}
        if folder is not None and identity is not None:
            _claim(folder, identity)

    @property
    def finished(self) -> set[int]:
        """Indices of the layers that are there."""
        if self._folder is None:
            return set(self._memory)
        return {int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()}

    def save(self, layer: int, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
        """Keeps a layer; with several processes all of them call this, and one writes."""
        if self._folder is None:
            self._memory[layer] = StoredLayer(dict(arrays), dict(values))
            return
        if is_writer():
            with output_folder(self._folder / f"{layer:04d}") as path:
                write_tensors(path / _ARRAYS, arrays)
                write_json(path / _VALUES, dict(values))
        sync(f"layer {layer}")

    def load(self, layer: int) -> StoredLayer:
        """A finished layer; of one in a folder the arrays are views of its file.

        Raises:
            InputError: when its files are damaged.
        """
        if self._folder is None:
            return self._memory[layer]
        path = self._folder / f"{layer:04d}"
        arrays = {tensor.name: tensor.array for tensor in map_safetensors(path / _ARRAYS)}
        return StoredLayer(arrays, read_json(path / _VALUES))


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    known, identity = folder / _IDENTITY, json.loads(json.dumps(identity))
    new = not known.is_file()
    if not new:
        held = read_json(known)
        differing = sorted(key for key in held | identity if held.get(key) != identity.get(key))
        if differing:
            raise InputError(
                f"{folder}: holds layers of another compression, with other {', '.join(differing)}"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: expected the finished layers of a compression, or nothing")
    sync("finished layers read")
    if new and is_writer():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, identity)
    sync("finished layers claimed")


def pack(name: str, tree: Any) -> dict[str, np.ndarray]:
    """Arrays of nested named tuples and dictionaries, by dotted names; None is left out."""
    if tree is None:
        return {}
    if not (hasattr(tree, "_asdict") or isinstance(tree, dict)):
        return {name: np.asarray(tree)}
    parts = tree if isinstance(tree, dict) else tree._asdict()
    packed = [pack(f"{name}.{key}", part) for key, part in parts.items()]
    return {key: array for part in packed for key, array in part.items()}


def unpack(kind: Any, name: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """What `pack` made arrays of: a named tuple of a kind, a dictionary, or an array or None.

    Args:
        kind: the named tuple's class, whose hints say what its fields are.
        name: given to `pack`; empty for names without a first part.
        arrays: by name.
    """
    prefix = f"{name}." if name else ""
    if get_origin(kind) is dict:
        keys = dict.fromkeys(n[len(prefix) :].split(".")[0] for n in arrays if n.startswith(prefix))
        return {key: unpack(get_args(kind)[1], prefix + key, arrays) for key in keys}
    if hasattr(kind, "_fields"):
        hints = get_type_hints(kind).items()
        return kind(**{field: unpack(hint, prefix + field, arrays) for field, hint in hints})
    optional = [part for part in get_args(kind) if hasattr(part, "_fields") or get_origin(part)]
    if optional and any(n.startswith(prefix) for n in arrays):
        return unpack(optional[0], name, arrays)
    return arrays.get(name)
