"""Estimators: rules that turn the stream of a layer's batch moments into running statistics.

The stream is, per channel, `(mean_t, var_t)` for mini-batches t = 1, 2, ..., where `var_t` is the
unbiased variance, as PyTorch's running buffers have it. A rule is a small frozen dataclass that is
its own section of a config, says what it is called, and names the bank (`bnexp.statistics.banks`)
that keeps its numbers; `StatisticsTracker` feeds the banks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from bnexp.errors import UserError

if TYPE_CHECKING:
    from bnexp.statistics.banks import Averages, Bank, Pools

_BLOCKS = 16


class Rule(ABC):
    """An estimator: what is asked for, without state."""

    # Of a rule as a section of a config.
    __pydantic_config__: ClassVar = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "json_schema_extra": {"required": ["rule"]},
    }

    @abstractmethod
    def label(self) -> str:
        """What it does, in a few words."""

    @abstractmethod
    def bank(self) -> type[Bank]:
        """The kind of bank that keeps its numbers, with those of all estimators of that kind."""


@dataclass(frozen=True)
class Ema(Rule):
    """Exponential moving average: `running = d·running + (1-d)·batch`, with decay d in [0, 1).

    PyTorch's `momentum` is `1 - d`: `Ema(0.9)` is what its layers do by default (Ioffe & Szegedy
    2015, section 3.1). It starts from the layer's running buffers (0 and 1 in a new layer), and
    goes on from whatever is written into them.

    With `debias` it starts from nothing instead, and is divided by `1 - d^t` as in Adam (Kingma &
    Ba 2015, section 3): a weighted mean of the batches seen, with weights proportional to
    `d^(t-i)`.
    """

    rule: Literal["ema"] = field(default="ema", kw_only=True, repr=False)
    decay: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Weight kept on the old value: running = decay * running + (1 - decay) * batch."""
    debias: bool = False
    """Start at zero and divide by 1 - decay^t, as Adam does."""

    def __post_init__(self) -> None:
        decay = self.decay
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise UserError(
                f"Ema: decay must be at least 0 and less than 1, not {decay!r} "
                "(it is the weight kept on the old value: 1 - PyTorch's momentum)"
            )

    @property
    def initial_weight_sum(self) -> float:
        """What the starting value is worth, in mini-batches."""
        return 0.0 if self.debias else 1 / (1 - self.decay)

    def label(self) -> str:
        return f"decay {self.decay:g}{', debiased' if self.debias else ''}"

    def bank(self) -> type[Averages]:
        from bnexp.statistics.banks import Averages

        return Averages


@dataclass(frozen=True)
class Cumulative(Rule):
    """The plain mean over all mini-batches so far, of batch means and of unbiased variances.

    What PyTorch's layers do with `momentum=None`, and Algorithm 2 of Ioffe & Szegedy 2015 taken
    along the training run.
    """

    rule: Literal["cumulative"] = field(default="cumulative", kw_only=True, repr=False)
    """The plain average of all batch statistics so far (PyTorch's momentum=None)."""

    # An average that forgets nothing, from nothing.
    decay: ClassVar[float] = 1.0
    initial_weight_sum: ClassVar[float] = 0.0

    def label(self) -> str:
        return "cumulative average"

    def bank(self) -> type[Averages]:
        from bnexp.statistics.banks import Averages

        return Averages


@dataclass(frozen=True)
class Pooled(Rule):
    """Mean and unbiased variance of all values seen, the variance between batch means included.

    With `n_t` values per channel in mini-batch t and `n = Σ n_t`: `mean = Σ n_t·mean_t / n` and
    `var = (Σ (n_t - 1)·var_t + Σ n_t·(mean_t - mean)²) / (n - 1)`; the "population statistics" of
    Wu & Johnson 2021 (section 3 and appendix) as a running estimate. Merged in float64 as Chan,
    Golub & LeVeque (1979) do, never as `E[x²] - E[x]²`.

    With `window`, over the last mini-batches alone: exactly `window` of them if `window < 32`.
    Larger windows forget in blocks of `q = window // 16` mini-batches, so that memory stays
    bounded (at most 31 blocks of three numbers per channel): then the last `B·q - q + 1` to `B·q`
    mini-batches count, with `B = window // q`; that is at least 7/8 of the window, never more
    than all of it. Until it is full, all mini-batches count.
    """

    rule: Literal["pooled"] = field(default="pooled", kw_only=True, repr=False)
    window: Annotated[int, Ge(1), Lt(2**31)] | None = None
    """Merge the moments of the last so many mini-batches; without it, of the whole run."""

    def __post_init__(self) -> None:
        window = self.window
        if window is not None and (
            isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < 2**31
        ):
            raise UserError(f"Pooled: window is a positive number of mini-batches, not {window!r}")

    @property
    def blocks(self) -> int:
        """How many blocks of mini-batches are kept."""
        return 1 if self.window is None else self.window // self.block_length

    @property
    def block_length(self) -> int:
        """Mini-batches in a block; without a window, more than there will ever be."""
        return 2**62 if self.window is None else max(1, self.window // _BLOCKS)

    def label(self) -> str:
        return f"pooled over {self.window or 'all'} steps"

    def bank(self) -> type[Pools]:
        from bnexp.statistics.banks import Pools

        return Pools


Estimator = Ema | Cumulative | Pooled
