"""Signals, and people, that wish to stop what runs: the long loops look at them between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, n)]

_handling = False
_asked: int | None = None
"""The first signal that has come since `handled` was entered."""
_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class Interrupted(BaseException):
    """A signal asked to stop; what was going on has been left at the end of a step."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def code(self) -> int:
        """The exit status that a shell expects: 128 and the signal's number."""
        return 128 + self.signum


class Cancelled(Interrupted):
    """Whoever asked for this computation has called it off; the process goes on."""

    def __init__(self) -> None:
        super().__init__(signal.SIGINT)
        self.args = ("cancelled",)


@contextmanager
def handled() -> Iterator[None]:
    """In here SIGINT, SIGTERM, SIGHUP and SIGUSR1 only make `check` raise; a second SIGINT kills at once.

    A signal that the process was told to ignore (nohup) stays ignored. Off the main thread, and inside another
    `handled`, nothing changes.
    """
    global _asked, _handling
    if _handling or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: handler for s in SIGNALS if (handler := signal.getsignal(s)) not in (signal.SIG_IGN, None)}
    _asked, _handling = None, True
    try:
        for s in before:
            signal.signal(s, _ask)
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        _asked, _handling = None, False


def asked() -> bool:
    """Whether a signal has asked to stop."""
    return _asked is not None


@contextmanager
def heeding(stop: threading.Event) -> Iterator[None]:
    """In here, and in this thread alone, `check` raises Cancelled as soon as the event is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def check() -> None:
    """Raise Interrupted if a signal has asked to stop, Cancelled if whom this computation is for has."""
    if _asked is not None:
        raise Interrupted(_asked)
    if (stop := _stop.get()) is not None and stop.is_set():
        raise Cancelled


def _ask(signum: int, frame: FrameType | None) -> None:
    global _asked
    if signum == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one kills, even inside a long call of C
        if _asked == signal.SIGINT:  # a Trainer has put this handler back in the meantime
            signal.raise_signal(signal.SIGINT)
    _asked = _asked or signum
