"""Memory for the exact sweep: how much there is, who holds it, and where the rest may wait."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnexp.memory_size import parse_memory
from bnexp.torch_internals import storage_key

# Where the bytes of a storage are: a copy on the host, or (offset, size) in the file.
Place = Tensor | tuple[int, int]


def memory_bound(memory: int | float | str | None, device: torch.device) -> int:
    """The bound in bytes that the argument `memory` of `recompute_statistics` means.

    None: half of what is free on `device`. An int, or a string such as "2GiB" or "500MB":
    bytes. A float in (0, 1], or a string such as "30%": that share of what is free.
    Raises UserError for anything else.
    """
    amount = 0.5 if memory is None else parse_memory(memory)
    return int(amount * free_memory(device)) if isinstance(amount, float) else amount


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now (on the CPU: without swapping)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return min(_free_host_memory(), _free_in_cgroup())


def _free_host_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def _free_in_cgroup() -> int:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return 2**63 if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return 2**63


def reuse_freed_memory() -> None:
    """Have glibc's malloc use freed blocks of up to 32 MiB again, and not map each afresh.

    It learns that from the largest block that has been freed, and learns no more beyond this size;
    so one is freed, of which no page was ever touched. Does nothing but on Linux.
    """
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**25 - 2**16))))


class PassMemory:
    """The tensor storages that one forward pass created and that still live.

    bytes, peak: their size now, and the most it was. resident: what the scheduler counts.
    offloaded: what `OffloadMode.offload` has moved to the store.
    """

    def __init__(self) -> None:
        self.storages: dict[int, weakref.ref] = {}
        self.bytes = 0
        self.peak = 0
        self.resident = 0
        self.offloaded: list[tuple[torch.UntypedStorage, int, Place]] = []

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()

        def died(_: weakref.ref) -> None:
            del self.storages[key]
            self.bytes -= size

        self.storages[key] = weakref.ref(storage, died)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def live(self) -> list[torch.UntypedStorage]:
        alive = [reference() for reference in list(self.storages.values())]
        return [s for s in alive if s is not None]


class OffloadMode(TorchDispatchMode):
    """Sees every operation and notes which pass (`current`) created each storage.

    What a pass holds can be offloaded to the store. A pass may also read what another one created
    (a cache kept by the model). If that has been offloaded, it is restored first, and stays.
    """

    def __init__(self, store: OffloadStore) -> None:
        super().__init__()
        self.current: PassMemory | None = None
        self._offloaded: dict[int, PassMemory] = {}
        self._store = store

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing compiled runs under this mode; torch would import its compiler, for seconds.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = {storage_key(storage) for storage in _storages((args, kwargs))}
        if self._offloaded:
            for key in read & self._offloaded.keys():
                self._share(key)
        result = func(*args, **kwargs)
        if self.current is not None:
            for storage in _storages((result,)):
                key = storage_key(storage)
                if key not in read and key not in self.current.storages:
                    self.current.add(storage)
        return result

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is made within is not the pass's, and never offloaded."""
        current, self.current = self.current, None
        try:
            yield
        finally:
            self.current = current

    def offload(self, memory: PassMemory) -> None:
        """Move all of a pass into the store; its tensors keep shape and identity."""
        for storage in memory.live():
            size = storage.nbytes()
            if size and storage.resizable():
                memory.offloaded.append((storage, size, self._store.write(storage)))
                storage.resize_(0)
                self._offloaded[storage_key(storage)] = memory

    def restore(self, memory: PassMemory) -> None:
        """Undo `offload`."""
        while memory.offloaded:
            storage, size, place = memory.offloaded.pop()
            storage.resize_(size)
            self._store.read(place, storage)
            del self._offloaded[storage_key(storage)]

    def restore_survivors(self, memory: PassMemory) -> None:
        """Restore what outlives its pass because someone else holds it (a hook, a list)."""
        while memory.offloaded:
            storage, size, place = memory.offloaded.pop()
            del self._offloaded[storage_key(storage)]
            reference = weakref.ref(storage)
            del storage
            if (survivor := reference()) is not None:
                survivor.resize_(size)
                self._store.read(place, survivor)

    def _share(self, key: int) -> None:
        memory = self._offloaded[key]
        self.restore(memory)
        storage = memory.storages.pop(key)()
        if storage is not None:
            memory.bytes -= storage.nbytes()
        self.offload(memory)


def _storages(values: Iterable[object]) -> Iterator[torch.UntypedStorage]:
    for value in values:
        if isinstance(value, Tensor):
            try:
                yield value.untyped_storage()
            except (NotImplementedError, RuntimeError):
                continue  # sparse, opaque: no storage of that kind
        elif isinstance(value, (list, tuple)):
            yield from _storages(value)
        elif isinstance(value, dict):
            yield from _storages(value.values())


class OffloadStore:
    """Keeps the bytes of storages elsewhere: in host memory up to a bound, then on disk.

    The file has no name (or loses it when closed), so nothing is left behind, however the
    process ends. Freed room is used again.
    """

    def __init__(self, host_bytes: int = 0) -> None:
        self.host_left = host_bytes
        self.error: OSError | None = None
        self._free: list[tuple[int, int]] = []
        self._end = 0

    @staticmethod
    def folder() -> str:
        """Where the file would be: `tempfile`'s directory, which `TMPDIR` sets."""
        return tempfile.gettempdir()

    @staticmethod
    def disk_left() -> int:
        """Free bytes in `folder()`."""
        return shutil.disk_usage(OffloadStore.folder()).free

    def write(self, storage: torch.UntypedStorage) -> Place:
        """Copy a storage's bytes; returns the place to `read` them from.

        An OSError (disk full) is kept in `error` and raised.
        """
        data = _as_tensor(storage)
        if self.host_left >= data.numel():
            self.host_left -= data.numel()
            return data.cpu()
        offset = self._allocate(data.numel())
        try:
            self._file.seek(offset)
            host = data.cpu()
            rest = _view(host)
            while rest:
                rest = rest[self._file.write(rest[: 2**30]) :]
        except OSError as error:
            self.error = error
            raise
        return offset, data.numel()

    def read(self, place: Place, storage: torch.UntypedStorage) -> None:
        """Copy the bytes back into `storage`, of the same size, and free their place."""
        data = _as_tensor(storage)
        if isinstance(place, Tensor):
            self.host_left += place.numel()
            data.copy_(place)
            return
        offset, size = place
        self._file.seek(offset)
        host = data if data.device.type == "cpu" else torch.empty(size, dtype=torch.uint8)
        rest = _view(host)
        while rest:
            read = self._file.readinto(rest[: 2**30])
            if not read:
                raise OSError("the temporary file ended early")
            rest = rest[read:]
        if host is not data:
            data.copy_(host)
        self._release(offset, size)

    def _allocate(self, size: int) -> int:
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                if room == size:
                    del self._free[index]
                else:
                    self._free[index] = (offset + size, room - size)
                return offset
        self._end += size
        return self._end - size

    def _release(self, offset: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self._free, (offset, size)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self._free = merged

    @functools.cached_property
    def _file(self) -> io.FileIO:
        return tempfile.TemporaryFile(buffering=0, prefix="bnexp-")

    def close(self) -> None:
        if "_file" in vars(self):
            self._file.close()


def _view(data: Tensor) -> memoryview:
    """The bytes of a uint8 tensor on the CPU. (`numpy()` would make its storage unresizable.)"""
    return memoryview((ctypes.c_char * data.numel()).from_address(data.data_ptr())).cast("B")


def _as_tensor(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
