"""Signals that ask a training to end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


@contextlib.contextmanager
def handled(signals: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    """A block in which `handler` has these signals. What was ignored before (under nohup, or for a
    background job) stays ignored. No effect but in the main thread."""
    former: dict[int, Any] = {}
    with contextlib.suppress(ValueError):
        for number in signals:
            if signal.getsignal(number) is not signal.SIG_IGN:
                former[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for restored, before in former.items():
            signal.signal(restored, before)


class Interruption:
    """True once one of `signals` has come; the second one raises KeyboardInterrupt at once.

    A context manager, within which the signals are `handled` so.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._signals = signals
        self._stack = contextlib.ExitStack()
        self._requested = False
        self._wait_for_step = True

    def __enter__(self) -> Interruption:
        self._stack.enter_context(handled(self._signals, self._request))
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested or not self._wait_for_step:
            raise KeyboardInterrupt
        self._requested = True

    def at_once(self) -> None:
        """From now on there is no step to finish: a signal interrupts at once."""
        self._wait_for_step = False
        if self._requested:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __bool__(self) -> bool:
        return self._requested
