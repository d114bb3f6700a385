"""Population statistics of a model's BN layers over given samples, with the weights frozen.

Three methods, from the usual approximation to the definition; `recompute_statistics` states them.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import UserError
from .layers import batchnorm_layers, normalized_by, original_module
from .lockstep import FINISHED, STOP, Lockstep
from .memory import Owner, Ownership, Store, format_bytes, free_memory, memory_bound
from .moments import Moments, moments
from .statistics import Statistics

METHODS = ("batch-mean", "pooled", "exact")

Progress = bool | Callable[[int, int | None], None]

_log = logging.getLogger("bnexp.statistics")

# Normalizing as x·scale + shift in float32 loses log2(|mean| / std) bits; beyond this ratio it
# is done in float64.
_OFFSET = 32.0
# How many mini-batches are looked at together for NaN, which on a GPU means waiting for it.
_FOLD = 32


def recompute_statistics(
    model: nn.Module,
    batches: Iterable,
    method: str = "exact",
    device: torch.device | str | None = None,
    progress: Progress = False,
    memory: int | float | str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    stop_after: str | None = None,
) -> Statistics:
    """Population mean and variance of the inputs of every BN layer, over all of `batches`.

    With `μ_b, σ²_b, m_b` the mean, biased variance and number of values per channel of a layer's
    input in mini-batch b of B, `n = Σ m_b`:

    method="batch-mean": `mean = Σ μ_b / B`, `var = Σ σ²_b·m_b/(m_b - 1) / B`. On the way each
        mini-batch is normalized with its own statistics. The variance is the mean of unbiased
        batch variances, without the variance between batch means.
        (Ioffe & Szegedy 2015, Algorithm 2; what `torch.optim.swa_utils.update_bn` does.)
    method="pooled": `mean = Σ m_b μ_b / n`, `var = Σ m_b (σ²_b + (μ_b - mean)²) / n`: the biased
        variance of all values together. On the way each mini-batch is normalized with its own
        statistics. (Wu & Johnson 2021, Appendix; fvcore's `update_bn_stats`.)
    method="exact": as "pooled", but each layer's input comes from layers below that already
        normalize with *their* population statistics. Equal to one training-mode forward pass
        with all samples as a single batch, however they are split into batches. One sweep: all
        batches' forward passes advance in lockstep from BN layer to BN layer, and what waits
        there takes memory in proportion to the number of samples.

    Everything but BN runs in inference mode, without gradients. The model, its buffers, training
    flags and hooks, and the RNG states (torch's, numpy's, Python's) are as before when this
    returns or raises; copying the result into the model is a separate step.

    Args:
        model: any module with BN layers of `torch.nn` or bnexp, or subclasses of them that call
            `F.batch_norm`. One wrapped by `torch.compile` runs eagerly here.
        batches: iterable, read once, of input tensors, or of tuples or lists that start with one.
            Sizes may differ. The split matters to "batch-mean" and "pooled".
        device: where inputs are sent; None means where the model's parameters are.
        progress: True shows a bar on stderr; a callable gets `(done, total or None)`, counted in
            batches, for "exact" in batches times BN layers.
        memory: bound, for "exact", on what waits, on the model's device: bytes, "2GiB", "50%" or
            a share of what is free (0.5); None means half of it. What goes beyond it is put in
            host memory (from a GPU), at most half of what is free there, then in a temporary
            file. The estimate made from the first batch is logged (INFO, "bnexp.statistics")
            and shown with the progress bar before the sweep starts.
        forward: for other inputs: called as `forward(model, batch)` with each batch as it comes,
            on whatever device; its result is ignored.
        stop_after: name of the last BN layer wanted. Nothing behind its first call runs, and
            only layers reached by then are in the result. Without it, too, nothing runs behind
            the last BN layer once all layers have been reached.

    Returns:
        Statistics with float64 tensors on the CPU, `count` in values per channel. A layer called
        several times per forward pass normalizes each call with that call's statistics, as in
        training, and gets the moments of all its calls merged. Layers that no batch reaches
        (auxiliary heads that only train, say) are left out, with a warning.

    Raises:
        UserError: no BN layer; no batches; NaN or infinity (named by layer and batch); a batch
            with one value per channel for the methods that need its own variance; "exact" for a
            model whose path depends on its data or whose forward passes influence one another;
            too little memory and disk (with the number of samples that would fit).
    """
    model = original_module(model)
    layers = batchnorm_layers(model)
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown: choose {', '.join(METHODS)}")
    if not layers:
        raise UserError("the model has no BN layer, so there are no statistics to recompute")
    if stop_after is not None and stop_after not in layers:
        near = difflib.get_close_matches(stop_after, layers, n=3)
        raise UserError(
            f"stop_after={stop_after!r} is not a BN layer of the model"
            + (f": did you mean {', '.join(map(repr, near))}?" if near else "")
        )
    device = torch.device(device) if device is not None else _device_of(model)
    bound = memory_bound(memory, device)
    run = _runner(model, device, forward)
    with _inference(model), _bar(progress, method) as report:
        if method == "exact":
            result = _Exact(layers, run, stop_after, report).over(batches, device, bound)
        else:
            result = _PerBatch(layers, run, method, stop_after, report).over(batches)
    if stop_after is None and (unreached := [name for name in layers if name not in result]):
        warnings.warn(
            f"no batch reached BN layer{'s' * (len(unreached) > 1)} {', '.join(unreached)}: left "
            "out of the statistics",
            stacklevel=2,
        )
    names = [name for name in layers if name in result]
    mean = {name: result[name][0].cpu() for name in names}
    var = {name: result[name][1].cpu() for name in names}
    return Statistics(mean, var, {name: result[name][2] for name in names})


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block each BN layer normalizes with its own mini-batch, in `eval()` mode too.

    As in training: biased variance over batch and space. But no buffer is touched
    (`num_batches_tracked` included), nothing is tracked, and all other modules stay as the
    caller set them. The layers are restored on exit, also after an exception. A mini-batch with
    one value per channel raises UserError.
    """

    def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
        _need_two(name, x)
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)

    model_inside = original_module(model)
    with _eagerly(), normalized_by(batchnorm_layers(model_inside), normalize):
        yield model


# -- running the model ------------------------------------------------------------------------


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _runner(model: nn.Module, device: torch.device, forward: Callable | None) -> Callable:
    def run(batch: Any) -> None:
        if forward is not None:
            forward(model, batch)
            return
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise UserError(
                f"a batch is a tensor, or a tuple or list that starts with one, not a "
                f"{type(x).__name__}: pass forward=lambda model, batch: ..."
            )
        del batch
        x = x.to(device, non_blocking=True)
        model(x)

    return run


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Inference mode for all modules, no gradients; RNG states and flags restored at the end."""
    training = [module for module in model.modules() if module.training]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type != "cpu"}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        for kind in sorted({d.type for d in devices} & {"cuda", "xpu"}):
            indices = [d.index or 0 for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.callback(random.setstate, random.getstate())
        if (numpy_random := sys.modules.get("numpy.random")) is not None:
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        stack.enter_context(_eagerly())
        # The fused encoder layer takes any norm1 and norm2 for LayerNorm.
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(lambda: [setattr(module, "training", True) for module in training])
        for module in training:
            module.training = False
        stack.enter_context(torch.no_grad())
        yield


def _eagerly() -> contextlib.AbstractContextManager:
    """Compiled code must not run: it has the BN layers' own forward built in."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@dataclass(frozen=True)
class _Fixed:
    """A mean and a variance in the form that normalizes inputs of one dtype."""

    mean: Tensor
    var: Tensor
    wide: bool

    @staticmethod
    def of(m: Moments, dtype: torch.dtype, device: torch.device, wide: bool) -> _Fixed:
        dtype = torch.float64 if wide or dtype == torch.float64 else torch.float32
        return _Fixed(m.mean.to(dtype).to(device), m.var.to(dtype).to(device), wide)

    def normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        dtype = self.mean.dtype
        weight = weight if weight is None else weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
        if not self.wide:
            return F.batch_norm(x, self.mean, self.var, weight, bias, False, 0.0, eps)
        y = F.batch_norm(x.to(dtype), self.mean, self.var, weight, bias, False, 0.0, eps)
        return y.to(x.dtype)


def _is_wide(m: Moments, device: torch.device) -> bool:
    """Whether the means are so far off that normalizing needs float64. Waits for a GPU."""
    return device.type != "mps" and bool((m.mean.square() > _OFFSET**2 * m.var).any())


def _by_its_own(m: Moments, x: Tensor) -> _Fixed:
    wide = x.device.type == "cpu" and _is_wide(m, x.device)
    return _Fixed.of(m, x.dtype, x.device, wide)


def _values_per_channel(x: Tensor) -> int:
    return x.numel() // x.shape[1] if x.shape[1] else 0


def _need_two(name: str, x: Tensor, where: str = "this mini-batch") -> None:
    values = _values_per_channel(x)
    if values < 2:
        raise UserError(
            f"BN layer {name!r}: {where} has {values or 'no'} value{'s' * (values == 0)} per "
            "channel, and its own variance needs two: use larger batches, or drop the last one"
        )


def _first_non_finite(parts: list[Moments]) -> int | None:
    """Index of the first moments with NaN or infinity in them. Waits for a GPU."""
    sums = torch.stack([part.mean.sum() + part.m2.sum() for part in parts])
    bad = (~torch.isfinite(sums)).nonzero()
    return int(bad[0]) if len(bad) else None


def _non_finite(name: str, number: int) -> UserError:
    return UserError(
        f"NaN or infinity in the input of BN layer {name!r}, batch number {number} (counted from "
        "0): statistics of it would be worthless; check the data, and the weights"
    )


# -- batch-mean and pooled --------------------------------------------------------------------


class _Done(BaseException):
    """Ends a forward pass whose rest is of no interest."""


class _PerBatch:
    """One batch after the other, each normalized with its own statistics."""

    def __init__(self, layers, run, method: str, stop_after: str | None, report) -> None:
        self._layers = layers
        self._run = run
        self._method = method
        self._stop_after = stop_after
        self._report = report
        self._number = 0
        self._first_path: list[str] | None = None
        self._path: list[str] = []
        self._recent: dict[str, list[tuple[int, Moments]]] = {}
        self._sums: dict[str, Moments | tuple] = {}

    def over(self, batches: Iterable) -> dict[str, tuple[Tensor, Tensor, int]]:
        self._report.start(_length(batches))
        empty = True
        with normalized_by(self._layers, self._normalize):
            for self._number, batch in enumerate(batches):
                empty = False
                self._path = []
                with contextlib.suppress(_Done):
                    self._run(batch)
                if self._first_path is None and set(self._path) == self._layers.keys():
                    self._first_path = self._path
                if self._number % _FOLD == _FOLD - 1:
                    self._fold()
                self._report.advance()
        if empty:
            raise _no_batches()
        self._fold()
        return {name: self._result(sums) for name, sums in self._sums.items()}

    def _normalize(self, name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
        _need_two(name, x, f"batch number {self._number} (counted from 0)")
        m = moments(x)
        self._recent.setdefault(name, []).append((self._number, m))
        self._path.append(name)
        if name == self._stop_after or self._path == self._first_path:
            raise _Done
        return _by_its_own(m, x).normalize(x, weight, bias, eps)

    def _fold(self) -> None:
        for name, parts in self._recent.items():
            bad = _first_non_finite([m for _, m in parts])
            if bad is not None:
                raise _non_finite(name, parts[bad][0])
            parts = [m for _, m in parts]
            before = self._sums.get(name)
            if self._method == "pooled":
                self._sums[name] = Moments.merge([before, *parts] if before else parts)
            else:
                sums = (
                    torch.stack([m.mean for m in parts]).sum(0),
                    torch.stack([m.unbiased_var for m in parts]).sum(0),
                    len(parts),
                    sum(m.count for m in parts),
                )
                self._sums[name] = (
                    tuple(map(sum, zip(before, sums, strict=True))) if before else sums
                )
        self._recent = {}

    def _result(self, sums: Moments | tuple) -> tuple[Tensor, Tensor, int]:
        if isinstance(sums, Moments):
            return sums.mean, sums.var, sums.count
        mean, var, batches, count = sums
        return mean / batches, var / batches, count


def _length(batches: Iterable) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None


def _no_batches() -> UserError:
    return UserError("there are no batches to recompute from: is the iterator used up?")


# -- exact ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """What `method="exact"` needs, in bytes, measured on the first batch.

    batches: how many there are, None if unknown. waiting: what one batch holds while it waits,
    at the BN layer (`layer`) where that is most: the layer's input, live skips, the model's
    input. working: the most that one batch holds while it runs. bound: what `memory` allows.
    """

    batches: int | None
    waiting: int
    layer: str
    working: int
    bound: int

    @property
    def total(self) -> int | None:
        """All batches waiting at `layer`, and one running."""
        return None if self.batches is None else self.batches * self.waiting + self.working

    @property
    def elsewhere(self) -> int | None:
        """How much of it must wait outside the bound: in host memory or on disk."""
        return None if self.total is None else max(0, self.total - self.bound)

    def __str__(self) -> str:
        each = f"{format_bytes(self.waiting)} each waiting at {self.layer!r}"
        if self.total is None:
            return f"an unknown number of batches, {each}; bound {format_bytes(self.bound)}"
        text = f"{self.batches} batches, {each}: {format_bytes(self.total)} in all"
        if self.elsewhere:
            text += (
                f", {format_bytes(self.elsewhere)} of it beyond the bound of "
                f"{format_bytes(self.bound)}, put elsewhere meanwhile"
            )
        return text


def estimate_memory(
    model: nn.Module,
    batches: Iterable,
    device: torch.device | str | None = None,
    memory: int | float | str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    stop_after: str | None = None,
) -> MemoryEstimate:
    """What `recompute_statistics(model, batches, "exact", ...)` would need; same arguments.

    Takes the first of `batches` and runs it once. Mutates nothing else.
    """
    model = original_module(model)
    layers = batchnorm_layers(model)
    device = torch.device(device) if device is not None else _device_of(model)
    bound = memory_bound(memory, device)
    with _inference(model), _bar(False, "exact") as report:
        exact = _Exact(layers, _runner(model, device, forward), stop_after, report)
        first = next(iter(batches), None)
        if first is None:
            raise _no_batches()
        exact.probe(first, _belongs_to_caller(batches))
        return exact.estimate(_length(batches), bound)


@dataclass(frozen=True)
class _Visit:
    """One call of one BN layer in one forward pass."""

    name: str
    moments: Moments
    dtype: torch.dtype
    device: torch.device
    held: int = 0


class _Exact:
    """All batches in lockstep from BN layer to BN layer."""

    def __init__(self, layers, run, stop_after: str | None, report) -> None:
        self._layers = layers
        self._run = run
        self._stop_after = stop_after
        self._report = report
        self._ownership: Ownership | None = None
        self._probed: list[_Visit] = []
        self._working = 0
        # In the order in which the forward pass calls the layers:
        self._population: list[tuple[str, Moments, _Fixed]] = []
        self._first_batch: list[Moments] = []

    def over(
        self, batches: Iterable, device: torch.device, bound: int
    ) -> dict[str, tuple[Tensor, Tensor, int]]:
        borrowed = _belongs_to_caller(batches)
        iterator = iter(batches)
        start = _take(iterator, 1)
        if not start:
            raise _no_batches()
        again = _copy(start[0])
        self.probe(start[0], borrowed)
        start += _take(iterator, 1)
        if len(start) == 1:
            self._population = [(v.name, self._whole([v]), None) for v in self._probed]
            return self._result()
        estimate = self.estimate(_length(batches), bound)
        _log.info("exact: %s", estimate)
        self._report.note(str(estimate))
        legs = len(self._probed) + (not self._complete([v.name for v in self._probed]))
        self._report.start(estimate.batches and estimate.batches * legs)
        if estimate.elsewhere == 0:
            self._sweep(start, iterator, borrowed, Lockstep())
        else:
            self._sweep_bounded(start, iterator, borrowed, estimate, device)
        self._check_independence(again)
        return self._result()

    def probe(self, batch: Any, borrowed: bool) -> None:
        """Run one batch alone, to see the way through the model and what is held where."""
        owner = Owner()
        with self._owning(Ownership()) as ownership:

            def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
                held = owner.bytes
                with self._unowned():
                    m = moments(x)
                    fixed = _by_its_own(m, x)
                self._probed.append(_Visit(name, m, x.dtype, x.device, held))
                if name == self._stop_after:
                    raise _Done
                return fixed.normalize(x, weight, bias, eps)

            with normalized_by(self._layers, normalize), contextlib.suppress(_Done):
                # A copy: a model may work in place on its input, and this one is needed again.
                batch = _copy(batch)
                ownership.current = owner
                if not borrowed:
                    batch = _copy(batch)
                self._run(batch)
        self._working = owner.peak
        if not self._probed:
            raise UserError("the forward pass reaches no BN layer: nothing to recompute")

    def estimate(self, batches: int | None, bound: int) -> MemoryEstimate:
        most = max(self._probed, key=lambda visit: visit.held)
        return MemoryEstimate(batches, most.held, most.name, self._working, bound)

    def _sweep_bounded(
        self, start, iterator, borrowed: bool, estimate: MemoryEstimate, device: torch.device
    ) -> None:
        """The sweep with what waits beyond the bound put into a store."""
        size = _samples(start[0])
        host = 0 if device.type == "cpu" else free_memory(torch.device("cpu")) // 2

        def that_fit(batches: int) -> str:
            return f"about {batches * size} samples" if size else f"about {batches} batches"

        if estimate.working > estimate.bound:
            raise UserError(
                f"one batch needs {format_bytes(estimate.working)} and memory allows "
                f"{format_bytes(estimate.bound)}: use smaller batches or raise memory"
            )
        room = estimate.bound - estimate.working + host + Store.disk_left()
        if estimate.elsewhere is not None and estimate.batches * estimate.waiting > room:
            raise UserError(
                f"exact needs {format_bytes(estimate.total)} for what waits, and memory, host "
                f"and disk have {format_bytes(room)}: {that_fit(room // estimate.waiting)} would "
                "fit; use fewer, point TMPDIR at a larger disk, or use method='pooled'"
            )
        with contextlib.closing(Store(host)) as store, self._owning(Ownership(store)) as owning:
            lockstep = Lockstep(owning, estimate.bound, estimate.working)
            try:
                self._sweep(start, iterator, borrowed, lockstep)
            except OSError as error:
                if error is not store.error:
                    raise
                raise UserError(
                    f"the disk under {store.folder()} is full ({error.strerror}): "
                    f"{that_fit(lockstep.started)} were too many for 'exact'; use fewer, point "
                    "TMPDIR at a larger disk, or use method='pooled'"
                ) from error

    def _sweep(self, start: list, iterator: Iterator, borrowed: bool, lockstep: Lockstep) -> None:
        def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
            with self._unowned():
                visit = _Visit(name, moments(x), x.dtype, x.device)
            fixed = lockstep.wait(visit)
            return fixed.normalize(x, weight, bias, eps)

        def job(cell: list) -> None:
            if self._ownership is not None and not borrowed:
                # So that the pass owns its input, which may then wait elsewhere too.
                cell.append(_copy(cell.pop()))
            self._run(cell.pop())

        def jobs() -> Iterator[Callable[[], None]]:
            while start:
                yield functools.partial(job, [start.pop(0)])
            for batch in iterator:
                yield functools.partial(job, [batch])

        with normalized_by(self._layers, normalize):
            lockstep.run(jobs(), self._meet, self._report.advance)

    def _meet(self, visits: list) -> object:
        """All batches have arrived: the population statistics of this call are final."""
        reached = [None if visit is FINISHED else visit.name for visit in visits]
        for number, name in enumerate(reached):
            if name != reached[0]:
                raise UserError(
                    f"batch number {number} (counted from 0) goes on to {_place(name)} where "
                    f"batch 0 goes on to {_place(reached[0])}: the model's path depends on its "
                    "data, so 'exact' is not defined for it; use method='pooled'"
                )
        whole = self._whole(visits)
        first = visits[0]
        wide = _is_wide(whole, first.device)
        self._population.append(
            (first.name, whole, _Fixed.of(whole, first.dtype, first.device, wide))
        )
        self._first_batch.append(first.moments)
        path = [name for name, _, _ in self._population]
        if path == [v.name for v in self._probed] and self._complete(path):
            return STOP
        return STOP if first.name == self._stop_after else self._population[-1][2]

    def _complete(self, path: list[str]) -> bool:
        """Whether nothing of interest can follow on the calls of these layers."""
        return self._stop_after in path or set(path) == self._layers.keys()

    @staticmethod
    def _whole(visits: list[_Visit]) -> Moments:
        name = visits[0].name
        bad = _first_non_finite([visit.moments for visit in visits])
        if bad is not None:
            raise _non_finite(name, bad)
        parts = [visit.moments for visit in visits if visit.moments.count]
        if sum(part.count for part in parts) < 2:
            raise UserError(
                f"BN layer {name!r} has one value per channel over all batches: a variance needs "
                "at least two"
            )
        return Moments.merge(parts)

    def _check_independence(self, batch: Any) -> None:
        """Run the first batch again, alone: it must see what it saw among the others.

        It does not if the model hands things from layer to layer by way of attributes, hooks or
        globals, which another pass overwrites in between.
        """
        calls = iter(zip(self._population, self._first_batch, strict=True))
        remaining = len(self._population)

        def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
            nonlocal remaining
            (expected_name, _, fixed), expected = next(calls, ((None, None, None), None))
            if name != expected_name or not _agree(moments(x), expected, x.dtype):
                raise UserError(
                    f"the model's forward passes influence one another (seen at BN layer "
                    f"{name!r}: it keeps data of one pass in attributes, hooks or globals), so "
                    "they cannot advance in lockstep for 'exact': use method='pooled'"
                )
            remaining -= 1
            if not remaining:
                raise _Done
            return fixed.normalize(x, weight, bias, eps)

        with normalized_by(self._layers, normalize), contextlib.suppress(_Done):
            self._run(batch)

    def _result(self) -> dict[str, tuple[Tensor, Tensor, int]]:
        calls: dict[str, list[Moments]] = {}
        for name, whole, _ in self._population:
            calls.setdefault(name, []).append(whole)
        merged = {name: Moments.merge(parts) for name, parts in calls.items()}
        return {name: (m.mean, m.var, m.count) for name, m in merged.items()}

    @contextlib.contextmanager
    def _owning(self, ownership: Ownership) -> Iterator[Ownership]:
        self._ownership = ownership
        try:
            with ownership:
                yield ownership
        finally:
            self._ownership = None

    @contextlib.contextmanager
    def _unowned(self) -> Iterator[None]:
        """What is made within is not the pass's, and never put away."""
        if self._ownership is None:
            yield
            return
        owner, self._ownership.current = self._ownership.current, None
        yield
        self._ownership.current = owner


def _place(name: str | None) -> str:
    return "the end" if name is None else f"BN layer {name!r}"


def _agree(a: Moments, b: Moments, dtype: torch.dtype) -> bool:
    """Whether two moments of the same values differ by no more than rounding could do."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
    std = b.var.sqrt() + 1e-5 * b.mean.abs() + 1e-12
    return a.count == b.count and bool(
        ((a.mean - b.mean).abs() <= tolerance * std).all()
        and ((a.var.sqrt() - b.var.sqrt()).abs() <= tolerance * std).all()
    )


def _belongs_to_caller(batches: Iterable) -> bool:
    """Whether the caller holds all batches anyway, so that they cost no further memory."""
    return isinstance(batches, (list, tuple))


def _take(iterator: Iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


def _copy(batch: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, batch)


def _samples(batch: Any) -> int | None:
    """Number of samples in a batch of the usual kinds."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    return _samples(batch[0]) if isinstance(batch, (tuple, list)) and batch else None


# -- progress ---------------------------------------------------------------------------------


class _Report:
    """Progress to nobody, or to a callable."""

    def __init__(self, tell: Callable[[int, int | None], None] | None = None) -> None:
        self._tell = tell
        self._done = 0
        self._total: int | None = None

    def start(self, total: int | None) -> None:
        self._total = total

    def note(self, text: str) -> None:
        pass

    def advance(self) -> None:
        self._done += 1
        if self._tell is not None:
            self._tell(self._done, self._total)


@contextlib.contextmanager
def _bar(progress: Progress, method: str) -> Iterator[_Report]:
    if progress is False:
        yield _Report()
        return
    if progress is not True:
        yield _Report(progress)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"statistics ({method})", total=None)
        report = _Report(lambda done, total: bar.update(task, completed=done, total=total))
        report.note = lambda text: console.print(f"exact: {text}", highlight=False)
        yield report
