"""Time: how much is left, and whether the user has pressed Ctrl-C.

Work is metered in steps wherever it can be, so that the same inputs give the same placement; the clock is only the
guard behind that, and a search that the clock cut short says so.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Clock:
    """A deadline, and a flag that Ctrl-C sets."""

    def __init__(self, seconds: float, around: Clock | None = None) -> None:
        self.start = time.monotonic()
        self.limit = seconds
        self.cut_short = False
        self._interrupted = False
        self._around = around

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed, on this clock or on the one it is a part of."""
        return self._interrupted or (self._around is not None and self._around.interrupted)

    @interrupted.setter
    def interrupted(self, value: bool) -> None:
        self._interrupted = value

    def part(self, seconds: float) -> Clock:
        """Return a clock for a part of the work: so many seconds at most, and Ctrl-C counts for both."""
        return Clock(min(seconds, self.left()), self)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self, keep: float = 0.0) -> float:
        """Return the seconds left when the last `keep` seconds are kept for later; 0 after Ctrl-C."""
        return 0.0 if self.interrupted else max(0.0, self.limit - keep - self.elapsed)

    def over(self, keep: float = 0.0) -> bool:
        """Whether time is up; remembers that it was, since that makes the answer depend on the clock."""
        if self.left(keep) > 0:
            return False
        self.cut_short = True
        return True

    @contextmanager
    def catching_interrupt(self) -> Iterator[None]:
        """Turn the first Ctrl-C into `interrupted`; the second one stops the process as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def interrupt(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
