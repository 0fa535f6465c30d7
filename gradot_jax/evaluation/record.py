"""Results as JSON files with a record of the environment that made them."""

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import gradot_jax
from gradot_jax.errors import InputError

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def environment() -> dict[str, Any]:
    """Versions and devices; nothing that names the machine, its user or its folders."""
    device = jax.devices()[0]
    return {
        "gradot_jax": gradot_jax.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _LIBRARIES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_cores": os.cpu_count(),
    }


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
