"""From the records of a study's experiments to its results.csv and claims.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bnexp.analysis.judged import Judged
from bnexp.errors import UserError
from bnexp.records import Run
from bnexp.records.files import read_bytes
from bnexp.records.study import StudyRecord, to_csv
from bnexp.study.claims import Claim, judge, undecided
from bnexp.study.file import COLUMNS, Study, text_of
from bnexp.study.grid import Point, Training
from bnexp.study.measures import Experiment


def experiments_of(
    record: StudyRecord,
    points: Sequence[Point],
    trainings: Sequence[Training],
    failed: Mapping[str, str],
) -> list[Experiment]:
    """The experiments of the grid, in its order, with the records that answer them."""
    found = {
        id(reading.point): Experiment(reading, run, failed.get(training.key))
        for training in trainings
        for run in [record.run(training.key)]
        for reading in training.readings
    }
    return [found[id(point)] for point in points]


def collect(
    record: StudyRecord, study: Study, experiments: Sequence[Experiment], claims: Sequence[Claim]
) -> list[Judged]:
    """Write results.csv and claims.json anew, from what there is; the claims come back."""
    axes = [axis.name for axis in study.axes]
    rows = [row for experiment in experiments for row in _rows(experiment, axes)]
    record.write("results.csv", to_csv([COLUMNS[0], *axes, *COLUMNS[1:]], rows))
    judged = [_judge(claim, experiments) for claim in claims]
    record.write_json("claims.json", {"claims": [each.to_dict() for each in judged]})
    return judged


def _judge(claim: Claim, experiments: Sequence[Experiment]) -> Judged:
    try:
        return judge(claim, experiments)
    except UserError as error:  # something was not measured, or a file is damaged
        return undecided(claim, str(error))


def _rows(experiment: Experiment, axes: Sequence[str]) -> list[list[str]]:
    point, run = experiment.reading.point, experiment.run
    head = [run.name if run else "", *(text_of(point.levels[axis]) for axis in axes)]
    state = experiment.state
    head += [str(point.seed), state["state"], str(state["step"])]
    if state["state"] != "finished" or run is None:
        return [[*head, "", "", "", "", "", ""]]
    samples = str(experiment.comparison["samples"])
    ema = _last_ema(run)
    rows = []
    for condition, row in experiment.results.items():
        train = experiment.curve(condition, "train", "accuracy")
        numbers = [row.get("accuracy"), row.get("loss")]
        rows.append(
            [
                *head,
                str(condition),
                *("" if n is None else repr(n) for n in numbers),
                samples,
                ema,
                repr(train[max(train)]) if train else "",
            ]
        )
    return rows


def _last_ema(run: Run) -> str:
    """The EMA training accuracy in the last whole line of steps.csv."""
    content = read_bytes(run.path / "steps.csv") or b""
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return lines[-1].rpartition(b",")[2].decode(errors="replace") if len(lines) > 1 else ""


def summary(experiments: Sequence[Experiment]) -> dict[str, Any]:
    """How many experiments are in which state."""
    counts: dict[str, int] = {}
    for experiment in experiments:
        state = experiment.state["state"]
        counts[state] = counts.get(state, 0) + 1
    return counts
