"""Several processes that are one training: what each of them computes of a step.

What is computed doesn't depend on how many they are. Each takes consecutive samples of every
mini-batch; BN layers normalize over all of them; gradients add up to that of the mean loss; and
random numbers of the forward pass are drawn for the whole mini-batch on every rank.
"""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnexp.collectives import Collectives, broken_off, has_broken_off
from bnexp.config import Config
from bnexp.data.sampling import EVERYTHING, Share
from bnexp.device import resolve_device
from bnexp.errors import ExpectationNotMet, RunFailed, UserError
from bnexp.nn import normalize_across
from bnexp.ranks import Alone, Ranks, TorchRanks, checksum
from bnexp.statistics.across import AcrossRanks
from bnexp.training.display import Display
from bnexp.training.schedule import CheckpointClock
from bnexp.training.signals import Interruption

T = TypeVar("T")


def device_of_rank(name: str, ranks: Ranks) -> torch.device:
    """The device that the config calls `name`; of several ranks of one machine each has its own.

    UserError where it isn't there, and where all ranks would share one GPU.
    """
    if ranks.size == 1 or name == "cpu":
        return resolve_device(name)
    if name not in ("auto", "cuda"):
        raise UserError(f"device {name} is one device: {ranks.size} processes take cpu or cuda")
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    device = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', ranks.rank)}")
    torch.cuda.set_device(device)
    return device


def share_of_rank(config: Config, ranks: Ranks) -> Share:
    """What this rank takes of a mini-batch: whole normalization batches, where there are some.

    UserError where there are more ranks than parts.
    """
    config.require_parts_for(ranks.size)
    part = config.statistics.normalization_batch or 1
    return Share(ranks.rank, ranks.size, part) if ranks.size > 1 else EVERYTHING


def by_rank_0(ranks: Ranks, what: str, function: Callable[[], T]) -> T:
    """What `function()` returns on rank 0, where alone it is called; or its error, on all ranks."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if ranks.rank == 0:
        try:
            outcome = function(), None
        except (UserError, RunFailed, ExpectationNotMet) as error:
            if ranks.size == 1:
                raise
            outcome = None, error
    value, failed = ranks.broadcast(outcome, what)
    if failed is not None:
        raise ranks.common(failed)
    return value


def one_by_one(ranks: Ranks, what: str, load: Callable[[], T]) -> T:
    """What `load()` returns on each rank: on rank 0 first, which downloads what isn't there."""
    loaded: list[T] = []
    by_rank_0(ranks, what, lambda: loaded.append(load()))
    return loaded[0] if loaded else load()


@dataclass(frozen=True)
class Processes:
    """The ranks of a training and what this one takes; `collectives` is None for one alone.

    `draws` gives the forward pass its random numbers, where it takes some; `some_unused`: there
    are parameters that get no gradient.
    """

    ranks: Ranks
    share: Share = EVERYTHING
    collectives: Collectives | None = None
    draws: WholeBatchDraws | None = None
    some_unused: bool = False

    @property
    def writes(self) -> bool:
        """Whether the record is this process's to write."""
        return self.ranks.rank == 0

    def parallel(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """`model` as the steps call it."""
        if self.collectives is None:
            return model
        with warnings.catch_warnings():  # newer torch has another name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                model,
                process_group=self.collectives.group,
                broadcast_buffers=False,
                init_sync=False,
                find_unused_parameters=self.some_unused,
            )

    def drawing(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        return self.draws or contextlib.nullcontext()

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float, batch: int) -> Tensor:
        """This process's part of the mean loss over a mini-batch of `batch` samples."""
        if self.collectives is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        return total / batch

    def for_backward(self, loss: Tensor) -> Tensor:
        """What to differentiate: `DistributedDataParallel` takes the mean over the ranks."""
        return loss if self.collectives is None else loss * self.ranks.size

    def total(self, numbers: Tensor, where: str) -> Tensor:
        """The sum over the ranks, in rank order, on the CPU."""
        if self.collectives is None:
            return numbers.cpu()
        return torch.stack(self.ranks.gather(numbers, where)).sum(0)

    def check_alike(self, model: nn.Module, step: int) -> None:
        """RunFailed unless all ranks have the same bits of parameters and buffers."""
        if self.collectives is None:
            return
        mine = checksum((*model.parameters(), *model.buffers()))
        if len(set(self.ranks.gather(mine, f"the state after step {step}"))) > 1:
            raise self.ranks.common(
                RunFailed(f"the processes no longer have the same weights after step {step}")
            )

    def close(self) -> None:
        if self.collectives is not None:
            self.collectives.close()

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """A block of steps. Whoever leaves it by an exception lets the others' exchanges break
        off, and who is left so raises what happened there."""
        if self.collectives is None:
            yield
            return
        try:
            yield
        except BaseException as error:
            if error.__traceback__ is not None:
                traceback.clear_frames(error.__traceback__)  # of what holds the connections
            self.collectives.close()
            if not has_broken_off(error):
                raise
            self.ranks.gather(None, "a step that broke off")
            raise broken_off(error) from error


ALONE = Processes(Alone())


def join_processes(
    config: Config, ranks: Ranks, model: nn.Module, sample: Callable[[], Tensor]
) -> Processes:
    """Make `model`, not tracked so far, ready for steps of all `ranks` together. Mutates its BN
    layers. `sample`: makes some inputs of the network.

    UserError where it can't be done so that nothing depends on the number of processes.
    """
    if not isinstance(ranks, TorchRanks) or ranks.size == 1:
        return ALONE
    share = share_of_rank(config, ranks)
    if config.performance.compile:
        raise UserError("performance.compile is for one process: leave it out, or --processes")
    inputs = sample()
    random, some_unused = _try_out(model, inputs)
    draws = WholeBatchDraws(config.training.batch_size, share) if random else None
    collectives = Collectives(ranks, inputs.device)
    if config.statistics.normalization_batch is None:
        normalize_across(model, AcrossRanks(collectives.gather))
    return Processes(ranks, share, collectives, draws, some_unused)


