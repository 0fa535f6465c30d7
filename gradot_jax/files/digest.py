"""SHA-256 of files, JSON values and trees of arrays; nothing else in the package hashes."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradot_jax.files.pages import release_pages
from gradot_jax.parallel import to_host


def bytes_digest(data: bytes) -> str:
    """Of bytes, 64 hexadecimal digits as all digests here."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's contents; a symbolic link is not followed."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources_digest(folders: Iterable[Path]) -> str:
    """Of the names and contents of the Python files in folders, at any depth."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder.parent).as_posix()
            digest.update(f"{name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def json_digest(values: Any) -> str:
    """Of JSON values, whatever the order of their keys."""
    return bytes_digest(json.dumps(values, sort_keys=True).encode())


def leaf_name(path: Any) -> str:
    """The dotted name of a leaf of a tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def tree_digest(tree: Any) -> str:
    """Of the names, shapes, types and contents of a tree of arrays; empty ones are left out."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not leaf.size:
            continue
        array = np.ascontiguousarray(to_host(leaf))
        digest.update(f"{leaf_name(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
        if isinstance(leaf, np.ndarray):
            release_pages([leaf])
    return digest.hexdigest()


def tensors_digest(header: Any, tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Of JSON values, then of named arrays, over their float32 bytes.

    Casting from float16 and bfloat16 is exact, so the dtype in which a model was loaded does not
    matter.
    """
    digest = hashlib.sha256(json.dumps(header).encode())
    for name, array in tensors:
        digest.update(json.dumps([name, array.shape]).encode())
        digest.update(np.ascontiguousarray(array, dtype=np.float32))
    return digest.hexdigest()
