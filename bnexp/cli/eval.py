"""bnexp eval"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bnexp.analysis.expectations import unmet_cost
from bnexp.cli.tables import Page, print_comparison, refuse_both
from bnexp.condition import made_by
from bnexp.config import Config, resolve
from bnexp.config.schema import RECOMPUTE_METHODS
from bnexp.errors import ExpectationNotMet, UserError, shown
from bnexp.performance import prepare_process, quick_imports, wait_briefly
from bnexp.records import RUNS, Run, find_run, newest_finished_run

if TYPE_CHECKING:
    from bnexp.training.trained import Trained

MAY_CHANGE = ("data.root", "data.workers", "expect.cost")
WEIGHTS = ("last", "best", "best-on-test", "ema", "swa")


QUICK_SECONDS = 10.0


def run_eval(
    run: str | None,
    recompute_stats: bool,
    method: list[str],
    samples: int | None,
    weights: str | None,
    batch: bool,
    device: str | None,
    as_json: bool,
    changed_data: bool = False,
    overrides: Sequence[str] = (),
    runs: Path = RUNS,
    as_markdown: bool = False,
) -> None:
    refuse_both(as_json, as_markdown)
    if run is not None and "=" in run:
        overrides = [run, *overrides]
        run = None
    methods = list(dict.fromkeys(method))
    if unknown := [m for m in methods if m not in RECOMPUTE_METHODS]:
        raise UserError(f"--method {unknown[0]}: allowed are {', '.join(RECOMPUTE_METHODS)}")
    if other := [text for text in overrides if text.partition("=")[0] not in MAY_CHANGE]:
        raise UserError(f"{shown(other[0])}: eval takes {', '.join(MAY_CHANGE)} alone")
    if (methods or samples) and not recompute_stats:
        raise UserError("--method and --samples say how to recompute: add --recompute-stats")
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"--weights {weights}: allowed are {', '.join(WEIGHTS)}")
    found = find_run(run, runs) if run is not None else newest_finished_run(runs)
    config = _with(found, methods[0] if len(methods) == 1 else None, samples, overrides)
    wait_briefly()
    with quick_imports():
        prepare_process(config.performance.allocator, config.performance.tf32)
        from bnexp.device import describe_device, resolve_device
        from bnexp.training.trained import load_trained

    resolved = resolve_device(device or config.device)
    weights = weights or found.state["weights"]
    trained = load_trained(found, config, resolved, weights, changed_data)
    for line in trained.warnings:
        print(f"bnexp: {line}", file=sys.stderr)
    about = f"{found.path}: {config.model.name} after {trained.step:,} steps, {weights} weights"
    if not as_json:
        print(f"{about}, on {describe_device(resolved)}", file=sys.stderr)
    recompute = recompute_stats or config.expect.cost is not None or _is_quick(found)
    comparison = _compare(trained, recompute, methods, batch, not as_json)
    if as_json:
        head = {"run": str(found.path), "step": trained.step, "weights": weights}
        print(json.dumps({**head, **comparison.to_dict()}, indent=2, allow_nan=False))
    else:
        page = Page(as_markdown)
        if as_markdown:
            page.text(about)
        print_comparison(comparison, layers=5, page=page)
        for remark in trained.remarks:
            page.text(remark)
    if unmet := unmet_cost(comparison, config.expect.cost):
        raise ExpectationNotMet(unmet)


def _is_quick(run: Run) -> bool:
    """Whether recomputing and testing took seconds only when the run did it."""
    took = [row["seconds"] for row in run.evals() if row["statistics"] == "recomputed"]
    return bool(took) and took[-1] <= QUICK_SECONDS


def _with(run: Run, method: str | None, samples: int | None, further: Sequence[str]) -> Config:
    """The run's config, recomputing as asked for."""
    asked = {"method": method, "samples": samples}
    overrides = [f"statistics.recompute.{k}={v}" for k, v in asked.items() if v is not None]
    return resolve(run.config, [*overrides, *further], f"{run.path}/config.yaml")


def _compare(trained: Trained, recompute: bool, methods: list, batch: bool, show_progress: bool):
    from bnexp.evaluation.evaluate import compare_evaluation, evaluate
    from bnexp.training.build import autocast
    from bnexp.training.subject import run_sources, run_subject

    config = trained.config
    subject = run_subject(trained.model, trained.data, config)
    with autocast(config, trained.device):
        sources = run_sources(
            subject,
            trained.estimates,
            config,
            recompute=recompute,
            batch=batch,
            weights=trained.weights,
            methods=methods,
            progress=show_progress and sys.stderr.isatty(),
        )
        found = evaluate(subject, sources, fold=config.performance.fold_batchnorm)
        comparison = compare_evaluation(subject, found, made_by(config.model_dump(mode="json")))
    verdict = comparison.verdict
    verdict = replace(verdict, remarks=(*trained.remarks, *verdict.remarks))
    return replace(comparison, verdict=verdict)
