"""bnexp eval"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bnexp.config import Config
    from bnexp.records import Run

WEIGHTS = ("last", "best", "ema", "swa")


def evaluate(
    run: Annotated[
        str | None, typer.Argument(help="Run folder or name; the newest finished run if left out.")
    ] = None,
    recompute_stats: Annotated[
        bool, typer.Option("--recompute-stats", help="Also evaluate recomputed statistics.")
    ] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(help="How to recompute: exact, pooled, batch-mean; may be repeated."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Training images to recompute from.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help=f"Which weights: {', '.join(WEIGHTS)}.")
    ] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Also evaluate mini-batch statistics.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Evaluate a run under each kind of BN statistics."""
    from bnexp.config.schema import RECOMPUTE_METHODS
    from bnexp.errors import UserError
    from bnexp.records import find_run, newest_finished_run

    methods = list(dict.fromkeys(method or []))
    if unknown := [m for m in methods if m not in RECOMPUTE_METHODS]:
        raise UserError(f"--method {unknown[0]}: allowed are {', '.join(RECOMPUTE_METHODS)}")
    if (methods or samples) and not recompute_stats:
        raise UserError("--method and --samples say how to recompute: add --recompute-stats")
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"--weights {weights}: allowed are {', '.join(WEIGHTS)}")
    found = find_run(run) if run is not None else newest_finished_run()
    config = _with(found, methods[0] if len(methods) == 1 else None, samples)
    if config.performance.allocator:
        from bnexp.performance import keep_freed_memory

        keep_freed_memory()

    from bnexp.device import describe_device, resolve_device
    from bnexp.performance import allow_tf32
    from bnexp.training.trained import load_trained

    allow_tf32(config.performance.tf32)
    resolved = resolve_device(device or config.device)
    weights = weights or found.state["weights"]
    trained = load_trained(found.path, config, resolved, weights)
    for line in trained.passed_over:
        print(f"bnexp: {line}", file=sys.stderr)
    if not as_json:
        print(
            f"{found.path}: {config.model.name} after {trained.step:,} steps, {weights} weights, "
            f"on {describe_device(resolved)}",
            file=sys.stderr,
        )
    comparison = _compare(trained, config, resolved, recompute_stats, methods, batch, not as_json)
    if as_json:
        head = {"run": str(found.path), "step": trained.step, "weights": weights}
        print(json.dumps({**head, **comparison.to_dict()}, indent=2, allow_nan=False))
    else:
        from bnexp.cli.tables import print_comparison

        print_comparison(comparison, layers=5)


def _with(run: Run, method: str | None, samples: int | None) -> Config:
    """The run's config, recomputing as asked for."""
    from bnexp.config import resolve

    asked = {"method": method, "samples": samples}
    overrides = [f"statistics.recompute.{k}={v}" for k, v in asked.items() if v is not None]
    return resolve(run.config, overrides, f"{run.path}/config.yaml")


def _compare(trained, config, device, recompute_stats, methods, batch, show_progress):
    from bnexp.evaluation.evaluate import assess, compare_assessment, kinds_to_assess
    from bnexp.training.build import autocast

    wanted = ["recomputed"] * recompute_stats + ["batch"] * batch
    model, data = trained.model, trained.data
    with autocast(config, device):
        kinds = kinds_to_assess(
            model,
            data,
            config,
            trained.estimates,
            wanted,
            methods,
            progress=show_progress and sys.stderr.isatty(),
        )
        found = assess(model, data.test, config, kinds)
        return compare_assessment(found, model, data, config)
