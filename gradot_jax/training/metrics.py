"""The history of a run: one JSON record a line, readable while the run goes on."""

import json
from pathlib import Path

import jax


class MetricsFile:
    """Records of one run; a context manager. Written by the first process only.

    Args:
        path: the file, made anew; None keeps no records.
        start: steps taken before this part of the run. An existing file keeps its records up to
            there; later ones are about to be made again.
    """

    def __init__(self, path: Path | str | None, start: int):
        self._file = None
        if path is not None and jax.process_index() == 0:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _records(path, start) if start else []
            self._file = path.open("w", encoding="utf-8")
            self._file.writelines(line + "\n" for line in kept)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def record(self, step: int, **values: float | None) -> None:
        """Adds a record of one step; values that are None are left out."""
        if self._file is not None:
            known = {name: value for name, value in values.items() if value is not None}
            self._file.write(json.dumps({"step": step, **known}) + "\n")
            self._file.flush()


def _records(path: Path, last: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # A run that was killed may have left half a line at the end.
    return [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last]
