"""bnexp eval"""

from __future__ import annotations

import json
import sys

from bnexp.condition import made_by
from bnexp.config import Config, resolve
from bnexp.config.schema import RECOMPUTE_METHODS
from bnexp.errors import UserError
from bnexp.performance import allow_tf32, keep_freed_memory
from bnexp.records import Run, find_run, newest_finished_run

WEIGHTS = ("last", "best", "ema", "swa")


def run_eval(
    run: str | None,
    recompute_stats: bool,
    method: list[str],
    samples: int | None,
    weights: str | None,
    batch: bool,
    device: str | None,
    as_json: bool,
) -> None:
    methods = list(dict.fromkeys(method))
    if unknown := [m for m in methods if m not in RECOMPUTE_METHODS]:
        raise UserError(f"--method {unknown[0]}: allowed are {', '.join(RECOMPUTE_METHODS)}")
    if (methods or samples) and not recompute_stats:
        raise UserError("--method and --samples say how to recompute: add --recompute-stats")
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"--weights {weights}: allowed are {', '.join(WEIGHTS)}")
    found = find_run(run) if run is not None else newest_finished_run()
    config = _with(found, methods[0] if len(methods) == 1 else None, samples)
    if config.performance.allocator:
        keep_freed_memory()

    from bnexp.device import describe_device, resolve_device
    from bnexp.training.session import Session

    allow_tf32(config.performance.tf32)
    resolved = resolve_device(device or config.device)
    session = Session(config, resolved)
    weights = weights or found.state.get("weights", "last")
    model = _load(found, session, weights)
    if not as_json:
        print(
            f"{found.path}: {config.model.name} after {session.step:,} steps, {weights} weights, "
            f"on {describe_device(resolved)}",
            file=sys.stderr,
        )
    comparison = _compare(session, model, weights, recompute_stats, methods, batch, not as_json)
    if as_json:
        head = {"run": str(found.path), "step": session.step, "weights": weights}
        print(json.dumps({**head, **comparison.to_dict()}, indent=2, allow_nan=False))
    else:
        from bnexp.cli.tables import print_comparison

        print_comparison(comparison, layers=5)


def _with(run: Run, method: str | None, samples: int | None) -> Config:
    """The run's config, recomputing as asked for."""
    asked = {"method": method, "samples": samples}
    overrides = [f"statistics.recompute.{k}={v}" for k, v in asked.items() if v is not None]
    return resolve(run.config, overrides, f"{run.path}/config.yaml")


def _load(run, session, weights: str):
    """The model to evaluate, with the run's estimates in the session."""
    from bnexp.training.checkpoints import load_checkpoint, newest_checkpoint

    if weights == "best":
        state, passed_over = load_checkpoint(run.checkpoints / "best.pt"), []
    else:
        state, passed_over = newest_checkpoint(run.checkpoints)
    if state is None:
        raise UserError(f"{run.path} has no checkpoint yet; go on: bnexp train --resume {run.path}")
    for line in passed_over:
        print(f"bnexp: {line}", file=sys.stderr)
    session.load_weights(state)
    session.step = state["step"]
    if weights in ("last", "best"):
        return session.model
    if weights not in session.averages:
        raise UserError(
            f"{run.path} has no {weights} weights: training.averages.{weights} was not set"
        )
    session.averages[weights].load_state_dict(state["averages"][weights])
    if not session.averages[weights].count:
        raise UserError(f"{run.path} has not averaged any {weights} weights yet")
    return session.averaged_model(weights)


def _compare(session, model, weights, recompute_stats, methods, batch, show_progress):
    from bnexp.evaluation.evaluate import compare_evaluation, evaluate
    from bnexp.training.subject import run_sources, run_subject

    config = session.config
    subject = run_subject(model, session.data, config)
    with session.autocast():
        sources = run_sources(
            subject,
            session.estimates(),
            config,
            recompute=recompute_stats,
            batch=batch,
            weights="trained" if weights == "last" else weights,
            methods=methods,
            progress=show_progress and sys.stderr.isatty(),
        )
        found = evaluate(subject, sources, fold=config.performance.fold_batchnorm)
        return compare_evaluation(subject, found, made_by(config.model_dump(mode="json")))
