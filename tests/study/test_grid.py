import re

import pytest

from bnexp.condition import Condition
from bnexp.study.grid import identity, points_of, trainings_of
from tests.study.studies import DECAYS, SMALL, plan_of, study_of


def trainings(text, *overrides):
    return trainings_of(points_of(study_of(SMALL + DECAYS + text, *overrides)))


def test_decays_are_one_training():
    plan = plan_of(SMALL + DECAYS)
    assert len(plan.points) == 12 and len(plan.trainings) == 4
    assert "4 trainings instead of 12, since statistics.decay changes nothing" in plan.sentence
    assert sum(len(training.readings) for training in plan.trainings) == 12


def test_estimators_are_one_training_under_names_of_their_own():
    text = """
vary:
  statistics.estimators:
    - {slow: {rule: ema, decay: 0.99}}
    - {slow: {rule: ema, decay: 0.999}, all: {rule: cumulative}}
seeds: 1
"""
    (training,) = trainings_of(points_of(study_of(SMALL + text)))
    assert list(training.config.statistics.estimators) == ["slow", "slow.2", "all"]
    first, second = training.readings
    assert first.of_record(Condition("slow")) == Condition("slow")
    assert first.of_record(Condition("slow.2")) is None
    assert second.of_record(Condition("slow.2")) == Condition("slow")
    assert second.of_record(Condition("slow")) is None
    assert second.of_record(Condition("recomputed")) == Condition("recomputed")
    assert second.in_record(Condition("slow")) == Condition("slow.2")


@pytest.mark.parametrize(
    "override",
    [
        "statistics.freeze_from_step=3",
        "training.averages.swa.start=0.5",
        "training.averages.ema.decay=0.9",
        "data.val_fraction=0.2",
        "test.train_accuracy=true",
        "checkpoints.best=best-on-test",
        "model.norm=batch-renorm",
        "model.norm=moving-average",
        "statistics.adapted.new.prior=16",
    ],
)
def test_decays_that_decide_something_are_not_folded(override):
    plan = plan_of(SMALL + DECAYS, override)
    assert len(plan.trainings) == len(plan.points)
    key = re.match(r"[a-z]+\.[a-z_]+", override).group()
    assert f"decays are trained apart, since {key}" in plan.sentence


def test_identical_experiments_are_run_once():
    text = "vary: {a: {x: {}, y: {training.batch_size: 20}}}\nseeds: 1"
    plan = plan_of(SMALL + text)
    assert len(plan.points) == 2 and len(plan.trainings) == 1


def test_the_identity_is_of_what_determines_the_result(tmp_path):
    (point,) = points_of(study_of(SMALL + "seeds: 1"))
    same = ["name=other", "data.workers=5", "checkpoints.keep=7", "data.root=/x"]
    other = ["training.optimizer.lr=0.2", "statistics.recompute.samples=50", "test.every=2"]
    for override in same:
        (again,) = points_of(study_of(SMALL + "seeds: 1", override))
        assert identity(again.config) == identity(point.config), override
    for override in [*other, "seeds=1,2"]:
        again = points_of(study_of(SMALL + "seeds: 1", override))[-1]
        assert identity(again.config) != identity(point.config), override


def test_given_weights_are_known_by_their_contents(tmp_path):
    found = []
    for content in (b"one", b"two"):
        path = tmp_path / f"{content.decode()}.pt"
        path.write_bytes(content)
        (point,) = points_of(study_of(SMALL + "seeds: 1", f"model.weights={path}"))
        found.append(identity(point.config))
        path.rename(tmp_path / f"moved-{path.name}")
        moved = tmp_path / f"moved-{path.name}"
        (point,) = points_of(study_of(SMALL + "seeds: 1", f"model.weights={moved}"))
        assert identity(point.config) == found[-1]
    assert found[0] != found[1]


def test_the_label_of_a_training_says_what_its_experiments_share():
    assert trainings("")[0].label == "batch_size 10, seed 0"