class WholeBatchDraws(TorchFunctionMode):
    """Within the block dropout draws for all samples of a mini-batch, and keeps those of `share`.

    So all ranks' generators stay alike, and give the numbers that one process would draw. It does
    this for dropout, and for what calls `Tensor.bernoulli_` with a number per sample (stochastic
    depth does).
    """

    def __init__(self, batch: int, share: Share) -> None:
        super().__init__()
        self._batch = batch
        self._part = share.of(batch)
        self._own = self._part.stop - self._part.start

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func is Tensor.bernoulli_ and self._is_own(args[0]):
            return args[0].copy_(self._whole(args[0]).bernoulli_(*args[1:], **kwargs)[self._part])
        return func(*args, **kwargs)

    def _dropout(self, func, input, p=0.5, training=True, inplace=False):
        if not training or p == 0.0 or not self.handles(func, (input,)):
            return func(input, p, training, inplace)
        kept = func(self._whole(input).fill_(1), p, True)[self._part]
        return input.mul_(kept) if inplace else input * kept

    def handles(self, func: Callable, args: tuple) -> bool:
        """Whether what `func` draws is drawn for the whole mini-batch."""
        dims = _DROPOUTS.get(func, 0 if func is Tensor.bernoulli_ else None)
        return dims is not None and self._is_own(args[0]) and dims in (0, args[0].dim())

    def _is_own(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and len(tensor) == self._own

    def _whole(self, part: Tensor) -> Tensor:
        """Uninitialized, like `part` but for all samples, and as it would lie in memory."""
        shape = (self._batch, *part.shape[1:])
        outermost = part.dim() < 2 or part.stride(0) == max(part.stride())
        if not outermost or part.numel() == 0:
            return torch.empty(shape, dtype=part.dtype, device=part.device)
        return torch.empty_strided(shape, part.stride(), dtype=part.dtype, device=part.device)


# How many dimensions the input of a batch has; 0: any number.
_DROPOUTS: dict[Callable, int] = {
    F.dropout: 0,
    F.dropout1d: 3,
    F.dropout2d: 4,
    F.dropout3d: 5,
}


class _Watched(TorchFunctionMode):
    """Notes the functions that draw random numbers otherwise than `draws` could."""

    def __init__(self, draws: WholeBatchDraws, device: torch.device) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._draws = draws
        self._device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _DROPOUTS or func is Tensor.bernoulli_:
            known = self._draws.handles(func, args)
        else:
            known = False
        before = _random_state(self._device)
        result = func(*args, **(kwargs or {}))
        if not known and not torch.equal(before, _random_state(self._device)):
            self.found.add(getattr(func, "__name__", str(func)))
        return result


def _try_out(model: nn.Module, sample: Tensor) -> tuple[bool, bool]:
    """Whether a step of the network draws random numbers, and whether parameters get no gradient.

    UserError if numbers are drawn that are not one for each sample.
    """
    device = sample.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        tried = copy.deepcopy(model).train()
        before = _random_state(device)
        tried(sample).float().sum().backward()
        unused = any(p.requires_grad and p.grad is None for p in tried.parameters())
        if torch.equal(before, _random_state(device)):
            return False, unused
        like_draws = WholeBatchDraws(len(sample), EVERYTHING)
        with torch.no_grad(), _Watched(like_draws, device) as watched:
            tried(sample)
    if watched.found:
        raise UserError(
            f"the network draws random numbers by {', '.join(sorted(watched.found))}, which would "
            "depend on the number of processes: train it in one"
        )
    return True, unused


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class Wish(IntFlag):
    SHOW = 1
    SAVE = 2
    STOP = 4


class Wishes:
    """What the display, the clock of the checkpoints and signals ask for, alike on all ranks.

    One process asks them after the step. Several ask at the beginning of a step and tell one
    another while it is computed: at its end nobody has to wait, and what came since counts for
    the next one.
    """

    def __init__(
        self,
        processes: Processes,
        display: Display,
        clock: CheckpointClock,
        interruption: Interruption,
        images: int,
    ) -> None:
        self._processes = processes
        self._display, self._clock, self._interruption = display, clock, interruption
        self._images = images
        self._step = 0
        self._joined: Wish | None = None

    def begin(self, step: int) -> Callable[[], None]:
        """Before the update `step`; what comes back is called after it."""
        self._step = step
        collectives = self._processes.collectives
        if collectives is None:
            return lambda: None
        mine = Wish(0)
        if self._processes.writes:
            mine |= Wish.SHOW * self._show() | Wish.SAVE * self._save()
        joined = collectives.union(mine | Wish.STOP * bool(self._interruption))

        def end() -> None:
            self._joined = Wish(joined())

        return end

    @property
    def show(self) -> bool:
        return self._show() if self._joined is None else Wish.SHOW in self._joined

    @property
    def save(self) -> bool:
        return self._save() if self._joined is None else Wish.SAVE in self._joined

    @property
    def stop(self) -> bool:
        return bool(self._interruption) if self._joined is None else Wish.STOP in self._joined

    def _show(self) -> bool:
        return self._display.step(self._step, self._images)

    def _save(self) -> bool:
        return self._clock.is_due(self._step)
