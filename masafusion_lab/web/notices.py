"""Warnings for whom they concern: what the package logs while it works for one person, to be shown on the page."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Notices(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said, self.thread = said, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.thread == self.thread and text not in self.said:
            self.said.append(text)


@contextmanager
def noticed(said: list[str] | None = None) -> Iterator[list[str]]:
    """The warnings that the package logs in here, in this thread, each once; they are added to `said`."""
    said = [] if said is None else said
    handler, package = _Notices(said), logging.getLogger("masafusion_lab")
    package.addHandler(handler)
    try:
        yield said
    finally:
        package.removeHandler(handler)
