"""Averages of the parameters along the run: EMA and SWA weights.

Their activations are not those of any model that was trained, so the trained model's running
statistics don't fit them: evaluate them with recomputed statistics (Izmailov et al. 2018, sec. 3).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from bnexp.errors import UserError


class WeightAverage(ABC):
    """A running average of a model's parameters, float tensors in the order of `parameters()`.
    `count` is how many times they were taken."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.count = 0

    @abstractmethod
    def update(self, step: int) -> None:
        """Take the parameters as they are after `step`, if due. Mutates the average alone."""

    def state_dict(self) -> dict:
        return {"average": self.average, "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """UserError, with nothing changed, where `state` is no average of this model."""
        tensors = averaged_parameters(state, self.average)
        torch._foreach_copy_(
            self.average, [t.to(a) for t, a in zip(tensors, self.average, strict=True)]
        )
        self.count = state["count"]


class EmaWeights(WeightAverage):
    """After every step `average = d · average + (1 - d) · parameters`, with
    `d = min(decay, (1 + t) / (10 + t))` during warm-up."""

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        super().__init__(model)
        self._decay, self._warmup = decay, warmup

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = self._decay
        if self._warmup:
            decay = min(decay, (1 + self.count) / (10 + self.count))
        get_ema_multi_avg_fn(decay)(self.average, self.parameters, self.count)
        self.count += 1


class SwaWeights(WeightAverage):
    """The plain mean of the parameters after every `every` steps beyond `start`."""

    def __init__(self, model: nn.Module, start: int, every: int) -> None:
        super().__init__(model)
        self._start, self._every = start, every

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step > self._start and step % self._every == 0:
            get_swa_multi_avg_fn()(self.average, self.parameters, self.count)
            self.count += 1

    def takes_none_of(self, steps: int) -> bool:
        return self._start // self._every >= steps // self._every


def averaged_parameters(state: dict, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The averages in a checkpoint. UserError where they don't fit `parameters`."""
    tensors, count = state.get("average"), state.get("count")
    if (
        isinstance(count, int)
        and isinstance(tensors, list)
        and all(isinstance(t, Tensor) for t in tensors)
        and [(t.shape, t.dtype) for t in tensors] == [(p.shape, p.dtype) for p in parameters]
        and all(bool(t.isfinite().all()) for t in tensors)
    ):
        return tensors
    raise UserError("the checkpoint's averaged weights are not those of this model")


@torch.no_grad()
def with_parameters(model: nn.Module, parameters: Sequence[Tensor]) -> nn.Module:
    """A copy of `model` that has these parameters and `model`'s buffers."""
    copied = copy.deepcopy(model)
    for own, given in zip(copied.parameters(), parameters, strict=True):
        own.copy_(given)
    return copied
