"""bnexp study"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bnexp.analysis.judged import Judged
from bnexp.analysis.words import p_value
from bnexp.cli.streams import printing_what_can_be
from bnexp.cli.tables import Page, refuse_both
from bnexp.cli.terminal import output
from bnexp.config.study import StudyConfig
from bnexp.errors import ExpectationNotMet, RunFailed, UserError
from bnexp.importing import require_extra
from bnexp.performance import wait_briefly
from bnexp.printable import printable
from bnexp.records.study import StudyRecord, is_study
from bnexp.study.file import read_study
from bnexp.study.jobs import Job, Watcher
from bnexp.study.run import Outcome, Plan, Progress, plan_study, run_study, step_of

PLAIN_SECONDS = 30.0
ESTIMATED = 8
"""Of how many different trainings a dry run tries some steps."""


def run_study_command(
    path: str,
    overrides: Sequence[str],
    jobs: int | None,
    ray: str | None,
    retry: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    runs: Path,
    as_markdown: bool = False,
) -> None:
    """`bnexp study`. RunFailed where trainings failed, ExpectationNotMet where claims did."""
    from bnexp.study.local import default_jobs, run_local
    from bnexp.study.on_ray import run_on_ray

    refuse_both(as_json, as_markdown)
    if ray is not None:
        require_extra("ray", "--ray")
    file = _file(path)
    study = read_study(file, overrides)
    is_of_record = file.name == "study.yaml" and is_study(file.parent)
    plan = plan_study(study)
    resources = study.config.resources
    if ray is not None and jobs is not None:
        raise UserError("--jobs is for this machine; on a Ray cluster, resources decide")
    workers = 0 if ray is not None else (jobs or default_jobs(resources))
    if dry_run:
        _print_plan(plan, workers or 1, as_json)
        return
    display = _Display(quiet)
    display.line(f"{study.config.name}: {plan.sentence}")

    def engine(todo: Sequence[Job], watcher: Watcher) -> None:
        if ray is not None:
            run_on_ray(todo, ray, resources, watcher)
            return
        wait_briefly()  # before the process is there that trainings are forked from
        run_local(todo, workers, resources, watcher)

    with display:
        outcome = run_study(
            plan,
            engine,
            workers,
            display,
            runs=runs,
            retry=retry,
            read_from=StudyRecord(file.parent) if is_of_record else None,
        )
    with printing_what_can_be():
        if as_json:
            print(json.dumps(_tree(outcome), indent=2, allow_nan=False))
        else:
            (_print_markdown if as_markdown else _print)(outcome)
    if outcome.failed:
        label, message = next(iter(outcome.failed.items()))
        raise RunFailed(
            f"{len(outcome.failed)} of {len(plan.trainings)} trainings failed; {label}: {message}; "
            "try them again with --retry"
        )
    if unmet := unmet_claims(study.config, outcome.judged):
        raise ExpectationNotMet(unmet)


def _file(given: str) -> Path:
    from bnexp.config.shipped import find_study_file

    return find_study_file(given)


def unmet_claims(config: StudyConfig, judged: Sequence[Judged]) -> str | None:
    """A line where the claims are not what `expect` says."""
    expected = config.expect.claims
    allowed = {"supported"} if expected == "supported" else {"supported", "undecided"}
    wrong = [each for each in judged if each.verdict not in allowed]
    if expected is None or not wrong:
        return None
    return (
        f"expect.claims: {expected} was expected of each; {len(wrong)} of {len(judged)} "
        f"{'is' if len(wrong) == 1 else 'are'} not, as {wrong[0].verdict}: {wrong[0].says}"
    )


# ------------------------------------------------------------------------ before


def _print_plan(plan: Plan, workers: int, as_json: bool) -> None:
    seconds = _estimate(plan) / workers
    if as_json:
        tree = {
            "study": plan.study.config.name,
            "experiments": len(plan.points),
            "trainings": [
                {"identity": t.key, "what": t.label, "experiments": len(t.readings)}
                for t in plan.trainings
            ],
            "seconds": seconds,
        }
        print(json.dumps(tree, indent=2))
        return
    console = output()
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("training", "answers"):
        table.add_column(column)
    for training in plan.trainings:
        number = len(training.readings)
        answers = f"{number} experiment{'s' * (number != 1)}"
        table.add_row(Text(printable(training.label)), answers)
    console.print(table)
    console.print(Text(f"\n{plan.study.config.name}: {plan.sentence}."), soft_wrap=True)
    console.print(
        f"{_about(seconds)} of training with {workers} at a time, from a few steps measured just "
        "now, and some seconds to start in. Nothing was written.",
        soft_wrap=True,
    )


def _estimate(plan: Plan) -> float:
    """Seconds of all trainings, one after another."""
    import torch

    from bnexp.device import resolve_device
    from bnexp.study.grid import identity
    from bnexp.training.plan import plan as plan_training

    resources = plan.study.config.resources
    torch.set_num_threads(resources.cpus)
    kinds: dict[str, list] = {}
    for training in plan.trainings:
        alike = identity(training.config.model_copy(update={"seed": 0}))
        kinds.setdefault(alike, []).append(training)
    groups = list(kinds.values())
    chosen = groups[:: max(1, -(-len(groups) // ESTIMATED))]
    seconds = []
    for group in chosen:
        config = group[0].config
        device = "cpu" if config.device == "auto" and not resources.gpus else config.device
        seconds.append(plan_training(config, resolve_device(device)).seconds)
    return sum(seconds) / len(seconds) * len(plan.trainings)


# ------------------------------------------------------------------------ meanwhile


class _Display:
    """A live table on a terminal, a line now and then elsewhere; on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._quiet = quiet
        self._live: Live | None = None
        if not quiet and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._last = time.monotonic()

    def __enter__(self) -> None:
        if self._live:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def line(self, text: str) -> None:
        if not self._quiet:
            try:
                self._console.print(printable(text), markup=False)
            except (OSError, ValueError):  # who watched is gone
                self._quiet = True

    def show(self, progress: Progress) -> None:
        if self._quiet:
            return
        if self._live:
            try:
                self._live.update(_picture(progress))
            except (OSError, ValueError):
                self._quiet = True
        elif time.monotonic() - self._last > PLAIN_SECONDS:
            self._last = time.monotonic()
            self.line(_counts(progress))


