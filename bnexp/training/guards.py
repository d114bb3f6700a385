"""What watches a training's numbers: has it collapsed, has it stopped improving, which was best."""

from __future__ import annotations

import math
from typing import ClassVar

from bnexp.config.schema import EarlyStoppingConfig, PlateauSchedule, ScheduleConfig
from bnexp.errors import Diverged
from bnexp.training.stateful import Stateful

# The EMA accuracy has collapsed when it once was this far above chance, and has now been
# this close to it for so many checks in a row.
LEARNED = 0.2
COLLAPSED = 0.05
COLLAPSED_CHECKS = 10


class Collapse(Stateful):
    """Ends a run whose EMA training accuracy has fallen back to `chance`."""

    saved: ClassVar = {"best": float, "checks_at_chance": int}

    def __init__(self, chance: float) -> None:
        self.chance = chance
        self.best = 0.0
        self.checks_at_chance = 0

    def observe(self, step: int, lr: float, ema_accuracy: float) -> None:
        """Take the EMA accuracy after `step`. Diverged if it has collapsed."""
        self.best = max(self.best, ema_accuracy)
        learned = self.best > self.chance + LEARNED * (1 - self.chance)
        at_chance = ema_accuracy < self.chance + COLLAPSED * (1 - self.chance)
        self.checks_at_chance = self.checks_at_chance + 1 if learned and at_chance else 0
        if self.checks_at_chance >= COLLAPSED_CHECKS:
            raise Diverged(
                f"collapsed: by step {step} the EMA training accuracy has long been at chance "
                f"({ema_accuracy:.1%}) after {self.best:.1%} (learning rate {lr:.3g}); "
                "lower training.optimizer.lr"
            )


class Plateau(Stateful):
    """Notices when the EMA training accuracy has stopped improving, under a schedule that asks."""

    saved: ClassVar = {"best": float, "best_step": int, "reductions": int}

    def __init__(self, schedule: ScheduleConfig) -> None:
        self.schedule = schedule
        self.best = -math.inf
        self.best_step = 0
        self.reductions = 0

    def observe(self, step: int, ema_accuracy: float) -> bool:
        """Take the EMA accuracy after `step`; count a reduction, and say True, on a plateau."""
        schedule = self.schedule
        if not isinstance(schedule, PlateauSchedule):
            return False
        if ema_accuracy > self.best + schedule.min_delta:
            self.best, self.best_step = ema_accuracy, step
            return False
        if step - self.best_step < schedule.patience:
            return False
        self.best_step = step
        self.reductions += 1
        return True

    @property
    def is_last(self) -> bool:
        """Whether the schedule has no reduction left for the plateau just met."""
        schedule = self.schedule
        return (
            isinstance(schedule, PlateauSchedule)
            and schedule.reductions is not None
            and self.reductions > schedule.reductions
        )


class Best(Stateful):
    """Which evaluation was the best so far."""

    saved: ClassVar = {"metric": (float, int, type(None)), "step": int, "evaluations_since": int}
    min_delta = 0.0

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.metric: float | None = None
        self.step = 0
        self.evaluations_since = 0

    def observe(self, step: int, metric: float | None) -> bool:
        """Take the metric (larger is better; None: there is none) of the evaluation after `step`.
        True if it is the best, by `min_delta`."""
        if self.improve(step, metric, self.min_delta):
            return True
        self.evaluations_since += 1
        return False

    def improve(self, step: int, metric: float | None, by: float = 0.0) -> bool:
        """The same, without counting an evaluation that is none."""
        if metric is None or (self.metric is not None and metric <= self.metric + by):
            return False
        self.metric, self.step, self.evaluations_since = metric, step, 0
        return True

    def reason_to_stop(self, step: int) -> str | None:
        return None


class EarlyStopping(Best):
    """The best evaluation, and an end when it lies too many evaluations back."""

    def __init__(self, config: EarlyStoppingConfig) -> None:
        super().__init__()
        self.config = config
        self.min_delta = config.min_delta

    def reason_to_stop(self, step: int) -> str | None:
        if self.evaluations_since < self.config.patience:
            return None
        return (
            f"stopped early at step {step}: {self.config.metric} has not improved since "
            f"step {self.step}"
        )
