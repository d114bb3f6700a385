"""What claims say of records that are made up, so that what should come out is known."""

from __future__ import annotations

import json

import pytest
from scipy import stats

from bnexp.errors import UserError
from bnexp.records import EVAL_COLUMNS, STEP_COLUMNS, CsvLog, create_run
from bnexp.records.study import create_study
from bnexp.study.claims import claims_of, judge
from bnexp.study.collect import collect, experiments_of
from tests.study.studies import SMALL, plan_of

TWO = "vary: {training.batch_size: [10, 20]}\nseeds: 3\n"


def made_up(tmp_path, plan, numbers, steps=6):
    """A study whose experiments have `numbers(point)`: condition -> accuracy, or the word
    diverged, failed or nothing; with evaluations at steps 3 and 6, half as high at 3."""
    state = {"state": "finished", "created": "", "grid": plan.grid, "failed": {}}
    record = create_study("made-up", plan.study.to_yaml(), state, tmp_path)
    failed = {}
    for training in plan.trainings:
        found = numbers(training.readings[0].point)
        if found == "nothing":
            continue
        if found == "failed":
            failed[training.key] = "no memory"
            continue
        folder = record.experiments / training.key
        run = create_run("x", training.config.to_yaml(), {"environment.json": {}}, folder=folder)
        if found == "diverged":
            run.write_state("failed", 2, steps, "last", "diverged: at step 2", True)
            continue
        kinds = [{"name": c, "accuracy": a, "loss": 1 - a} for c, a in found.items()]
        comparison = {key: [] for key in ("baseline", "classes", "verdict", "layers")}
        run.write_json("comparison.json", {**comparison, "samples": 500, "kinds": kinds})
        log = CsvLog(run.path / "steps.csv", STEP_COLUMNS)
        ema = found["running"] / 4
        log.append((s, 0, 0.1, 1.0, 0.5, ema * s / steps) for s in range(1, steps + 1))
        log.close()
        log = CsvLog(run.path / "evals.csv", EVAL_COLUMNS)
        for step in (steps // 2, steps):
            log.append(
                (step, split, c, a * step / steps, 1.0, 500, 0.1)
                for c, a in found.items()
                for split in ("test", "train")
            )
        log.close()
        run.write_state("finished", steps, steps)
    return record, experiments_of(record, plan.points, plan.trainings, failed)


def judged(tmp_path, claim, numbers, text=TWO, more=()):
    plan = plan_of(SMALL + text + f"claims:\n  - {{says: it, {claim}}}\n", *more)
    _, experiments = made_up(tmp_path, plan, numbers)
    (found,) = (judge(each, experiments) for each in plan.claims)
    json.dumps(found.to_dict(), allow_nan=False)
    return found


# accuracies of small and large batches by seed
FIRST, SECOND = [0.90, 0.91, 0.905], [0.92, 0.935, 0.93]
LEVELS = "compare: [{training.batch_size: 10}, {training.batch_size: 20}]"


def by_batch(point):
    accuracy = (FIRST if point.levels["training.batch_size"] == 10 else SECOND)[point.seed]
    return {"running": accuracy, "recomputed": accuracy + 0.01 + 0.001 * point.seed}


def test_levels_are_paired_by_seed(tmp_path):
    found = judged(tmp_path, f"{LEVELS}, expect: second is better", by_batch)
    reference = stats.ttest_rel(SECOND, FIRST)
    assert found.verdict == "supported"
    assert found.difference == pytest.approx(sum(SECOND) / 3 - sum(FIRST) / 3)
    assert found.p == pytest.approx(reference.pvalue)
    assert found.interval == pytest.approx(tuple(reference.confidence_interval()))
    assert found.seeds == [0, 1, 2] and found.first_values == FIRST
    assert "+2.33 points" in found.text and "3 seeds" in found.text


@pytest.mark.parametrize(
    ("expect", "verdict"),
    [
        ("first is better", "contradicted"),
        ("second is higher", "supported"),
        ("second is lower", "contradicted"),
        ("first is lower", "supported"),
        ("second is better by 0.1", "contradicted"),
        ("second is better by at least 0.01", "supported"),
        ("equal within 0.1", "supported"),
        ("equal within 0.001", "contradicted"),
        ("equal within 0.024", "undecided"),
        ("second diverges", "contradicted"),
    ],
)
def test_expectations(tmp_path, expect, verdict):
    assert judged(tmp_path, f"{LEVELS}, expect: {expect}", by_batch).verdict == verdict


def test_the_p_of_a_margin_is_of_what_lies_beyond_it(tmp_path):
    claim = f"{LEVELS}, expect: second is better by 0.02"
    beyond = [second - first - 0.02 for first, second in zip(FIRST, SECOND, strict=True)]
    found = judged(tmp_path, claim, by_batch)
    assert found.p == pytest.approx(stats.ttest_1samp(beyond, 0).pvalue)
    assert found.difference == pytest.approx(sum(SECOND) / 3 - sum(FIRST) / 3)


@pytest.mark.parametrize(
    ("claim", "difference"),
    [
        ("compare: [running, recomputed], where: {training.batch_size: 10}", 0.011),
        ("compare: [running, recomputed]", 0.011),  # the mean over both batch sizes
        (f"{LEVELS}, measure: loss", -(sum(SECOND) - sum(FIRST)) / 3),
        (f"{LEVELS}, condition: recomputed", (sum(SECOND) - sum(FIRST)) / 3),
        (f"{LEVELS}, at: 3", (sum(SECOND) - sum(FIRST)) / 6),
        (f"{LEVELS}, at: 0.6", (sum(SECOND) - sum(FIRST)) / 6),
        (f"{LEVELS}, measure: area", (sum(SECOND) - sum(FIRST)) / 4),
        (f"{LEVELS}, measure: ema_accuracy", (sum(SECOND) - sum(FIRST)) / 12),
        (f"{LEVELS}, measure: ema_accuracy, at: 2", (sum(SECOND) - sum(FIRST)) / 36),
        (f"{LEVELS}, measure: accuracy(recomputed) - accuracy", 0.0),
        (f"{LEVELS}, measure: train_accuracy - ema_accuracy", (sum(SECOND) - sum(FIRST)) / 4),
        (
            "compare: [ema_accuracy, train_accuracy], where: {training.batch_size: 20}",
            0.75 * sum(SECOND) / 3,
        ),
        ("compare: [{at: 3}, {at: 6}], where: {training.batch_size: 10}", sum(FIRST) / 6),
    ],
)
def test_what_is_measured(tmp_path, claim, difference):
    found = judged(
        tmp_path, f"{claim}, expect: second is higher", by_batch, more=["test.train_accuracy=true"]
    )
    assert found.difference == pytest.approx(difference, abs=1e-9), found.text


def test_a_share_of_the_run_before_the_first_evaluation_is_not_judged_by_a_later_one(tmp_path):
    plan = plan_of(
        SMALL + TWO + f"claims: [{{says: it, {LEVELS}, at: 0.4, expect: second is better}}]"
    )
    record, experiments = made_up(tmp_path, plan, by_batch)
    collect(record, plan.study, experiments, plan.claims)
    (claim,) = record.claims()
    assert claim["verdict"] == "undecided"
    assert "not measured by 0.4 of the run of 6 steps; the first time is at step 3" in claim["text"]


def test_the_mean_over_what_is_not_named_is_taken_within_seeds(tmp_path):
    found = judged(tmp_path, "compare: [running, recomputed], expect: second is better", by_batch)
    assert found.cells == 2 and "mean over 2 experiments" in found.text
    assert found.interval == pytest.approx(
        tuple(stats.ttest_1samp([0.01, 0.011, 0.012], 0).confidence_interval())
    )


def test_diverged_trainings_are_a_result(tmp_path):
    def diverging(point):
        return "diverged" if point.levels["training.batch_size"] == 20 else by_batch(point)

    claims = {
        "second diverges": "supported",
        "first diverges": "contradicted",
        "first is better": "supported",
        "second is better": "contradicted",
        "equal within 0.1": "contradicted",
    }
    for expect, verdict in claims.items():
        found = judged(tmp_path, f"{LEVELS}, expect: {expect}", diverging)
        assert found.verdict == verdict, expect
        assert "in all of 3" in found.text or "in 3 of 3" in found.text or expect[0] == "f"


def test_divergence_is_counted_in_experiments_and_is_no_accuracy(tmp_path):
    def diverging(point):
        return "diverged" if point.levels["training.batch_size"] == 20 else by_batch(point)

    text = "vary: {training.batch_size: [10, 20], statistics.decay: [0.5, 0.9]}\nseeds: 3\n"
    found = judged(tmp_path, f"{LEVELS}, expect: second diverges", diverging, text)
    assert "20 diverged in 6 of 6 experiments" in found.text and "in 0 of 6" in found.text
    assert found.measure == "diverged" and found.second_values == [1.0, 1.0, 1.0]
    found = judged(tmp_path, f"{LEVELS}, expect: first is better", diverging, text)
    assert "diverged in all of 6 experiments" in found.text and found.measure == "accuracy"


def test_some_that_diverged_leave_it_undecided(tmp_path):
    def diverging(point):
        wild = point.levels["training.batch_size"] == 20 and point.seed == 1
        return "diverged" if wild else by_batch(point)

    for expect in ("second is better", "equal within 0.1", "second diverges"):
        found = judged(tmp_path, f"{LEVELS}, expect: {expect}", diverging)
        assert found.verdict == "undecided" and "1 of 3" in found.text


@pytest.mark.parametrize("state", ["failed", "nothing"])
def test_what_is_missing_leaves_it_undecided(tmp_path, state):
    def missing(point):
        return state if point.seed == 2 else by_batch(point)

    for expect in ("second is better", "equal within 0.1", "second diverges"):
        assert judged(tmp_path, f"{LEVELS}, expect: {expect}", missing).verdict == "undecided"


def test_one_seed_says_nothing(tmp_path):
    text = TWO.replace("3", "1")
    found = judged(tmp_path, f"{LEVELS}, expect: second is better", by_batch, text)
    assert found.verdict == "undecided" and "a single seed" in found.text


def test_an_accuracy_that_is_never_reached(tmp_path):
    def slow(point):  # reached by large batches at the end, by one seed half way; never by small
        if point.levels["training.batch_size"] == 10:
            return {"running": 0.3}
        return {"running": 0.9 if point.seed else 0.45}

    claim = f"{LEVELS}, measure: steps_to(0.4), expect: second is better"
    found = judged(tmp_path, claim, slow)
    assert found.second_values == [6.0, 3.0, 3.0] and found.first_values == [6.0, 6.0, 6.0]
    assert "never reached" in found.text and found.unit == "steps"
    found = judged(tmp_path, claim.replace("0.4", "0.95"), slow)
    assert found.verdict == "undecided"


@pytest.mark.parametrize("never", ["first", "second"])
@pytest.mark.parametrize(
    "expect", ["{never} is better", "{never} is higher", "equal within 4", "equal within 1"]
)
def test_one_that_never_got_there_is_not_called_faster_or_equal(tmp_path, never, expect):
    size = {"first": 10, "second": 20}[never]

    def faster_but_once(point):
        if point.levels["training.batch_size"] != size:
            return {"running": 0.45}
        return {"running": 0.9 if point.seed else 0.3}

    claim = f"{LEVELS}, measure: steps_to(0.4), expect: {expect.format(never=never)}"
    found = judged(tmp_path, claim, faster_but_once, TWO.replace("3", "12"))
    assert found.p is not None and found.verdict == "undecided"
    assert f"{size} in 1 experiment, which" in found.text
    assert "may be smaller, or of the other sign" in found.text


@pytest.mark.parametrize(
    ("expect", "verdict"),
    [
        ("second is better", "supported"),
        ("first is better", "contradicted"),
        ("equal within 1", "contradicted"),
        ("equal within 4", "undecided"),
    ],
)
def test_one_that_never_got_there_is_slower_still(tmp_path, expect, verdict):
    def slow(point):
        if point.levels["training.batch_size"] == 10:
            return {"running": 0.3}
        return {"running": 0.9 if point.seed else 0.45}

    claim = f"{LEVELS}, measure: steps_to(0.4), expect: {expect}"
    found = judged(tmp_path, claim, slow, TWO.replace("3", "12"))
    assert found.verdict == verdict and "the true difference is larger" in found.text


def test_a_difference_of_what_was_never_reached_says_nothing(tmp_path):
    def slow(point):
        if point.levels["training.batch_size"] == 10:
            return {"running": 0.3, "recomputed": 0.3}
        return {"running": 0.45 if point.seed else 0.9, "recomputed": 0.9}

    claim = f"{LEVELS}, measure: steps_to(0.4) - steps_to(0.2), expect: second is lower"
    found = judged(tmp_path, claim, slow, TWO.replace("3", "12"))
    assert found.verdict == "undecided" and "nothing can be said" in found.text


def test_results_are_long_and_whole(tmp_path):
    plan = plan_of(SMALL + TWO)
    record, experiments = made_up(
        tmp_path,
        plan,
        lambda p: ("diverged" if p.seed == 2 else "nothing") if p.seed else by_batch(p),
    )
    collect(record, plan.study, experiments, plan.claims)
    columns, rows = record.results()
    assert columns[:4] == ["experiment", "training.batch_size", "seed", "state"]
    assert len(rows) == 2 * 2 + 4
    row = next(r for r in rows if r["condition"] == "recomputed")
    assert (row["training.batch_size"], row["seed"], row["state"]) == ("10", "0", "finished")
    assert float(row["accuracy"]) == FIRST[0] + 0.01
    assert float(row["train_accuracy"]) == pytest.approx(FIRST[0] + 0.01)
    assert {r["state"] for r in rows} == {"finished", "diverged", "waiting"}
    import pandas

    table = pandas.read_csv(record.path / "results.csv")
    assert table["accuracy"].dtype == "float64" and table["seed"].dtype == "int64"


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ("compare: [running]", "two things"),
        ("compare: [running, running], expect: second is better", "the same thing twice"),
        ("compare: [running, runing], expect: second is better", "no condition is called"),
        ("compare: [running, swa/running], expect: second is better", "training.averages.swa"),
        ("compare: [running, batch], expect: second is better", "in test.statistics"),
        ("compare: [running, recomputed], expect: best", "not understood"),
        ("compare: [running, recomputed], expect: equal within 0", "never shown"),
        ("compare: [running, recomputed], expect: equal within x", "not understood"),
        ("compare: [running, recomputed], expect: second is better by 1e999", "no number"),
        ("compare: [running, recomputed], measure: wat, expect: second is better", "no measure"),
        ("compare: [running, recomputed], measure: steps_to, expect: second is better", "steps_to"),
        (f"{LEVELS}, measure: accuracy - loss, expect: second is higher", "different units"),
        (f"{LEVELS}, measure: accuracy - ema_accuracy, expect: second is better", "neither way"),
        (f"{LEVELS}, measure: train_accuracy, expect: second is better", "test.train_accuracy"),
        (f"{LEVELS}, at: 4, expect: second is better", "no evaluation"),
        (f"{LEVELS}, at: 2.5, expect: second is better", "neither a step"),
        (f"{LEVELS}, at: -1, expect: second is better", "claims.0.at"),
        (f"{LEVELS}, where: {{training.batch_size: 10}}, expect: second is better", "in where"),
        (f"{LEVELS}, where: {{x: 10}}, expect: second is better", "no axis is called"),
        (f"{LEVELS}, measure: diverged, expect: second is better", "diverges"),
        ("compare: [{training.batch_size: 10}, running], expect: second is better", "same axes"),
        ("compare: [{training.batch_size: 10}, {training.batch_size: 7}], expect: first is better",
         "has no level 7"),
        ("compare: [{at: x}, {at: 6}], expect: second is better", "not a step"),
        ("compare: [3, 4], expect: second is better", "neither a condition nor levels"),
        ("compare: [[running], recomputed], expect: second is better", "neither a condition"),
        ("compare: [ema_accuracy, loss], expect: second is higher", "differ in unit"),
    ],
)  # fmt: skip
def test_claims_that_can_not_be_judged_are_refused_before_anything_runs(claim, said):
    with pytest.raises(UserError) as error:
        plan_of(SMALL + TWO + f"claims:\n  - {{says: it, {claim}}}\n")
    assert said in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_a_claim_needs_partners_in_the_grid():
    text = "vary: {training.batch_size: [10, 20], statistics.decay: [0.5, 0.9]}\nseeds: 1\n"
    text += "only: [{training.batch_size: 10, statistics.decay: 0.5}, "
    text += "{training.batch_size: 20, statistics.decay: 0.9}]\n"
    with pytest.raises(UserError, match="has a partner"):
        plan_of(SMALL + text + f"claims:\n  - {{says: it, {LEVELS}, expect: second is better}}\n")


def test_claims_of_is_what_the_plan_uses():
    plan = plan_of(SMALL + TWO + f"claims:\n  - {{says: it, {LEVELS}, expect: second is better}}\n")
    assert claims_of(plan.study, plan.points) == plan.claims
