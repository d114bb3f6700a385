"""Working ahead in threads: reading and decoding files while something else computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from bnexp.errors import RunFailed

Item = TypeVar("Item")
Made = TypeVar("Made")

AHEAD = 2
"""So many items are made in advance for each worker."""


def ahead(
    items: Iterable[Item], make: Callable[[Item], Made], workers: int
) -> Iterator[tuple[Item, Made]]:
    """`(item, make(item))` in order, made by `workers` threads a little ahead of their use; 0
    workers make each when it is asked for.

    What `make` raises is raised here, in its turn. Closing the iterator ends the threads. Unlike
    processes, threads need no shared memory and no file for each batch, and decoding an image and
    reading a file let the other threads run.
    """
    if not workers:
        for item in items:
            yield item, make(item)
        return
    pending: deque[tuple[Item, Future[Made]]] = deque()
    items = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="bnexp data")
    try:
        while True:
            for item in islice(items, AHEAD * workers - len(pending)):
                pending.append((item, _submit(pool, make, item)))
            if not pending:
                return
            item, made = pending.popleft()
            yield item, made.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, make: Callable[[Item], Made], item: Item) -> Future[Made]:
    try:
        return pool.submit(make, item)
    except RuntimeError as error:  # the system's limit of threads
        raise RunFailed(f"images can't be read ahead ({error}); set data.workers to 0") from None
