"""Feeding any number of estimators from one training run.

Training never reads running statistics, so one run can feed as many estimators of them as one
likes. The native BN kernels leave the batch moments of all layers in one flat tensor (see
`bnexp.nn.batchnorm.MomentsSlot`), and a step of all averaging estimators over all layers is one
`lerp_`, with six small launches around it, however many layers there are. Nothing waits for the
device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from bnexp.errors import UserError
from bnexp.nn.batchnorm import MomentsSlot, TrackedBatchNorm, turn_into
from bnexp.nn.convert import followed_layers
from bnexp.nn.find import batchnorm_layers, refuse_replicas
from bnexp.ranks import Alone, Ranks, agree_on_model, choose_ranks
from bnexp.statistics.banks import Bank, merged_averages
from bnexp.statistics.rules import Rule
from bnexp.statistics.statistics import Statistics, check_range
from bnexp.torch_internals import BatchNormBase, outside_of_graphs, version

_Conversion = tuple[TrackedBatchNorm, type[BatchNormBase]]

# How many sets of layers that took part in a step are remembered on the device.
_PATTERNS = 64


class StatisticsTracker:
    """Running statistics of a model's BN layers by several estimators at once.

        tracker = StatisticsTracker(model, {"ema-0.9": Ema(0.9), "average": Cumulative()})
        for x, y in batches:
            loss(model(x), y).backward()
            tracker.update()
            ...
        tracker.statistics()["average"]

    While it is attached, the first estimator is what `running_mean` and `running_var` show (the
    layers' own `momentum` has no effect), and `num_batches_tracked` counts on. Layers of
    `torch.nn` are converted in place, and turned back by `close` unless they were frozen or given
    ghost batches meanwhile. What training computes is unchanged, bit for bit.

    **What counts.** Every forward pass of a layer in training mode is one mini-batch for that
    layer, as in PyTorch. Each layer counts for itself:

    * gradient accumulation: `update()` after each forward pass. If a layer runs again before
      `update()`, in eval mode or the other, or the model's `state_dict` is taken, `update()` is
      called by itself first: nothing is lost or counted twice, at the price of one more update.
      The same goes for a layer that is called several times in one forward pass: each call is a
      mini-batch;
    * layers that did not run, or ran in `eval()` mode or frozen (`freeze_batchnorm`), keep their
      estimates, counts and buffers. `requires_grad_(False)` alone changes nothing here;
    * activation checkpointing: the forward pass that is repeated inside the backward pass does
      not count again (with plain PyTorch layers it does). Checkpointing a compiled model is not
      supported while it is tracked;
    * layers with `track_running_stats=False` are left alone, and so is a layer while its
      `momentum` is set to None, as `torch.optim.swa_utils.update_bn` and the like do and undo: it
      averages by itself, into its buffers.

    **The buffers** are views into the tracker's memory. `model.to(...)`, `half()` and
    `load_state_dict` work at any time. A first estimator that is a plain `Ema` goes on from
    whatever is written into them (a loaded checkpoint, `reset_running_stats`); any other first
    estimator overwrites it in the layer's next step. Copies and pickles of the model are not
    tracked.

    Sums are kept in float64 (float32 on MPS, which has no other).

    Args:
        model: any module with BN layers of `torch.nn` or bnexp, or subclasses of them that call
            `F.batch_norm`.
        estimators: name -> rule. Before its first mini-batch, each reports the running buffers
            that the layer had when the tracker was made.
        ranks: `bnexp.TorchRanks()` in training with several ranks; see below. `bnexp.Alone()` to
            follow this rank's mini-batches alone, as where BN normalizes across ranks.

    **Over several ranks** the mini-batch of a step is what all ranks have in it: its mean and
    variance are the averages over the ranks' (and over the sub-batches within them), as one process
    with `normalization_batch` has them. All ranks make the tracker, and call `update` for every
    step. `Ema` and `Cumulative` are linear in that, so each rank averages its own, which is what
    its buffers show, until `merge`, `statistics`, `state_dict`, `load_state_dict` or `close` merge
    the estimates, buffers included: to be called by all ranks alike. If there is another estimator,
    every `update` gathers the step's moments, and all ranks are alike at any time.

    Raises:
        UserError: no estimators, something else than an estimator, a layer that can't be
            followed (`SyncBatchNorm`, a lazy layer without shape), a model that has a tracker
            already, or one of several ranks where `ranks` chooses nothing; nothing has changed
            then. In a forward pass: a subclass with a forward of its own that never calls
            `F.batch_norm`.
    """

    def __init__(
        self, model: nn.Module, estimators: Mapping[str, Rule], ranks: Ranks | None = None
    ) -> None:
        if not estimators:
            raise UserError("StatisticsTracker needs at least one estimator, such as Ema(0.9)")
        for name, rule in estimators.items():
            if not isinstance(rule, Rule):
                raise UserError(
                    f"estimator {name!r} is {rule!r}: use Ema(decay), Cumulative() or Pooled()"
                )
        self._ranks = choose_ranks(ranks, "a StatisticsTracker")
        self.estimators = dict(estimators)
        asked = {name: repr(rule) for name, rule in estimators.items()}
        self._ranks.agree(asked, "the estimators of a StatisticsTracker")
        several = self._ranks.size > 1
        self._merges = several and all(rule.bank().linear for rule in estimators.values())
        self._gathers = several and not self._merges
        self._layers, self._converted = _tracked_layers(model, self._ranks)
        # Of each layer on this rank: mini-batches, and the sub-batches in them.
        self._fed, self._parts = [0] * len(self._layers), [0] * len(self._layers)
        self._groups: list[_Group] = []
        self._closed = False
        # For layers inside a compiled graph: the update itself is not to be traced.
        self._feed = outside_of_graphs(lambda: self._feed_layer())
        self._attach()

    def update(self) -> None:
        """Feed the batch moments that are waiting to all estimators. Call after each forward.

        Mutates the estimators and the running buffers; needs no gradients. Does nothing if no
        layer ran since the last call. Never waits for the device, unless buffers are float16: a
        variance beyond their range raises UserError. In a CUDA graph, capture it together with
        the forward pass, after a step outside of the graph.
        """
        if not self._closed:
            self._take_in(self._adopt_moved_buffers(), meet=True)

    @torch.no_grad()
    def merge(self) -> None:
        """Give all ranks the merged estimates, in their buffers too. To be called by all of them.

        Waiting moments are fed first. Does no more than that without other ranks, and where every
        update gathers. Ranks that had unequally many mini-batches count by theirs.
        """
        self.update()
        if not self._merges or self._closed:
            return
        mine = self._collect()
        widths = torch.tensor([layer.num_features for layer in self._layers.values()], device="cpu")
        pairs = zip(self._parts, self._fed, strict=True)
        shares = torch.tensor([parts / fed if fed else 0.0 for parts, fed in pairs], device="cpu")
        shares = shares.double().repeat_interleave(widths)
        every = self._ranks.gather((mine, shares), "the statistics of a tracker")
        states = [state for state, _ in every]
        mine["averages"], mine["mass"] = merged_averages(
            [state["averages"] for state in states],
            [state["mass"] for state in states],
            [share for _, share in every],
        )
        mine["mini_batches"] = torch.stack([state["mini_batches"] for state in states]).amax(0)
        self._distribute(mine)
        self._show()

    def _feed_layer(self) -> None:
        """What a layer calls that needs its slot, or its buffers, now."""
        if torch.compiler.is_compiling():
            raise UserError(
                "a StatisticsTracker holds moments of a mini-batch it has not taken in yet: call "
                "its update() before the model is exported"
            )
        if self._closed:
            return
        # Buffers that are other tensors for the time of a `functional_call` are not adopted.
        slots = [slot for group in self._groups for slot in group.slots]
        self._take_in(any(slot.moved for slot in slots) and self._adopt_moved_buffers())

    def _take_in(self, moved: bool, meet: bool = False) -> None:
        if self._merges:
            self._count_parts()
        for group in self._groups:
            if self._gathers and (meet or group.waiting()):
                group.update(self._ranks)
            else:
                group.update(Alone())
        if moved:
            self._move()

    def _count_parts(self) -> None:
        for group in self._groups:
            for index, slot in zip(group.layer_index.tolist(), group.slots, strict=True):
                self._fed[index] += slot.filled
                self._parts[index] += slot.parts * slot.filled

    @torch.no_grad()
    def statistics(self) -> dict[str, Statistics]:
        """Estimator name -> copies of its means, variances and counts of mini-batches.

        Tensors have the device and dtype of the layers' running buffers, so those of the first
        estimator equal the buffers. Waiting moments are fed first. Synchronizes with the device.
        """
        self.merge()
        result = {}
        batches = torch.zeros(len(self._layers), dtype=torch.int64, device="cpu")
        for group in self._groups:
            batches[group.layer_index] = group.counts[1].cpu()
        count = dict(zip(self._layers, batches.tolist(), strict=True))
        for name in self.estimators:
            mean: dict[str, Tensor] = {}
            var: dict[str, Tensor] = {}
            for group in self._groups:
                value = group.value(name)
                if group.half:
                    check_range(f"estimate {name!r}", value, torch.float16)
                value = value.to(group.shown.dtype)
                for layer, columns in group.columns.items():
                    mean[layer], var[layer] = value[0, columns].clone(), value[1, columns].clone()
            result[name] = Statistics(
                {layer: mean[layer] for layer in self._layers},
                {layer: var[layer] for layer in self._layers},
                dict(count),
            )
        return result

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: tensors (copies, on the CPU) and plain values.

        `torch.load(..., weights_only=True)` can read it. The layers' buffers belong to the
        model's own `state_dict`; load that as well.
        """
        self.merge()
        return {
            "estimators": {name: repr(rule) for name, rule in self.estimators.items()},
            "layers": {name: layer.num_features for name, layer in self._layers.items()},
            **self._collect(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, on whatever device this model is.

        Mutates the estimators, and the running buffers of the layers that had mini-batches.

        Raises:
            UserError: if the estimators or the layers are not the same ones in the same order.
                Nothing has changed then.
        """
        ours = self.state_dict()
        for what in ("estimators", "layers"):
            theirs = state.get(what)
            if not isinstance(theirs, Mapping) or list(theirs.items()) != list(ours[what].items()):
                raise UserError(
                    f"the saved tracker had other {what}: {_difference(theirs, ours[what])}"
                )
        for name, tensor in ours.items():
            if isinstance(tensor, Tensor) and (
                not isinstance(state.get(name), Tensor) or state[name].shape != tensor.shape
            ):
                raise UserError(f"the saved tracker state is damaged: {name!r} does not fit")
        self._distribute(state)
        self._show()

    def close(self) -> None:
        """Detach: the model is as plain as before, its buffers keep the first estimator's values.

        Waiting moments are fed first. `statistics` and `state_dict` can still be read afterwards.
        """
        if not self._closed:
            self.merge()
            self._detach()

    @torch.no_grad()
    def _detach(self) -> None:
        self._closed = True
        for group in self._groups:
            for layer, views in group.views:
                del layer.slot
                layer._buffers.update({name: view.clone() for name, view in views})
        for layer, parent in self._converted:
            if not layer.is_set:
                turn_into(layer, parent)

    def __enter__(self) -> StatisticsTracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self._ranks.size == 1:
            self.close()
        elif not self._closed:  # the other ranks may be anywhere
            self._detach()

    def _attach(self) -> None:
        """Group the layers by device and dtype, and give them slots and buffers in our memory.

        Never inference tensors: training saves them for its backward pass.
        """
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, layer in enumerate(self._layers.values()):
            mean = layer.get_buffer("running_mean")
            kinds.setdefault((mean.device, mean.dtype), []).append(index)
        with torch.inference_mode(False):
            self._groups = [
                _Group(self.estimators, self._feed, self._layers, index, device)
                for (device, _), index in kinds.items()
            ]

    def _show(self) -> None:
        """Write the first estimator into the buffers of the layers that had mini-batches."""
        for group in self._groups:
            fed = group.counts[1].cpu() > 0
            group.show(fed.repeat_interleave(group.widths).to(group.shown.device))

    def _move(self) -> None:
        """Follow layers that have other buffers now, keeping every number."""
        for group in self._groups:
            for layer, views in group.views:
                for name, view in views:
                    layer.get_buffer(name).copy_(view)
        state = self._collect()
        self._attach()
        self._distribute(state)

    def _adopt_moved_buffers(self) -> bool:
        """Copy the buffers that are no longer our views (moved, cast, replaced) into our memory."""
        moved = False
        for group in self._groups:
            for layer, views in group.views:
                buffers = layer._buffers
                for name, view in views:
                    buffer = buffers[name]
                    if buffer is None:
                        raise UserError(
                            f"{name} was removed from a layer that a StatisticsTracker follows; "
                            "close() the tracker first"
                        )
                    if buffer is not view:
                        view.copy_(buffer)
                        moved = True
        return moved

    def _collect(self) -> dict[str, Tensor]:
        """The state of all groups, in the order of the model's layers."""
        result: dict[str, Tensor] = {}
        for group in self._groups:
            for name, tensor, dim, index, total in group.state():
                if name not in result:
                    shape = list(tensor.shape)
                    shape[dim] = total
                    result[name] = torch.zeros(shape, dtype=_on_host(tensor.dtype), device="cpu")
                result[name].index_copy_(dim, index, tensor.to("cpu", _on_host(tensor.dtype)))
        return result

    def _distribute(self, state: Mapping[str, Tensor]) -> None:
        for group in self._groups:
            for name, tensor, dim, index, _ in group.state():
                tensor.copy_(state[name].cpu().index_select(dim, index))


class _Group:
    """The tracked layers of one device and dtype: L layers, C channels in all, flat.

    batch: (2, C), the slots: batch means and unbiased variances. shown: (2, C), the layers'
    running buffers. counts: (2, L), `num_batches_tracked` and the mini-batches fed since the
    tracker was made. start: (2, C), the running buffers when it was made, in the dtype of the sums.
    banks: the estimators, by kind.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        feed: Callable[[], None],
        layers: Mapping[str, TrackedBatchNorm],
        index: list[int],
        device: torch.device,
    ) -> None:
        names, everything = list(layers), list(layers.values())
        mine = [everything[i] for i in index]
        widths = torch.tensor([layer.num_features for layer in everything], device="cpu")
        ends = widths.cumsum(0)
        self.layer_index = torch.tensor(index, device="cpu")
        self.channel_index = torch.cat(
            [torch.arange(int(ends[i] - widths[i]), int(ends[i]), device="cpu") for i in index]
        )
        self.layers_in_all, self.channels_in_all = len(everything), int(ends[-1])
        self.widths = widths[self.layer_index]
        starts = (self.widths.cumsum(0) - self.widths).tolist()
        self.columns = {
            names[i]: slice(start, start + everything[i].num_features)
            for i, start in zip(index, starts, strict=True)
        }

        self.shown = torch.stack(
            [
                torch.cat([layer.get_buffer(name) for layer in mine])
                for name in ("running_mean", "running_var")
            ]
        )
        self.batch = torch.zeros_like(self.shown)
        self.counts = torch.zeros(2, len(mine), dtype=torch.int64, device=device)
        self.views: list[tuple[TrackedBatchNorm, list[tuple[str, Tensor]]]] = []
        self.slots: list[MomentsSlot] = []
        # `.data`: a version counter of their own. Autograd saves buffers and slots in a forward
        # pass and would take our updates, which its backward pass doesn't read, for a mistake.
        # And what is written into running buffers behind our back shows in theirs.
        self.buffers = self.shown.data
        self.known_version = -1
        for i, (layer, columns) in enumerate(zip(mine, self.columns.values(), strict=True)):
            mean, var = self.buffers[:, columns]
            views = [("running_mean", mean), ("running_var", var)]
            if layer.num_batches_tracked is not None:
                self.counts[0, i].copy_(layer.num_batches_tracked)
                views.append(("num_batches_tracked", self.counts[0, i]))
            layer._buffers.update(views)
            self.views.append((layer, views))
            # One counter for each: a compiled layer's writes count, a native kernel's don't.
            mean, var = self.batch[:, columns]
            unused = layer.slot is not None and layer.slot.unused
            layer.slot = MomentsSlot(feed, mean.data, var.data, unused)
            self.slots.append(layer.slot)

        kept_in = torch.float32 if device.type == "mps" else torch.float64
        self.start = self.shown.to(kept_in, copy=True)
        by_kind: dict[type[Bank], dict[str, Rule]] = defaultdict(dict)
        for name, rule in rules.items():
            by_kind[rule.bank()][name] = rule
        self.banks = {kind: kind(mine, self.start) for kind, mine in by_kind.items()}
        self.bank_of = {name: self.banks[rule.bank()] for name, rule in rules.items()}
        self.shows = next(iter(rules))
        self.half = self.shown.dtype == torch.float16
        self.values: list[int] = []
        self.count = self.start[0]
        self.seen: dict[tuple[bool, ...], tuple[Tensor, Tensor]] = {}

    def waiting(self) -> bool:
        return any(slot.filled for slot in self.slots)

    def update(self, ranks: Ranks) -> None:
        filled = tuple(slot.filled for slot in self.slots)
        for slot in self.slots:
            slot.filled = slot.busy = slot.moved = False
        if version(self.buffers) != self.known_version:
            self.bank_of[self.shows].follow(self.shows, self.shown)
            self.known_version = version(self.buffers)
        batch, values = self.batch, [slot.values for slot in self.slots]
        if ranks.size > 1:
            batch, values, filled = self._of_all(ranks, values, filled)
        if not any(filled):
            return
        channels, layers = (None, 1) if all(filled) else self._which(filled)
        if self.half:
            _check_half_precision(batch)
        batch = batch.to(self.start.dtype)
        for bank in self.banks.values():
            bank.update(batch, partial(self._counts, values), channels)
        self.counts.add_(layers)
        self.show(channels)

    def _which(self, filled: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        """(C,) and (L,) bool: the channels and layers that ran, uploaded once per set of them."""
        if filled not in self.seen:
            if len(self.seen) >= _PATTERNS:
                self.seen.clear()
            layers = torch.tensor(filled, device="cpu")
            device = self.shown.device
            self.seen[filled] = layers.repeat_interleave(self.widths).to(device), layers.to(device)
        return self.seen[filled]

    def _of_all(
        self, ranks: Ranks, values: list[int], filled: tuple[bool, ...]
    ) -> tuple[Tensor, list[int], tuple[bool, ...]]:
        """The mini-batch of all ranks: moments averaged over their sub-batches, values per channel
        by layer, and which layers ran on any of them."""
        parts = [slot.parts if ran else 0 for slot, ran in zip(self.slots, filled, strict=True)]
        every = ranks.gather((self.batch, values, parts), "a mini-batch of a tracker")
        shares = torch.tensor([share for *_, share in every], dtype=torch.float64, device="cpu")
        weights = shares.repeat_interleave(self.widths, 1)
        moments = [
            torch.where(weight > 0, batch * weight, 0.0)
            for (batch, *_), weight in zip(every, weights, strict=True)
        ]
        batch = (sum(moments) / weights.sum(0).clamp_min(1)).to(self.start.device)
        ran = (shares > 0).tolist()
        values = [
            sum(of_rank[i] for (_, of_rank, _), there in zip(every, ran, strict=True) if there[i])
            for i in range(len(self.slots))
        ]
        return batch, values, tuple(any(there) for there in zip(*ran, strict=True))

    def _counts(self, values: list[int]) -> Tensor:
        """(C,) values per channel in this mini-batch, uploaded when they change."""
        if values != self.values:
            count = torch.tensor(values, device="cpu").repeat_interleave(self.widths)
            self.count = count.to(self.start.device, self.start.dtype)
            self.values = values
        return self.count

    def value(self, name: str) -> Tensor:
        """(2, C) means and variances by the estimator `name`; may be its own memory."""
        return self.bank_of[name].value(name)

    def show(self, channels: Tensor | None) -> None:
        """Write the first estimator into the running buffers of the channels (C,) bool, or all."""
        value = self.value(self.shows)
        if self.half:
            check_range("running statistics", value, torch.float16)
        self.shown.copy_(value if channels is None else torch.where(channels, value, self.shown))

    def state(self) -> list[tuple[str, Tensor, int, Tensor, int]]:
        """What to save: name, tensor, the dimension along which layers or channels lie, which of
        the model's they are, and how many the model has."""
        of_layers = (self.layer_index, self.layers_in_all)
        of_channels = (self.channel_index, self.channels_in_all)
        banks = {name: t for bank in self.banks.values() for name, t in bank.state().items()}
        return [
            ("mini_batches", self.counts[1], 0, *of_layers),
            ("untouched", self.start, 1, *of_channels),
            *((name, tensor, tensor.dim() - 1, *of_channels) for name, tensor in banks.items()),
        ]


def _check_half_precision(batch: Tensor) -> None:
    """The kernel left a variance beyond 65504 as infinity; of an input with infinities in it the
    mean is infinite too."""
    mean, var = batch
    if bool((mean.isfinite() & var.isinf()).any()):
        raise UserError(
            "the variance of a mini-batch in a BN layer is beyond 65504, the largest number of its "
            "float16 buffers: keep BN layers in float32 (layer.float(); inputs may be of less)"
        )


def _tracked_layers(
    model: nn.Module, ranks: Ranks
) -> tuple[dict[str, TrackedBatchNorm], list[_Conversion]]:
    """The layers to follow, as bnexp's layers, and those converted for it with their own class."""
    refuse_replicas(model)
    layers = batchnorm_layers(model)
    for name, layer in layers.items():
        if layer.running_mean is not None and layer.running_mean.is_meta:
            raise UserError(
                f"layer {name!r} is on the meta device, without memory: give it some first, by "
                "to_empty(device=...)"
            )
        if getattr(layer, "slot", None) is not None:
            raise UserError(
                f"layer {name!r} has a StatisticsTracker already: close() it, or give all "
                "estimators to one tracker"
            )
    _agree_on_layers(layers, ranks)
    classes = {name: type(layer) for name, layer in layers.items()}
    followed = followed_layers(model)
    for name in [name for name, layer in followed.items() if layer.running_mean is None]:
        turn_into(followed.pop(name), classes[name])
    return followed, [
        (layer, classes[name])
        for name, layer in followed.items()
        if classes[name] is not type(layer)
    ]


def _agree_on_layers(layers: Mapping[str, BatchNormBase], ranks: Ranks) -> None:
    """Raise UserError unless all ranks have the same layers in the same order."""
    mine = {
        f"BN layer {name!r}": (place, layer.num_features, layer.running_mean is None)
        for place, (name, layer) in enumerate(layers.items())
    }
    where = "the BN layers of a StatisticsTracker"
    agree_on_model(ranks, mine, where, "make the same model on all ranks")


def _on_host(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _difference(theirs: object, ours: Mapping[str, Any]) -> str:
    if not isinstance(theirs, Mapping):
        return "it has none"
    for mine, saved in zip(ours.items(), theirs.items(), strict=False):
        if mine != saved:
            return f"{saved[0]!r}: {saved[1]}, here {mine[0]!r}: {mine[1]}"
    return f"{len(theirs)} of them, here {len(ours)}"
