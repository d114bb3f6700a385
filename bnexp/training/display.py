"""What a person sees of a training: a live line on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

REDRAW_SECONDS = 0.25
PLAIN_SECONDS = 10.0
MEDIUM, WIDE = 78, 110  # columns for the rate of images, and for everything


class Display(Protocol):
    """What a training tells while it runs. Use it as a context manager."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *_: object) -> None: ...

    def step(self, step: int, images: int) -> bool:
        """Note that update `step` was launched; True when fresh numbers should be shown."""
        ...

    def numbers(self, row: tuple | None) -> None:
        """Show a row of steps.csv."""

    def test_accuracy(self, accuracy: float, step: int) -> None: ...

    def line(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class Silent:
    """Shows nothing; warnings are Python's."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, step: int, images: int) -> bool:
        return False

    def numbers(self, row: tuple | None) -> None:
        pass

    def test_accuracy(self, accuracy: float, step: int) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=2)


class Mute(Silent):
    """Of the processes of a training all but one: what they would say, that one says."""

    def warn(self, text: str) -> None:
        pass


class _Console(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True  # rich would end the process


class Terminal:
    """Progress and warnings on stderr. Whoever watched may be gone, and the disk it is written to
    full: the run goes on."""

    def __init__(self, total_steps: int, first_step: int = 0, console: Console | None = None):
        self.console = console or _Console(stderr=True, highlight=False, soft_wrap=True)
        self._total = total_steps
        self._started = time.monotonic()
        self._shown = self._started
        self._images = 0
        self._test = ""
        self._row: tuple | None = None
        self._progress = None
        if self.console.is_terminal:
            bar = [BarColumn(bar_width=16)] if self._is_wide else []
            self._progress = Progress(
                TextColumn("{task.completed}/{task.total}"),
                *bar,
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=not self._is_wide),
                console=self.console,
                auto_refresh=False,
            )
            self._task = self._progress.add_task(
                "", total=total_steps, completed=first_step, numbers=""
            )

    @property
    def _is_wide(self) -> bool:
        return not self.console.is_terminal or self.console.width >= WIDE

    def __enter__(self) -> Terminal:
        with self._while_it_can_be_shown():
            if self._progress:
                self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        with self._while_it_can_be_shown():
            if self._progress:
                self._progress.refresh()
                self._progress.stop()

    def step(self, step: int, images: int) -> bool:
        """Note that update `step` was launched; True when fresh numbers should be shown."""
        self._images += images
        now = time.monotonic()
        interval = REDRAW_SECONDS if self._progress else PLAIN_SECONDS
        if now - self._shown < interval and step < self._total:
            return False
        self._shown = now
        return True

    def numbers(self, row: tuple | None) -> None:
        """Show a row of steps.csv."""
        if row is None:
            return
        step, epoch, lr, loss, _, ema = row
        rate = self._images / max(1e-9, time.monotonic() - self._started)
        text = f"loss {loss:.4f}  EMA train {ema:.2%}{self._test}"
        if not self.console.is_terminal or self.console.width >= MEDIUM:
            text += f"  {rate:,.0f} img/s"
        if self._progress:
            with self._while_it_can_be_shown():
                self._progress.update(self._task, completed=step, numbers=text, refresh=True)
        else:
            self.line(f"step {step}/{self._total}  epoch {epoch}  lr {lr:.2g}  {text}")

    def test_accuracy(self, accuracy: float, step: int) -> None:
        self._test = f"  test {accuracy:.2%}"
        if self._is_wide:
            self._test += f" (step {step})"

    def line(self, text: str) -> None:
        with self._while_it_can_be_shown():
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.line(f"bnexp: {text}")

    @contextlib.contextmanager
    def _while_it_can_be_shown(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            self.console.quiet = True
            self._progress = None
