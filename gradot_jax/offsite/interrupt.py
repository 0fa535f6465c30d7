"""Stopping a run by signal without losing it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Interrupted(RuntimeError):
    """A run was told to stop by a signal, has saved its state and can be resumed.

    Attributes:
        signum: the signal.
        exit_code: what a program that it stopped exits with, by the shell's convention.
        step: steps taken and saved.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, which is saved; "
            "resume to go on"
        )
        self.signum = signum
        self.exit_code = 128 + signum
        self.step = step


class StopFlag:
    """What the signal handler leaves for the loop to read; None until a signal arrives."""

    signum: int | None = None


@contextmanager
def stop_flag(*, enabled: bool) -> Iterator[StopFlag]:
    """Turns the first SIGTERM or SIGINT into a flag; a second one acts as it always did.

    Does nothing outside the main thread, where Python allows no handlers, and in runs of several
    processes, which would stop at different steps and wait for one another for ever.
    """
    flag = StopFlag()
    main = threading.current_thread() is threading.main_thread()
    if not (enabled and main) or jax.process_count() > 1:
        yield flag
        return
    previous = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(signum, frame) -> None:
        del frame
        flag.signum = signum
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        restore()
