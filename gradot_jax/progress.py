"""Progress of long work: a bar on a terminal, a line every tenth otherwise, on one process only."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import jax

logger = logging.getLogger("gradot_jax")
T = TypeVar("T")


def track(
    iterable: Iterable[T], description: str, *, total: int | None = None, enabled: bool = True
) -> Iterator[T]:
    """Yields from an iterable and reports how far it is, at what rate and for how long still.

    `total` is its length, where it does not tell.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not enabled or jax.process_index() != 0:
        yield from iterable
    elif sys.stderr.isatty():
        yield from _bar(iterable, description, total)
    else:
        yield from _lines(iterable, description, total)


def _lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    began, every = time.monotonic(), max((total or 100) // 10, 1)
    for index, item in enumerate(iterable, start=1):
        yield item
        if index % every == 0 or index == total:
            elapsed = time.monotonic() - began
            left = f", {_pace(index, total, elapsed)}" if elapsed else ""
            logger.info("%s: %d of %s, %.0f s%s", description, index, total or "?", elapsed, left)


def _pace(index: int, total: int | None, elapsed: float) -> str:
    """Rate since the beginning, and the time left at that rate as minutes and seconds."""
    rate = index / elapsed
    if total is None:
        return f"{rate:.3g}/s"
    minutes, seconds = divmod(round((total - index) / rate), 60)
    return f"{rate:.3g}/s, ETA {minutes:02d}:{seconds:02d}"


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[pace]}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, pace="")
        began = time.monotonic()
        for index, item in enumerate(iterable, start=1):
            yield item
            elapsed = time.monotonic() - began
            bar.update(task, completed=index, pace=_pace(index, total, elapsed) if elapsed else "")
