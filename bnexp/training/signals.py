"""Signals that ask a training to end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """True once one of `signals` has come; the second one raises KeyboardInterrupt at once.

    A context manager that puts the former handlers back. A signal that was ignored before (under
    nohup, or for a background job) stays ignored. Outside of the main thread no signal is handled.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._signals = signals
        self._former: dict[int, object] = {}
        self._requested = False
        self._wait_for_step = True

    def __enter__(self) -> Interruption:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in self._signals:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._request)
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
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return self._requested


@contextlib.contextmanager
def ignored(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """A block, of an instant, that these signals don't interrupt. No effect but in the main
    thread."""
    former: dict[int, object] = {}
    with contextlib.suppress(ValueError):
        former |= {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
