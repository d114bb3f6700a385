"""One recomputation's forward passes: how they are run, and what BN layers do in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bnexp.errors import NotFinite, UserError
from bnexp.nn.inference import ModelState
from bnexp.nn.unseen import UnseenStatistics
from bnexp.ranks import Ranks
from bnexp.statistics.moments import Moments
from bnexp.statistics.open_blocks import OpenBlocks
from bnexp.statistics.pass_settings import PassSettings
from bnexp.statistics.progress import Report
from bnexp.torch_internals import BatchNormBase
from bnexp.torch_internals import version as version_of

# Normalizing as x·scale + shift in float32 loses log2(|mean| / std) bits; beyond this ratio it
# is done in float64.
_OFFSET = 32.0

# Of a batch with fewer samples, one is too large a part to be run beside it.
_FEWEST_SAMPLES = 4

Calls = Literal["each", "joint"]
Forward = Callable[[nn.Module, Any], Any]


class Done(BaseException):
    """Ends a forward pass whose rest is of no interest."""


@dataclass(frozen=True, eq=False)
class Population:
    """Statistics of one layer: float64 mean and variance per channel, and values per channel."""

    mean: Tensor
    var: Tensor
    count: int

    @staticmethod
    def of(parts: Sequence[Moments]) -> Population:
        merged = Moments.merge(parts)
        return Population(merged.mean, merged.var, merged.count)


@dataclass(frozen=True)
class Task:
    """One recomputation: the model and its BN layers, what to run it on, and who is told.

    given: the model as it was. memory: bound in bytes on what waits. stop_after: the last layer
    wanted, None for all. calls: what "exact" does with layers that are called several times.
    ranks: who brings batches; `batches` are this rank's.
    """

    model: nn.Module
    given: ModelState
    layers: dict[str, BatchNormBase]
    batches: Iterable
    run: Runner
    device: torch.device
    memory: int
    stop_after: str | None
    calls: Calls
    report: Report
    ranks: Ranks

    @property
    def held(self) -> Sequence | None:
        """The batches, where the caller holds them all anyway: they can be run again, and cost no
        further memory."""
        return self.batches if isinstance(self.batches, (list, tuple)) else None

    @property
    def length(self) -> int | None:
        """Number of batches, None where they don't tell."""
        try:
            return len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return None


class Runner:
    """Runs the model on a batch, and lets it write into none of the caller's tensors.

    It gets copies, until `try_out` has seen that it does not work in place on its input. A pass
    that `Done` ends leaves nothing that it had set. `unseen`, entered for that first pass, knows
    what is used behind the BN layers' backs.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        forward: Forward | None,
        given: ModelState,
        settings: PassSettings,
    ) -> None:
        self._model = model
        self._device = device
        self._forward = forward
        self._given = given
        self._settings = settings
        self._writes = True
        self.unseen = UnseenStatistics(model)

    def try_out(self, batch: Any) -> None:
        """Run a batch that nobody else needs, and note whether the model writes into it."""
        before = _versions(batch)
        try:
            self._run(batch)
        except Done:
            self.undo()
        self._writes = any(version is None or version_of(t) != version for t, version in before)

    def __call__(self, batch: Any, state: ModelState | None = None) -> None:
        """state: what a pass that `Done` ends leaves; None is the model as it was given."""
        cell = [copied(batch) if self._writes else batch]
        del batch
        try:
            self._run(cell.pop())
        except Done:
            self.undo(state)

    def sample(self, batch: Any, number: int = 0) -> Tensor | None:
        """A copy of one of several samples, as a batch; None where it isn't known how to take it
        or it would be too large a part of them."""
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if self._forward is not None or type(x) is not Tensor or x.layout is not torch.strided:
            return None
        enough = x.dim() and len(x) >= _FEWEST_SAMPLES
        return x[number : number + 1].clone() if enough else None

    def blocks(self) -> OpenBlocks:
        """To find the `with` and `try` blocks of the model's, between here and a BN layer."""
        return OpenBlocks(Runner._run.__code__)

    def undo(self, state: ModelState | None = None) -> None:
        """Put back what a pass has set that was cut short."""
        (state or self._given).restore(unseen=False)
        self._settings.restore()

    def _run(self, batch: Any) -> None:
        if self._forward is not None:
            self._forward(self._model, batch)
            return
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        del batch  # its labels, say, need not live as long as the pass
        if not isinstance(x, Tensor):
            raise UserError(
                f"a batch is a tensor, or a tuple or list that starts with one, not a "
                f"{type(x).__name__}: pass forward=lambda model, batch: ..."
            )
        x = x.to(self._device, non_blocking=True)
        self._model(x)


def _versions(batch: Any) -> list[tuple[Tensor, int | None]]:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return [(t, None if t.is_inference() else version_of(t)) for t in tensors]


def copied(batch: Any) -> Any:
    """The batch with copies of its tensors, inside lists, tuples and dicts too."""
    return tree_map_only(Tensor, torch.clone, batch)


def device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


class NeededAgain(UserError):
    """Batches that can be read once only are needed once per BN layer."""


def no_batches() -> UserError:
    return UserError("there are no batches to recompute from: is the iterator used up?")


@dataclass(frozen=True)
class Normalizer:
    """A mean and a variance in the form that normalizes inputs of one dtype."""

    mean: Tensor
    var: Tensor
    wide: bool

    @staticmethod
    def of(m: Moments, dtype: torch.dtype, device: torch.device, wide: bool) -> Normalizer:
        dtype = torch.float64 if wide or dtype == torch.float64 else torch.float32
        return Normalizer(m.mean.to(dtype).to(device), m.var.to(dtype).to(device), wide)

    @staticmethod
    def by_its_own(m: Moments, x: Tensor) -> Normalizer:
        """Of a mini-batch's own moments. Doesn't wait for a GPU."""
        wide = x.device.type == "cpu" and is_wide(m, x.device)
        return Normalizer.of(m, x.dtype, x.device, wide)

    def normalize(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        dtype = self.mean.dtype
        weight = weight if weight is None else weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
        if not self.wide:
            return F.batch_norm(x, self.mean, self.var, weight, bias, False, 0.0, eps)
        y = F.batch_norm(x.to(dtype), self.mean, self.var, weight, bias, False, 0.0, eps)
        return y.to(x.dtype)


def is_wide(m: Moments, device: torch.device) -> bool:
    """Whether the means are so far off that normalizing needs float64. Waits for a GPU."""
    if device.type == "mps":
        return False
    mean, m2 = (t.cpu().numpy() for t in (m.mean, m.m2))
    return bool((mean * mean * m.count > _OFFSET**2 * m2).any())


def need_two(name: str, x: Tensor, where: str = "this mini-batch") -> None:
    values = x.numel() // x.shape[1] if x.shape[1] else 0
    if values < 2:
        raise UserError(
            f"BN layer {name!r}: {where} has {values or 'no'} value{'s' * (values == 0)} per "
            "channel, and its own variance needs two: use larger batches, or drop the last one"
        )


def first_non_finite(parts: Sequence[Moments]) -> int | None:
    """Index of the first moments with NaN or infinity in them. Waits for a GPU."""
    sums = torch.stack([part.mean.sum() + part.m2.sum() for part in parts])
    bad = (~torch.isfinite(sums)).nonzero()
    return int(bad[0]) if len(bad) else None


def non_finite(name: str, number: int) -> NotFinite:
    return NotFinite(
        f"NaN or infinity in the input of BN layer {name!r}, batch number {number} (counted from "
        "0): statistics of it would be worthless; check the data, and the weights"
    )
