"""The processes that work on one experiment, or on one recomputation, together.

What they tell one another goes through `Ranks`; nothing else gathers by `torch.distributed`.

Every meeting is one collective of one size, and each rank's message says where it is and whether
it failed. So whatever the others are waiting for, a rank that fails can tell them, by the meeting
that it takes part in next; and all of them raise its error.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, TypeVar
from weakref import WeakKeyDictionary

from bnexp.errors import (
    ExpectationNotMet,
    Interrupted,
    NotFinite,
    RunFailed,
    UserError,
    disk_failure,
    is_out_of_memory,
    shown,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Work

T = TypeVar("T")
Failure = TypeVar("Failure", bound=BaseException)

# Of every message; what does not fit takes several.
_MESSAGE = 16 * 1024
# Whether this rank failed, the length of the place, the part of the payload, its whole length.
_HEADER = struct.Struct("<?HIQ")
_PLACE = 240
_ROOM = _MESSAGE - _HEADER.size - _PLACE
# How long Ctrl-C may have to wait for a rank that waits for another.
_TICK = timedelta(seconds=0.2)
# Seconds that ranks which end wait for rank 0.
_ENDING = 10
_KINDS = {
    kind.__name__: kind
    for kind in (UserError, NotFinite, RunFailed, ExpectationNotMet, Interrupted)
}


@dataclass(frozen=True)
class Alone:
    """This process alone, whatever process group it is in."""

    rank: ClassVar[int] = 0
    size: ClassVar[int] = 1

    def gather(self, value: T, where: str) -> list[T]:
        return [value]

    def broadcast(self, value: T | None, where: str, root: int = 0) -> T:
        return value  # type: ignore[return-value]

    def agree(self, value: Any, where: str) -> None:
        """There is nobody to disagree with."""

    def common(self, error: Failure) -> Failure:
        return error

    def heed(self) -> None:
        """There is nobody to heed."""

    def share(self, batches: Iterable[T]) -> Iterable[T]:
        return batches

    def together(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class TorchRanks:
    """The ranks of a process group of `torch.distributed`, by default of all processes.

    To be made, and used, by all of the group's processes alike. Whatever the group's backend, what
    is told travels through host memory, by a group of its own over gloo with the same timeout: so
    it never meets the collectives of others (DDP's, say), and a model on a GPU needs no further
    device memory. Waiting ends when the others come, when one of them says that it failed, when the
    connection to one breaks, or by the timeout.

    rank: of this process in the group. size: how many they are. members: their ranks among all
    processes. timeout: of the group.

    Raises UserError if there is no process group, or if this process is not in it.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        if not _initialized():
            raise UserError(
                "TorchRanks needs a process group: start the processes with torchrun and call "
                "torch.distributed.init_process_group() first, or leave ranks out"
            )
        import torch.distributed as distributed

        from bnexp.torch_internals import timeout_of

        self.rank = distributed.get_rank(group)
        if self.rank < 0:
            raise UserError("this process is not in the process group that TorchRanks was given")
        self.size = distributed.get_world_size(group)
        of: Any = group or distributed.group.WORLD
        self.timeout = timeout_of(of)
        self.members = distributed.get_process_group_ranks(of)
        self._line = _Line.of(group)
        self._heeded = 0.0
        self._inside = False
        self._over: BaseException | None = None

    def gather(self, value: T, where: str) -> list[T]:
        """Every rank's `value`, in rank order; what comes back is the same on every rank.

        value: plain data, numpy arrays, tensors (they come back on the CPU), or whatever else can
        be pickled. where: the place in the program, in words; all ranks must be at the same one.

        Raises the error of a rank that failed, with its number, and RunFailed where ranks are at
        different places or one is no longer there. All ranks raise the same.
        """
        if self._over is not None:
            raise self._over
        return [pickle.loads(payload) for payload in self._meet(where, _pickled(value))]

    def broadcast(self, value: T | None, where: str, root: int = 0) -> T:
        """The `value` of the rank `root`, on all ranks; what the others give is not looked at."""
        mine = value if self.rank == root else None
        return self.gather(mine, where)[root]  # type: ignore[return-value]

    def agree(self, value: Any, where: str) -> None:
        """Raise UserError, on all ranks, unless all have an equal `value`. Tensors won't do."""
        values = self.gather(value, where)
        other = next((r for r, v in enumerate(values) if v != values[0]), None)
        if other is not None:
            raise self.common(
                UserError(
                    f"{where}: rank 0 has {shown(values[0])}, rank {other} has "
                    f"{shown(values[other])}: give all ranks the same"
                )
            )

    def common(self, error: Failure) -> Failure:
        """`error`, which every rank raises at this place by what it gathered, to be raised."""
        if self._inside and self._over is None:
            self._over = error
        return error

    def heed(self) -> None:
        """Raise the error of a rank that has failed meanwhile, if any; for long stretches of work.

        Looks no more than twice a second, so it may be called at every turn.
        """
        if self._over is not None:
            raise self._over
        if time.monotonic() - self._heeded > 0.5:
            self._heeded = time.monotonic()
            if self._line.has_failed():
                self._meet("", b"")

    def share(self, batches: Iterable[T]) -> Iterable[T]:
        """Of batches that all ranks have alike, those of this rank: every `size`-th.

        Can be gone through as often as `batches` can.
        """
        return _Share(batches, self.rank, self.size)

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block that all ranks enter, and that ends for all of them in the same way.

        An exception that leaves it on one rank is raised on all ranks, at their next meeting or at
        the end of the block: as the same kind of error where it is one of bnexp's, as RunFailed
        otherwise, its text with the number of the rank. Where Ctrl-C was pressed it stays
        KeyboardInterrupt, and is Interrupted on the others.
        """
        outermost = not self._inside
        self._inside = True
        try:
            yield
            self.gather(None, f"the end of {what}")
        except BaseException as error:
            if self._over is None:
                self._announce(error)
            if self._over is None or error is self._over or not isinstance(error, Exception):
                raise
            raise self._over from error
        finally:
            if outermost:
                self._inside, self._over = False, None

    def let_rank_0_end(self) -> None:
        """Called by each rank that ends by an error: returns at once on rank 0, and on the others
        when rank 0 has come here too, is gone, or doesn't come for ten seconds. So rank 0 can say
        what happened before a launcher ends it because another rank has ended."""
        if self.rank == 0:
            self._line.say_ending()
            return
        # Asking waits without an end where the store's machine is gone.
        asking = threading.Thread(target=self._line.until_rank_0_is_ending, daemon=True)
        asking.start()
        asking.join(_ENDING)

    def _announce(self, error: BaseException) -> None:
        kind, text = _said(error)
        self._line.say_failed()
        with contextlib.suppress(UserError, RunFailed, ExpectationNotMet, Interrupted):
            self._meet("", pickle.dumps((kind, text)), failed=True)

    def _meet(self, where: str, payload: bytes, failed: bool = False) -> list[bytes]:
        place = where.encode()[:_PLACE]
        parts: list[list[bytes]] = [[] for _ in range(self.size)]
        part, longest = 0, 1
        while part * _ROOM < longest:
            header = _HEADER.pack(failed, len(place), part, len(payload))
            content = payload[part * _ROOM : (part + 1) * _ROOM]
            try:
                messages = self._line.exchange(header + place.ljust(_PLACE) + content, self.size)
            except RunFailed as lost:
                self._end(RunFailed(f"at {where!r}: {lost}" if where else str(lost)))
            heads = [_HEADER.unpack_from(message) for message in messages]
            start = _HEADER.size + _PLACE
            failures = {
                rank: pickle.loads(messages[rank][start : start + length])
                for rank, (has_failed, *_, length) in enumerate(heads)
                if has_failed
            }
            if failures:
                self._line.failures += 1
                first, (kind, text) = next(iter(failures.items()))
                alike = len(failures) == self.size and len(set(failures.values())) == 1
                self._end(_KINDS[kind](text if alike else f"rank {first}: {text}"))
            places = [
                (message[_HEADER.size : _HEADER.size + head[1]].decode(errors="replace"), head[2])
                for message, head in zip(messages, heads, strict=True)
            ]
            if len(set(places)) > 1:
                self._end(_apart([name for name, _ in places]))
            longest = max(length for *_, length in heads)
            for found, message, (*_, length) in zip(parts, messages, heads, strict=True):
                found.append(message[start : start + max(0, length - part * _ROOM)])
            part += 1
        return [b"".join(found) for found in parts]

    def _end(self, error: Exception) -> NoReturn:
        if self._inside:
            self._over = error
        raise error


Ranks = Alone | TorchRanks


@dataclass(frozen=True)
class _Share(Generic[T]):
    batches: Iterable[T]
    rank: int
    size: int

    def __iter__(self) -> Iterator[T]:
        return itertools.islice(iter(self.batches), self.rank, None, self.size)

    def __len__(self) -> int:
        """TypeError where `batches` has no length."""
        return len(range(self.rank, len(self.batches), self.size))  # type: ignore[arg-type]


def checksum(tensors: Iterable[Tensor], start: int = 0) -> int:
    """A CRC-32 of the tensors' bits, going on from `start`, for ranks to compare. Waits for the
    device."""
    for tensor in tensors:
        start = zlib.crc32(_bits(tensor), start)
    return start


def agree_on_model(ranks: Ranks, mine: Mapping[str, Any], where: str, advice: str) -> None:
    """Raise UserError, on all ranks, unless all have the same parts of a model: what each is called
    -> what must be equal. The first that differs is named, and its rank. Tensors won't do."""
    every = ranks.gather(mine, where)
    for rank, other in enumerate(every):
        for what in {**every[0], **other}:
            if every[0].get(what) != other.get(what):
                raise ranks.common(
                    UserError(
                        f"the ranks' models differ: {what} of rank {rank} is not that of rank 0; "
                        f"{advice}"
                    )
                )


def choose_ranks(ranks: Ranks | None, what: str) -> Ranks:
    """`ranks`, or this process alone where nothing was chosen and there is nothing to choose.

    Raises UserError under an initialized process group of several ranks if `ranks` is None: every
    rank would silently end with its own numbers.
    """
    if ranks is None and (size := _group_size()) > 1:
        raise UserError(
            f"{what} in one of {size} ranks of a process group sees this rank's samples alone, so "
            "every rank would end with other numbers: pass ranks=bnexp.TorchRanks() for one answer "
            "from the samples of all ranks, or ranks=bnexp.Alone() if this rank's are meant"
        )
    return Alone() if ranks is None else ranks


def started_by_launcher() -> int:
    """How many processes torchrun, or `--processes`, has started of this command; 1: none did."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if "RANK" in os.environ and size.isdecimal() else 1


def refuse_launcher(what: str) -> None:
    """Raise UserError where torchrun (or another launcher) started several processes of this."""
    if (size := started_by_launcher()) > 1:
        raise UserError(
            f"{what} was started {size} times by a launcher such as torchrun, and would be {size} "
            f"unrelated runs: start it once, as `{what}`"
        )


class _Line:
    """How the ranks of one process group reach one another: a gloo group of bnexp's own."""

    _all: ClassVar[WeakKeyDictionary[ProcessGroup, _Line]] = WeakKeyDictionary()

    @classmethod
    def of(cls, group: ProcessGroup | None) -> _Line:
        import torch.distributed as distributed

        key = group or distributed.group.WORLD
        assert key is not None
        if key not in cls._all:
            cls._all[key] = cls(key)
        return cls._all[key]

    def __init__(self, group: ProcessGroup) -> None:
        import torch.distributed as distributed

        from bnexp.torch_internals import timeout_of

        members = distributed.get_process_group_ranks(group)
        line: Any = distributed.new_group(
            members, timeout=timeout_of(group), backend="gloo", use_local_synchronization=True
        )
        self._group, self._store = line, line.get_group_store()
        self.failures = 0  # that all ranks have met
        # The store may outlive the group, and remember what another one said.
        self._name = self.exchange(os.urandom(16), len(members))[0][:16].hex()

    def say_failed(self) -> None:
        """For ranks that don't meet for long."""
        with contextlib.suppress(RuntimeError):  # it is gone with the rank that held it
            if self._group is not None:
                self._store.set(f"failed {self._name} {self.failures}", "1")

    def has_failed(self) -> bool:
        with contextlib.suppress(RuntimeError):
            if self._group is not None:
                return self._store.check([f"failed {self._name} {self.failures}"])
        return False

    def say_ending(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"ending {self._name}", "1")

    def until_rank_0_is_ending(self) -> None:
        """Or nobody can tell."""
        with contextlib.suppress(RuntimeError):
            while not self._store.check([f"ending {self._name}"]):
                time.sleep(0.05)

    def exchange(self, message: bytes, size: int) -> list[bytes]:
        """Every rank's message, padded. Raises RunFailed, for good, if one can't be reached."""
        if self._group is None:
            raise RunFailed("the connection to the other ranks was lost before")
        import torch
        import torch.distributed as distributed

        mine = torch.zeros(_MESSAGE, dtype=torch.uint8, device="cpu")
        mine.numpy()[: len(message)] = memoryview(message)
        every = torch.empty(size, _MESSAGE, dtype=torch.uint8, device="cpu")
        try:
            _finish(distributed.all_gather(list(every), mine, group=self._group, async_op=True))
        except RuntimeError as error:
            # Without its sockets, ranks that wait for this one learn of it too.
            with contextlib.suppress(RuntimeError, ValueError):
                distributed.destroy_process_group(self._group)
            self._group = None
            why = shown(str(error).splitlines()[0].partition("] ")[2] or str(error))
            raise RunFailed(
                f"another rank was killed, has ended, or does not answer in time ({why})"
            ) from error
        return [bytes(row) for row in every.numpy()]


def _finish(work: Work) -> None:
    """Wait for a collective, and let Ctrl-C through meanwhile: it goes on all the same."""
    while True:
        try:
            work.wait(_TICK)
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()
                return


def _apart(places: list[str]) -> RunFailed:
    at = [f"rank {places.index(p)} at {p!r}" for p in dict.fromkeys(places)]
    return RunFailed(f"the ranks are at different places: {', '.join(at[:4])}")


def _said(error: BaseException) -> tuple[str, str]:
    """Of what kind an error is to the other ranks, and what it says."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted", "interrupted"
    kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in _KINDS), None)
    text = str(error)[:2000]
    if kind is not None:
        return kind, text
    if disk := disk_failure(error):
        return "RunFailed", str(disk)
    line = f"{type(error).__name__}: {text}".splitlines()[0]
    return "RunFailed", f"out of memory ({line})" if is_out_of_memory(error) else line


class _Pickler(pickle.Pickler):
    """Tensors as bytes: several times as fast as torch's own way, and never onto a device."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if not isinstance(value, torch.Tensor):
            return NotImplemented
        return _tensor, (_bits(value), value.dtype, value.shape)


def _bits(tensor: Tensor) -> Any:
    """A tensor's values as uint8 in numpy, on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensor(flat: Any, dtype: Any, shape: Any) -> Any:
    import torch

    return torch.from_numpy(flat).view(dtype).reshape(shape)


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _initialized() -> bool:
    import torch.distributed as distributed

    return distributed.is_available() and distributed.is_initialized()


def _group_size() -> int:
    import torch.distributed as distributed

    return distributed.get_world_size() if _initialized() else 1
