"""JSON read as if an adversary wrote it: bounded, unambiguous and finite."""

import json
import math
from pathlib import Path
from typing import Any

from gradot_jax.errors import InputError

MAX_BYTES = 16 * 2**20


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a file that holds one JSON object, of at most so many bytes.

    Raises:
        InputError: when the file is absent or too large, or for what `parse_json` refuses.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > max_bytes:
        raise InputError(f"{path}: larger than the {max_bytes} bytes expected of it")
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Parses one JSON object, in UTF-8; `where` names the source in errors.

    Raises:
        InputError: for anything but an object, a repeated key, NaN or an infinite number, nesting
            too deep to parse, or text that is not JSON.
    """
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON; ValueError when it holds NaN or an infinite number."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated!r} occurs twice")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    # The standard library reads 1e999 as infinity without asking `parse_constant`.
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"number {digits[:20]} is out of range")
    return number
