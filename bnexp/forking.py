"""Processes that are forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext


def importing(modules: list[str]) -> ForkServerContext:
    """Begin to import `modules` in the process that others will be forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    forkserver.ensure_running()
    return context


def end_with_parent() -> None:
    """Be asked to end (SIGTERM) when the process that asked for this one is no more, however it
    ended. The one that this one is forked from outlives it."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
