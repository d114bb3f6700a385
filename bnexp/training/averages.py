"""Averages of the parameters along the run: EMA and SWA weights.

Their activations are not those of any model that was trained, so the trained model's running
statistics don't fit them: evaluate them with recomputed statistics (Izmailov et al. 2018, sec. 3).
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from bnexp.config.schema import EmaWeightsConfig, SwaConfig


class ParameterAverage:
    """A running average of a model's parameters.

    With an `EmaWeightsConfig`, after every step `average = d * average + (1 - d) * parameters`
    with `d = min(decay, (1 + t) / (10 + t))` during warm-up; with a `SwaConfig`, the plain mean
    of the parameters taken every so many steps.
    """

    def __init__(self, model: nn.Module, rule: EmaWeightsConfig | SwaConfig) -> None:
        self._rule = rule
        self._parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self._parameters]
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now. Mutates the average alone."""
        if isinstance(self._rule, SwaConfig):
            average_in = get_swa_multi_avg_fn()
        else:
            decay = self._rule.decay
            if self._rule.warmup:
                decay = min(decay, (1 + self.count) / (10 + self.count))
            average_in = get_ema_multi_avg_fn(decay)
        average_in(self.average, self._parameters, self.count)
        self.count += 1

    @torch.no_grad()
    def model_with_average(self, model: nn.Module) -> nn.Module:
        """A copy of `model` that has the averaged parameters and `model`'s buffers."""
        copied = copy.deepcopy(model)
        torch._foreach_copy_(list(copied.parameters()), self.average)
        return copied

    def state_dict(self) -> dict:
        return {"average": self.average, "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(
            self.average, [t.to(a) for t, a in zip(state["average"], self.average, strict=True)]
        )
        self.count = state["count"]
