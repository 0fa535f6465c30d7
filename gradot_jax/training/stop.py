"""Stopping a run by signal without losing it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from gradot_jax.parallel import largest


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
    _told: jax.Array | None = None

    def agreed(self) -> int | None:
        """The signal to stop for at this step, the same in every process; None for none.

        To be called by all processes after each step. With several a signal is heeded one step
        later, when what each had received by the step before is known without waiting for it.
        """
        if jax.process_count() == 1:
            return self.signum
        before, self._told = self._told, largest(self.signum or 0)
        return (before is not None and int(before)) or None


@contextmanager
def stop_flag(*, enabled: bool) -> Iterator[StopFlag]:
    """Turns the first SIGTERM or SIGINT into a flag; a second one acts as it always did.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    flag = StopFlag()
    if not enabled or threading.current_thread() is not threading.main_thread():
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
