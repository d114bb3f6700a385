"""Guards against sequences worked out by hand."""

from __future__ import annotations

import pytest

from bnexp.config.schema import ConstantSchedule, EarlyStoppingConfig, PlateauSchedule
from bnexp.errors import RunFailed, UserError
from bnexp.training.guards import COLLAPSED_CHECKS, Best, Collapse, EarlyStopping, Plateau
from bnexp.training.schedule import learning_rate


def test_plateau_lowers_the_rate_when_the_accuracy_stops_improving():
    schedule = PlateauSchedule(name="plateau", patience=300, min_delta=0.01, factor=0.5)
    plateau = Plateau(schedule)
    accuracies = [0.5, 0.6, 0.605, 0.604, 0.6, 0.7, 0.7, 0.7, 0.7]
    reduced = [
        step
        for step, accuracy in zip(range(100, 1000, 100), accuracies, strict=True)
        if plateau.observe(step, accuracy)
    ]
    # best 0.6 at 200, so 500 is the first look 300 steps later; then 0.7 at 600, so 900
    assert reduced == [500, 900]
    assert learning_rate(schedule, 0.8, 900, 1000, plateau.reductions) == pytest.approx(0.2)


def test_a_plateau_survives_its_state_dict():
    schedule = PlateauSchedule(name="plateau", patience=200)
    plateau = Plateau(schedule)
    plateau.observe(100, 0.5)
    restored = Plateau(schedule)
    restored.load_state_dict(plateau.state_dict())
    assert restored.observe(300, 0.5) is True


def test_other_schedules_know_no_plateau():
    plateau = Plateau(ConstantSchedule(name="constant"))
    assert not any(plateau.observe(step, 0.5) for step in range(0, 10**6, 1000))


def test_the_plateau_after_the_last_reduction_is_the_last():
    plateau = Plateau(PlateauSchedule(name="plateau", patience=100, reductions=1))
    plateau.observe(100, 0.5)
    assert plateau.observe(200, 0.5) and not plateau.is_last
    assert plateau.observe(300, 0.5) and plateau.is_last


def test_a_collapse_is_ten_checks_at_chance_after_something_was_learned():
    collapse = Collapse(chance=0.1)
    for step in range(30):
        collapse.observe(step, 0.1, 0.1)  # nothing was learned: this is no collapse
    collapse.observe(30, 0.1, 0.29)  # 0.2 of the way from chance is 0.28
    for step in range(31, 30 + COLLAPSED_CHECKS):
        collapse.observe(step, 0.1, 0.14)  # 0.05 of the way is 0.145
    with pytest.raises(RunFailed, match=r"collapsed: by step 40 .* after 29\.0%"):
        collapse.observe(40, 0.1, 0.14)


def test_one_check_above_chance_begins_the_count_anew():
    collapse = Collapse(chance=0.1)
    collapse.observe(0, 0.1, 0.9)
    for step in range(1, 100):
        collapse.observe(step, 0.1, 0.5 if step % COLLAPSED_CHECKS == 0 else 0.1)


def test_early_stopping_counts_evaluations_that_do_not_improve_enough():
    best = EarlyStopping(EarlyStoppingConfig(patience=2, min_delta=0.01))
    assert best.observe(10, 0.5)
    assert not best.observe(20, 0.505) and best.reason_to_stop(20) is None
    assert best.observe(30, 0.52)
    assert not best.observe(40, None) and not best.observe(50, 0.52)
    assert best.reason_to_stop(50) == (
        "stopped early at step 50: val_accuracy has not improved since step 30"
    )
    assert best.improve(60, 0.521) and best.step == 60  # the final evaluation needs no margin


def test_the_best_evaluation_is_the_first_of_equals():
    best = Best()
    assert [best.observe(step, m) for step, m in enumerate([0.1, 0.3, 0.3, 0.2])] == [
        True, True, False, False,
    ]  # fmt: skip
    assert (best.metric, best.step, best.evaluations_since) == (0.3, 1, 2)


@pytest.mark.parametrize(
    "guard", [Best(), Collapse(0.1), Plateau(ConstantSchedule(name="constant"))]
)
def test_what_is_no_state_of_a_guard_is_refused(guard):
    whole = guard.state_dict()
    for name in whole:
        for wrong in ("text", [1], True, {}):
            with pytest.raises(UserError, match=name):
                guard.load_state_dict({**whole, name: wrong})
        with pytest.raises(UserError, match=name):
            guard.load_state_dict({k: v for k, v in whole.items() if k != name})
    assert guard.state_dict() == whole
