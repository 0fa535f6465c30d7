"""What a run tells while it goes: JSON lines on disk, and a bar or plain lines on the screen."""

import json
import sys
from pathlib import Path

import jax


class RunLog:
    """Records of one run; a context manager. Silent on all processes but the first.

    Args:
        num_steps: steps of the whole run.
        start: steps taken before this part of it; records of later ones are dropped from the
            file, since they are about to be made again.
        path: JSON lines, one record each; None for none.
        progress: whether to show progress, as a bar on a terminal and else as a line for about
            every tenth of the run, on standard error.
    """

    def __init__(self, num_steps: int, start: int, path: Path | str | None, *, progress: bool):
        first = jax.process_index() == 0
        self._num_steps = num_steps
        self._bar = self._task = self._file = None
        self._lines = progress and first and not sys.stderr.isatty()
        if path is not None and first:
            self._file = _open_after(Path(path), start)
        if progress and first and not self._lines:
            self._bar, self._task = _bar(num_steps, start)

    def __enter__(self) -> "RunLog":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()

    def record(self, step: int, **values: float | None) -> None:
        """Adds one record; values that are None are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **known}) + "\n")
            self._file.flush()
        text = "  ".join(f"{name} {value:.4g}" for name, value in known.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        tenth = max(self._num_steps // 10, 1)
        if self._lines and (step % tenth == 0 or "validation_loss" in known):
            print(f"step {step}/{self._num_steps}  {text}", file=sys.stderr, flush=True)


def _open_after(path: Path, start: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if start and path.exists() else []
    # A run killed while it wrote may have left half a line at the end.
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
    file = path.open("w", encoding="utf-8")
    file.writelines(line + "\n" for line in kept)
    return file


def _bar(num_steps: int, start: int):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
    bar = Progress(*columns, console=Console(stderr=True))
    return bar, bar.add_task("", total=num_steps, completed=start)
