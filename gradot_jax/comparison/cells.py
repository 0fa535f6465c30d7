"""Finished parts of a comparison on disk: what was measured, by what, and on what it depends.

A cell is one small JSON file. Its name ends in a digest of its settings, which are everything that
its result depends on but the program, so other settings are other cells, and cells that others
measured can be put beside one's own. The program is on record in each.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from gradot_jax.errors import InputError
from gradot_jax.evaluation.record import environment, write_result
from gradot_jax.files.digest import json_digest
from gradot_jax.files.strict_json import read_json

_NOT_IN_JSON = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class NotThere(Exception):
    """A cell that has not been computed, in a store that computes none."""


class CellStore:
    """The cells of one folder, which several processes may fill; its locks lie beside it.

    Args:
        folder: made if need be.
        computes: whether what is missing is computed; else it is `NotThere`.

    Attributes:
        computed: how many cells this store has computed.
    """

    def __init__(self, folder: Path, *, computes: bool = True):
        self.folder, self.computes, self.computed = folder, computes, 0
        if computes:
            folder.mkdir(parents=True, exist_ok=True)

    def lock(self, name: str, *, wait: bool = True) -> FileLock:
        """A lock that one process holds at a time; without `wait` taking it raises Timeout."""
        folder = self.folder.parent / "locks"
        folder.mkdir(exist_ok=True)
        return FileLock(folder / f"{name}.lock", timeout=-1 if wait else 0)

    def path(self, kind: str, where: Mapping[str, Any], settings: Mapping[str, Any]) -> Path:
        """File of a cell: its kind and coordinates, for people, and a digest of its settings."""
        named = [f"{value:g}" if isinstance(value, float) else value for value in where.values()]
        name = "-".join(str(part) for part in (kind, *named) if part is not None)
        return self.folder / f"{name}-{json_digest(settings)[:12]}.json"

    def get(
        self,
        kind: str,
        where: Mapping[str, Any],
        settings: Mapping[str, Any],
        compute: Callable[[], Mapping[str, Any]],
    ) -> dict[str, Any]:
        """A cell, computed and written if it is not there.

        Another process that computes it is waited for.

        Args:
            kind: of cell.
            where: coordinates: strings, numbers and None by name.
            settings: JSON values, everything that the result depends on but the program.
            compute: makes the result, JSON values.

        Returns:
            The file's values: `cell`, the coordinates, `result`, `seconds`, `environment` and
            `settings`.

        Raises:
            InputError: when the file is no cell, or one of other settings.
            NotThere: when it is not there and none is computed.
        """
        path = self.path(kind, where, settings)
        if not path.is_file():
            if not self.computes:
                raise NotThere(path.name)
            with self.lock(path.stem):
                if not path.is_file():
                    self._write(path, kind, where, settings, compute)
        # Read back, so that a first run and a resumed one go on with the same numbers.
        return self._read(path, settings)

    def _write(self, path, kind, where, settings, compute) -> None:
        began = time.perf_counter()
        self.computed += 1
        result = compute()
        seconds = round(time.perf_counter() - began, 2)
        made = {"result": result, "seconds": seconds, "environment": environment()}
        write_result(path, {"cell": kind, **where, **made, "settings": settings})

    def _read(self, path: Path, settings: Mapping[str, Any]) -> Any:
        try:
            cell = read_json(path)
        except InputError as error:
            raise InputError(f"not a cell of a comparison, remove it: {error}") from None
        cell["result"] = _restored(cell.get("result"))
        if fault := _fault(cell):
            raise InputError(f"{path}: not a cell of a comparison, {fault}; remove it")
        if cell["settings"] != json.loads(json.dumps(settings)):
            raise InputError(
                f"{path}: holds a cell of other settings than its name says; remove it"
            )
        return cell


_COMPRESSION = "share_shipped share_verbatim gradient_cosine gradient_relative_error loss_gap"
_RUN = {"development_loss", "best_step", "seconds"}
_NEEDED = {
    "trial": {"development_loss"},
    "run": _RUN,
    "again": _RUN,
    "compression": {*_COMPRESSION.split(), "seconds", "adapter", "kept"},
    "probe": {"plug_in_gain", "emulator_gain", "moved_relative_error"},
}
"""What the results of a kind of cell have; metrics by name are on top."""
_OTHERS = {"adapter": dict, "kept": list, "diverged": str}
"""Values of results that are neither numbers nor metrics."""


def _fault(cell: Mapping[str, Any]) -> str | None:
    """What is wrong with a cell, if anything: others may have written it."""
    parts = [name for name in ("settings", "result", "environment") if not _is_object(cell, name)]
    if parts:
        return f"lacks {', '.join(parts)}"
    if not isinstance(cell["environment"].get("code"), str):
        return "lacks the code that made it"
    result = cell["result"]
    if lacking := _NEEDED.get(cell["settings"].get("cell"), set()) - result.keys():
        return f"its result lacks {', '.join(sorted(lacking))}"
    for name, value in result.items():
        if name in _OTHERS:
            right = isinstance(value, _OTHERS[name])
        elif isinstance(value, dict):
            right = all(map(_is_number, value.values()))
        else:
            right = value is None or _is_number(value)
        if not right:
            return f"its {name} is {value!r:.60}"
    return None


def _is_object(cell: Mapping[str, Any], name: str) -> bool:
    return isinstance(cell.get(name), dict)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return _NOT_IN_JSON.get(value, value) if isinstance(value, str) else value
