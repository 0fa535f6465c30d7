"""Finished parts of a comparison on disk: a run that is killed loses one of them.

A cell is a JSON file named by a digest of its settings, so other settings are other cells.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradot_jax
from gradot_jax.errors import InputError
from gradot_jax.evaluation.record import environment, write_result
from gradot_jax.files.digest import json_digest

_NOT_IN_JSON = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class CellStore:
    """The cells of one folder.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, settings: Mapping[str, Any]) -> Path:
        """File of a cell: a name for people, and a digest of the settings.

        These are JSON values, everything that the cell's result depends on but the version of the
        program, which is added.
        """
        versioned = {"gradot_jax": gradot_jax.__version__, **settings}
        return self.folder / f"{name}-{json_digest(versioned)[:12]}.json"

    def get(
        self, name: str, settings: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The result of a cell, JSON values, computed and written if it is not there; see `path`.

        Raises:
            InputError: when the file is no cell, or one of other settings.
        """
        path = self.path(name, settings)
        if not path.is_file():
            cell = {"settings": settings, "environment": environment(), "result": compute()}
            write_result(path, cell)
        # Read back, so that a first run and a resumed one go on with the same numbers.
        return _restored(self._read(path, settings))

    def _read(self, path: Path, settings: Mapping[str, Any]) -> Any:
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            stored, result = cell["settings"], cell["result"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a cell of a comparison ({error}); remove it") from None
        if stored != json.loads(json.dumps(settings)):
            raise InputError(
                f"{path}: holds a cell of other settings than its name says; remove it"
            )
        return result


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return _NOT_IN_JSON.get(value, value) if isinstance(value, str) else value
