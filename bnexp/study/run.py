"""Running a study: which record, what is left to do, which engine, and what comes out."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bnexp.analysis.judged import Judged
from bnexp.config.yaml_text import parse_yaml
from bnexp.errors import Interrupted, UserError
from bnexp.importing import require_extra
from bnexp.records import Run
from bnexp.records.making import place, staged
from bnexp.records.study import StudyRecord, all_studies, create_study
from bnexp.study.claims import Claim, claims_of
from bnexp.study.collect import collect, experiments_of, summary
from bnexp.study.file import Study, make_study, text_of
from bnexp.study.grid import Point, Training, points_of, reader_of_averages, trainings_of
from bnexp.study.jobs import Ended, Job, Watcher
from bnexp.training.signals import SIGNALS, handled

COLLECT_SECONDS = 20.0
"""How often the results are written while experiments run, at most."""

Engine = Callable[[Sequence[Job], Watcher], None]


class Display(Protocol):
    """What a person sees of a study that runs."""

    def show(self, progress: Progress) -> None:
        """Called a few times a second."""

    def line(self, text: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """A study with its grid, its claims and the trainings that answer them."""

    study: Study
    points: list[Point]
    trainings: list[Training]
    claims: list[Claim]

    @property
    def grid(self) -> str:
        """A hash of the experiments and how they are answered: of what the study is, but for its
        claims."""
        rows = [
            [training.key, point.seed, *([n, text_of(v)] for n, v in point.levels.items())]
            for training in self.trainings
            for point in (reading.point for reading in training.readings)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    @property
    def sentence(self) -> str:
        """How many experiments, and in how many trainings."""
        seeds = len(self.study.config.all_seeds)
        combinations = len(self.points) // seeds
        what = (
            f"{len(self.points):,} experiment{'s' * (len(self.points) != 1)} ({combinations:,} "
            f"combination{'s' * (combinations != 1)}, {seeds} seed{'s' * (seeds != 1)})"
        )
        if len(self.trainings) == len(self.points):
            return f"{what}, a training each{self._unfolded}"
        folded = [
            axis.name
            for axis in self.study.axes
            if any(
                len({text_of(r.point.levels[axis.name]) for r in training.readings}) > 1
                for training in self.trainings
            )
        ]
        return (
            f"{what}: {len(self.trainings)} trainings instead of {len(self.points)}, since "
            f"{' and '.join(folded)} change{'s' * (len(folded) == 1)} nothing that training reads"
            f"{self._unfolded}"
        )

    @property
    def _unfolded(self) -> str:
        """Why trainings of different decays are not one, where there are such."""
        decays: dict[str, set[float]] = {}
        for config in (training.config for training in self.trainings):
            if reader := reader_of_averages(config):
                decays.setdefault(reader, set()).add(config.statistics.decay)
        readers = [reader for reader, found in decays.items() if len(found) > 1]
        if not readers:
            return ""
        go = "goes" if len(readers) == 1 else "go"
        return f"; decays are trained apart, since {' and '.join(readers)} {go} by running averages"


def plan_study(study: Study, fold: bool = True) -> Plan:
    """UserError where a config or a claim is wrong, or a package is missing."""
    points = points_of(study)
    if any(point.config.logging.tensorboard for point in points):
        require_extra("tensorboard", "logging.tensorboard")
    return Plan(study, points, trainings_of(points, fold), claims_of(study, points))


@dataclass
class Progress:
    """Where a study is. `running`: what, since when (monotonic), and its record's folder;
    `done` counts trainings that have an answer, `found` those that had one before."""

    plan: Plan
    record: StudyRecord
    workers: int
    total: int
    found: int = 0
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[str, tuple[Job, float]] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)

    @property
    def seconds_left(self) -> float | None:
        """As the trainings so far took; None before there are any."""
        if not self.took:
            return None
        each = sum(self.took) / len(self.took)
        now = time.monotonic()
        begun = sum(min(each, now - since) for _, since in self.running.values())
        left = self.total - self.done - len(self.failed)
        return max(0.0, (left * each - begun) / max(1, min(self.workers, left)))


@dataclass(frozen=True)
class Outcome:
    """What a study ends with: its record, its claims as judged, how many experiments are in which
    state, and why trainings failed (label -> message)."""

    record: StudyRecord
    judged: list[Judged]
    states: dict[str, int]
    failed: dict[str, str]


def run_study(
    plan: Plan,
    engine: Engine,
    workers: int,
    display: Display,
    *,
    runs: Path,
    retry: bool = False,
    read_from: StudyRecord | None = None,
) -> Outcome:
    """Run what is left of a study, in its record: `read_from`, whose study.yaml it is, or the
    newest one below `runs`, of the same grid, or a new one. `retry`: also what failed before,
    unless it diverged.

    Raises Interrupted where a signal asked it to end; what ran has its checkpoint then.
    """
    record = find_record(plan, runs, read_from)
    with record.locked():
        former = record.state["failed"] if not retry else {}
        return _Study(plan, record, workers, display, former).run(engine)


def find_record(plan: Plan, runs: Path, read_from: StudyRecord | None = None) -> StudyRecord:
    """The record to go on in. A new one takes over what finished in others of that name."""
    name, text = plan.study.config.name, plan.study.to_yaml()
    others = [r for r in all_studies(runs) if r.name.rpartition("-")[0] == name]
    if read_from is not None:
        others.insert(0, read_from)
    for record in others:
        try:
            same = record.state["grid"] == plan.grid
        except UserError:
            continue
        if same:
            if record.text != text:  # its claims, or what it expects
                with record.locked():
                    record.write("study.yaml", text)
            return record
    state = {
        "state": "interrupted",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        "grid": plan.grid,
        "experiments": len(plan.points),
        "trainings": len(plan.trainings),
        "done": 0,
        "failed": {},
    }
    record = create_study(name, text, state, runs)
    for training in plan.trainings:
        for other in others:
            run = other.run(training.key)
            if run is not None and _has_finished(run):
                with staged(record.experiments) as staging:
                    shutil.copytree(run.path, staging, copy_function=_link, dirs_exist_ok=True)
                    place(staging, [record.experiments / training.key])
                break
    return record


def _link(source: str, target: str) -> None:
    """A second name for a file of a finished record: they are replaced, never changed."""
    if os.path.basename(source) == ".lock":
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def load_plan(record: StudyRecord) -> Plan:
    """The study of a record. UserError where its study.yaml is damaged."""
    path = record.path / "study.yaml"
    tree = parse_yaml(record.text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged: it is not a mapping")
    return plan_study(make_study(tree, [], str(path), record.path))


def refresh(record: StudyRecord) -> None:
    """Collect what a study that was killed before it did so has by now."""
    if record.state["state"] != "killed":
        return
    with record.locked():
        plan = load_plan(record)
        experiments = experiments_of(record, plan.points, plan.trainings, record.state["failed"])
        collect(record, plan.study, experiments, plan.claims)


class _Study:
    """A study that runs; what the engine tells it goes into the record at once."""

    def __init__(
        self,
        plan: Plan,
        record: StudyRecord,
        workers: int,
        display: Display,
        former: dict[str, str],
    ) -> None:
        self._display = display
        keys = {training.key for training in plan.trainings}
        failed = {key: text for key, text in former.items() if key in keys}
        self.progress = Progress(plan, record, workers, len(plan.trainings), failed=failed)
        self._created = {
            key: value for key, value in record.state.items() if key in ("created", "grid")
        }
        self._asked = 0
        self._collected = time.monotonic()

    def run(self, engine: Engine) -> Outcome:
        progress = self.progress
        jobs = self._jobs()
        progress.found = progress.done
        if progress.found:
            self._display.line(f"{progress.found} of {progress.total} trainings are done already")
        self._write_state("running")
        with handled(SIGNALS, lambda *_: self.ask_to_stop()):
            try:
                if jobs:
                    engine(jobs, self)
            except BaseException:
                self._write_state("interrupted")
                raise
        judged, states = self._collect()
        if self._asked:
            self._write_state("interrupted")
            raise Interrupted(
                f"interrupted; go on with: bnexp study {progress.record.path}/study.yaml"
            )
        self._write_state("failed" if progress.failed else "finished")
        labels = {training.key: training.label for training in progress.plan.trainings}
        failed = {labels[key]: message for key, message in progress.failed.items()}
        return Outcome(progress.record, judged, states, failed)

    def _jobs(self) -> list[Job]:
        """What is left to be run; what is done is counted."""
        progress, jobs = self.progress, []
        for training in progress.plan.trainings:
            run = progress.record.run(training.key)
            if run is not None and _has_ended(run):
                progress.done += 1
                progress.failed.pop(training.key, None)
            elif training.key not in progress.failed:
                jobs.append(
                    Job(
                        key=training.key,
                        label=training.label,
                        data=training.config.data.name,
                        config=training.config.to_yaml(),
                        folder=(progress.record.experiments / training.key).absolute(),
                        threads=progress.plan.study.config.resources.cpus,
                    )
                )
        return jobs

    # ---------------------------------------------------------------- what the engine tells

    def ask_to_stop(self) -> None:
        self._asked += 1

    def stop(self) -> bool:
        if self._asked > 1:
            raise KeyboardInterrupt
        return self._asked > 0

    def started(self, job: Job) -> None:
        self.progress.running[job.key] = (job, time.monotonic())
        self.tick()

    def ended(self, job: Job, found: Ended) -> None:
        progress = self.progress
        _, since = progress.running.pop(job.key, (job, time.monotonic()))
        if found.kind == "interrupted":
            return
        took = time.monotonic() - since
        if found.kind == "failed":
            progress.failed[job.key] = found.message or "it failed"
        else:
            progress.done += 1
            progress.took.append(took)
        self._write_state("running")
        ended = progress.done + len(progress.failed)
        how = "" if found.kind == "finished" else f": {found.kind} ({found.message})"
        self._display.line(f"{ended}/{progress.total}  {job.label}{how}  {took:.0f} s")
        if time.monotonic() - self._collected > COLLECT_SECONDS:
            self._collect()

    def tick(self) -> None:
        self._display.show(self.progress)

    # ---------------------------------------------------------------- the record

    def _collect(self) -> tuple[list[Judged], dict[str, int]]:
        progress = self.progress
        plan = progress.plan
        experiments = experiments_of(progress.record, plan.points, plan.trainings, progress.failed)
        judged = collect(progress.record, plan.study, experiments, plan.claims)
        self._collected = time.monotonic()
        return judged, summary(experiments)

    def _write_state(self, state: str) -> None:
        progress = self.progress
        content: dict[str, Any] = {
            "state": state,
            **self._created,
            "experiments": len(progress.plan.points),
            "trainings": progress.total,
            "done": progress.done,
            "failed": progress.failed,
        }
        progress.record.write_json("state.json", content)


def _has_ended(run: Run) -> bool:
    try:
        state = run.state
    except UserError:  # a damaged state.json is written anew when it goes on
        return False
    return state["state"] == "finished" or state["diverged"]


def _has_finished(run: Run) -> bool:
    with contextlib.suppress(UserError):
        return run.state["state"] == "finished"
    return False


def step_of(job: Job) -> int:
    """The last step in the steps.csv of a training that runs."""
    path = job.folder / "steps.csv"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - 400))
            lines = file.read().split(b"\n")
        return int(lines[-2].partition(b",")[0]) if len(lines) > 2 else 0
    except (OSError, ValueError):
        return 0
