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
    """Yields from an iterable and reports how far it is.

    Args:
        iterable: the work.
        description: its name.
        total: its length, where the iterable does not tell.
        enabled: whether to report at all.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not enabled or jax.process_index() != 0:
        yield from iterable
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(iterable, description, total=total, console=Console(stderr=True))
    else:
        began, every = time.monotonic(), max((total or 100) // 10, 1)
        for index, item in enumerate(iterable, start=1):
            yield item
            if index % every == 0 or index == total:
                elapsed = time.monotonic() - began
                logger.info("%s: %d of %s, %.0f s", description, index, total or "?", elapsed)
