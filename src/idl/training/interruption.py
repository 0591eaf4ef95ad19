"""Ctrl-C as a request that the training loop answers between two steps, where a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into an answer, and leave the second one to Python's own ``KeyboardInterrupt``.

    Outside the main thread, where Python delivers no signals, nothing changes.

    Yields:
        A function that says whether Ctrl-C came.

    Example:
        >>> with stop_on_interrupt() as should_stop:
        ...     should_stop()
        False
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def request(signal_number: int, frame: object) -> None:
        requested.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, request)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
