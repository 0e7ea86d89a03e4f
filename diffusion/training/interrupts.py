"""Ctrl-C and SIGTERM, kept until a step is done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_signals() -> Iterator[list[signal.Signals]]:
    """A list that a SIGINT or SIGTERM is put on; a second one acts at once."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can handle signals
        return
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.getsignal(name) for name in names}

    def restore():
        for name in names:
            signal.signal(name, before[name])

    def receive(number, _):
        received.append(signal.Signals(number))
        restore()
        # Not print, which must not be entered twice.
        os.write(2, b"\nstopping after this step with a checkpoint; once more to stop at once\n")

    for name in names:
        signal.signal(name, receive)
    try:
        yield received
    finally:
        restore()
