"""Results as JSON files with a record of the environment that made them."""

import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import gradot_jax
from gradot_jax.errors import InputError
from gradot_jax.files.digest import sources_digest

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
_PACKAGE = Path(gradot_jax.__file__).parent
_NUMERICAL = "linalg nn curvature compression models calibration training methods".split()
"""Folders of the package that compute: from arrays to methods and training."""


def environment() -> dict[str, Any]:
    """Versions and devices; nothing that names the machine, its user or its folders.

    `code` is a digest of the sources of what is computed, not of how it is measured; `commit` is
    that of the checkout which the package lies in, if it lies in one.
    """
    device = jax.devices()[0]
    return {
        "gradot_jax": gradot_jax.__version__,
        "commit": _commit(),
        "code": code_digest(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _LIBRARIES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_cores": os.cpu_count(),
    }


@functools.cache
def code_digest() -> str:
    """Of the sources of what is computed, 16 hexadecimal digits."""
    return sources_digest([_PACKAGE / folder for folder in _NUMERICAL])[:16]


@functools.cache
def _commit() -> str | None:
    if not (_PACKAGE.parent / ".git").exists():
        return None
    asked = ("git", "-C", str(_PACKAGE.parent), "rev-parse", "--short=12", "HEAD")
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_result(path: str | Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON; the file appears whole or not at all.

    Numbers that JSON lacks are written as the strings `nan`, `inf` and `-inf`, which `float`
    reads: a diverged model is a result too.

    Args:
        path: the file; its folder is made when missing, and an older file is replaced.
        result: strings, numbers, lists and dictionaries.

    Raises:
        TypeError: when the result holds anything else.
        InputError: when the file cannot be written.
    """
    path = Path(path)
    text = json.dumps(_plain(result), indent=2, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value