def _counts(progress: Progress) -> str:
    left = progress.seconds_left
    failed = f", {len(progress.failed)} failed" if progress.failed else ""
    estimate = "" if left is None else f", about {_time(left)} left"
    return (
        f"{progress.done} of {progress.total} trainings done{failed}, {len(progress.running)} "
        f"running{estimate}"
    )


def _picture(progress: Progress) -> Group:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    now = time.monotonic()
    for job, since in progress.running.values():
        step = step_of(job)
        table.add_row(
            Text(printable(job.label)), f"step {step:,}" if step else "starting", _time(now - since)
        )
    return Group(table, Text(_counts(progress)))


def _about(seconds: float) -> str:
    return f"About {_time(seconds)}" if seconds >= 1 else "Less than a second"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ------------------------------------------------------------------------ after


def _print(outcome: Outcome) -> None:
    console = output()
    for each in outcome.judged:
        console.print(Text(f"\n{each.verdict}: {printable(each.says)}", style="bold"))
        p = "" if each.p is None else f", {p_value(each.p)}"
        console.print(
            Text(f"  {each.second} against {each.first}, {each.measure}: {each.text}{p}"),
            soft_wrap=not console.is_terminal,
        )
    counts = ", ".join(f"{n} {state}" for state, n in outcome.states.items())
    console.print(Text(f"\nexperiments: {counts}"), soft_wrap=True)
    print(f"study: {outcome.record.path}")


def _print_markdown(outcome: Outcome) -> None:
    page = Page(as_markdown=True)
    page.text(str(outcome.record.path), "bold")
    table = Table()
    for column in ("claim", "verdict", "second against first", "found", "p"):
        table.add_column(column)
    for each in outcome.judged:
        p = "" if each.p is None else p_value(each.p)
        compared = f"{each.second} against {each.first}, {each.measure}"
        table.add_row(*map(Text, (each.says, each.verdict, compared, each.text, p)))
    if outcome.judged:
        page.table(table)
    counts = ", ".join(f"{n} {state}" for state, n in outcome.states.items())
    page.text(f"experiments: {counts}")


def _tree(outcome: Outcome) -> dict:
    return {
        "study": str(outcome.record.path),
        "experiments": outcome.states,
        "failed": outcome.failed,
        "claims": [each.to_dict() for each in outcome.judged],
        "results": str(outcome.record.path / "results.csv"),
    }
