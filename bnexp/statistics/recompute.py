"""Population statistics of a model's BN layers over given samples, with the weights frozen.

Three methods, from the usual approximation to the definition; `recompute_statistics` states them.
"""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.nn.find import (
    batchnorm_layers,
    refuse_meetings,
    refuse_replicas,
    without_layers,
)
from bnexp.nn.inference import eagerly, inference
from bnexp.nn.intercept import normalized_by
from bnexp.ranks import Alone, Ranks, agree_on_model, checksum, choose_ranks
from bnexp.statistics.exact import exact
from bnexp.statistics.forward import Calls, Forward, Population, Runner, Task, device_of, need_two
from bnexp.statistics.methods import Method
from bnexp.statistics.pass_settings import PassSettings
from bnexp.statistics.per_batch import batch_mean, pooled
from bnexp.statistics.probe import MemoryEstimate, memory_estimate
from bnexp.statistics.progress import Progress, Report, reporting
from bnexp.statistics.spill import memory_bound, reuse_freed_memory
from bnexp.statistics.statistics import Statistics
from bnexp.torch_internals import original_module

METHODS: dict[Method, Callable[[Task], dict[str, Population]]] = {
    "batch-mean": batch_mean,
    "pooled": pooled,
    "exact": exact,
}


def recompute_statistics(
    model: nn.Module,
    batches: Iterable,
    method: Method = "exact",
    device: torch.device | str | None = None,
    progress: Progress = False,
    memory: int | float | str | None = None,
    forward: Forward | None = None,
    stop_after: str | None = None,
    calls: Calls = "each",
    ranks: Ranks | None = None,
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
        there takes memory in proportion to the number of samples. Where passes may influence one
        another (they set something around a BN layer, or hand things on by attributes or
        globals), a warning says so, and they run one after the other instead, once per BN layer:
        the memory of one batch, and so much slower.

    Everything but BN runs in inference mode, without gradients. What the modules hold (buffers,
    training flags, hooks, attributes), torch's and Python's settings that passes take along
    (default dtype, attention kernels, `sys.stdout`, ...), the batches and the RNG states (torch's,
    numpy's, Python's) are as before when this returns or raises; copying the result into the model
    is a separate step.

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
            only layers reached by then are in the result.
        ranks: `bnexp.TorchRanks()`: the population is the union of what all ranks bring, however
            unequal, and every rank gets the same bits. All must call this, with the same weights
            and arguments; one without samples gives no batches. What one rank raises, all raise,
            with its number. Where ranks share a machine (a GPU), `memory` is for all of them
            together. In a process group of several ranks it must be chosen.

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
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown: choose {', '.join(METHODS)}")
    if calls not in get_args(Calls):
        raise UserError(f"calls={calls!r} is unknown: choose {', '.join(get_args(Calls))}")
    if calls == "joint" and (method != "exact" or stop_after is not None):
        raise UserError("calls='joint' is of method='exact', without stop_after")
    ranks = choose_ranks(ranks, "recomputing statistics")
    with (
        ranks.together("recomputing statistics"),
        reporting(progress, method, ranks) as report,
        prepared_task(
            model, batches, device, memory, forward, stop_after, calls, report, ranks
        ) as task,
    ):
        asked = {"method": method, "calls": calls, "stop_after": stop_after}
        ranks.agree(asked, "the arguments of recompute_statistics")
        _agree_on_weights(task)
        found = METHODS[method](task)
        unseen = task.run.unseen
        read = {name for names in ranks.gather(unseen.read, "what was read") for name in names}
    unreached = [name for name in task.layers if name not in {*found, *read}]
    if unreached and stop_after is None:
        warnings.warn(
            f"no batch reached BN layer{'s' * (len(unreached) > 1)} {', '.join(unreached)}: left "
            "out of the statistics",
            stacklevel=2,
        )
    if text := unseen.warning():
        warnings.warn(text, stacklevel=2)
    names = [name for name in task.layers if name in found]
    return Statistics(
        {name: found[name].mean.cpu() for name in names},
        {name: found[name].var.cpu() for name in names},
        {name: found[name].count for name in names},
    )


def estimate_memory(
    model: nn.Module,
    batches: Iterable,
    device: torch.device | str | None = None,
    memory: int | float | str | None = None,
    forward: Forward | None = None,
    stop_after: str | None = None,
) -> MemoryEstimate:
    """What `recompute_statistics(model, batches, "exact", ...)` would need; same arguments.

    Takes the first of `batches` and runs it once. Mutates nothing else.
    """
    report = Report()
    with prepared_task(model, batches, device, memory, forward, stop_after, "each", report) as task:
        return memory_estimate(task)


@contextlib.contextmanager
def prepared_task(
    model: nn.Module,
    batches: Iterable,
    device: torch.device | str | None,
    memory: int | float | str | None,
    forward: Forward | None,
    stop_after: str | None,
    calls: Calls,
    report: Report,
    ranks: Ranks = Alone(),
) -> Iterator[Task]:
    """The task that these arguments mean, with the model in inference mode meanwhile."""
    model = original_module(model)
    refuse_replicas(model)
    refuse_meetings(model)
    layers = batchnorm_layers(model)
    if not layers:
        raise UserError(f"{without_layers(model)}: there are no statistics to recompute")
    if stop_after is not None and stop_after not in layers:
        near = difflib.get_close_matches(stop_after, layers, n=3)
        raise UserError(
            f"stop_after={stop_after!r} is not a BN layer of the model"
            + (f": did you mean {', '.join(map(repr, near))}?" if near else "")
        )
    device = torch.device(device) if device is not None else device_of(model)
    bound = memory_bound(memory, device)
    if device.type == "cpu":
        reuse_freed_memory()
    with eagerly(), inference(model, parameters=True) as given:
        settings = PassSettings()
        run = Runner(model, device, forward, given, settings)
        try:
            yield Task(
                model, given, layers, batches, run, device, bound, stop_after, calls, report, ranks
            )
        finally:
            settings.restore()


def _agree_on_weights(task: Task) -> None:
    """Raise UserError unless all ranks' models have the same parameters, buffers and eps; what BN
    layers keep in buffers takes no part."""
    if task.ranks.size == 1:
        return
    own = {id(b) for layer in task.layers.values() for b in layer.buffers(recurse=False)}
    tensors: dict[str, Tensor] = {
        f"parameter {name!r}": p for name, p in task.model.named_parameters()
    }
    tensors |= {f"buffer {n!r}": b for n, b in task.model.named_buffers() if id(b) not in own}
    mine: dict[str, Any] = {
        what: (str(t.dtype), tuple(t.shape), checksum([t]))
        for what, t in tensors.items()
        if t.layout is torch.strided
    }
    mine |= {f"the eps of BN layer {name!r}": layer.eps for name, layer in task.layers.items()}
    advice = "make the same model and load the same weights on all ranks"
    agree_on_model(task.ranks, mine, "the weights", advice)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block each BN layer normalizes with its own mini-batch, in `eval()` mode too.

    As in training: biased variance over batch and space. But no buffer is touched
    (`num_batches_tracked` included), nothing is tracked, and all other modules stay as the
    caller set them. The layers are restored on exit, also after an exception. A mini-batch with
    one value per channel raises UserError.
    """

    def normalize(name: str, x: Tensor, weight, bias, eps: float) -> Tensor:
        need_two(name, x)
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)

    model_inside = original_module(model)
    with eagerly(), normalized_by(batchnorm_layers(model_inside), normalize):
        yield model
