"""Time and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from placer.solver.clock import Clock


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)


def test_time_runs_down() -> None:
    """What is left and what is kept; a clock that was never asked is not cut short."""
    clock = Clock(100.0)
    assert 99.0 < clock.left() <= 100.0
    assert 49.0 < clock.left(keep=50.0) <= 50.0
    assert clock.left(keep=200.0) == 0.0
    assert not clock.over()
    assert not clock.cut_short
    assert clock.over(keep=200.0)
    assert clock.cut_short


def test_a_clock_of_no_time_is_over() -> None:
    """Zero seconds are over at once, and elapsed time only grows."""
    clock = Clock(0.0)
    assert clock.over()
    before = clock.elapsed
    time.sleep(0.01)
    assert clock.elapsed > before


def test_ctrl_c_is_caught_once_and_the_handler_restored() -> None:
    """The first SIGINT sets the flag; the second one is the interpreter's again; after the block all is as before."""
    before = signal.getsignal(signal.SIGINT)
    clock = Clock(60)
    with clock.catching_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
        press()
        assert clock.interrupted
        assert clock.left() == 0.0
        assert clock.over()
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handler_is_restored_after_an_error() -> None:
    """An exception inside the block leaves nothing behind."""
    before = signal.getsignal(signal.SIGINT)
    clock = Clock(60)
    with pytest.raises(RuntimeError), clock.catching_interrupt():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before
    assert not clock.interrupted


def test_other_threads_leave_signals_alone() -> None:
    """Python lets only the main thread set handlers; elsewhere the block does nothing and does not fail."""
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with Clock(60).catching_interrupt():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
