"""Ctrl-C and SIGTERM as a request that the loop reads between updates."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stop:
    """Says whether to stop: it is set by a signal, and read by the loop."""

    signal: int = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a request to stop; a second one acts as usual."""
    stop = Stop()
    previous: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        signal.signal(number, previous[number])

    try:
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            previous[number] = signal.signal(number, request)
    except ValueError:  # not in the main thread: signals are somebody else's business
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
