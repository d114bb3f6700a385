"""What each command takes. Its module, with all that is heavy, is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnexp.cli import completion

Json = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
Markdown = Annotated[
    bool, typer.Option("--markdown", help="Print Markdown alone: tables as code hosts show them.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, warnings and errors alone.")
]
ChangedData = Annotated[
    bool, typer.Option("--changed-data", help="Go on though the run's data have changed.")
]
RunsDir = Annotated[
    Path, typer.Option("--runs-dir", envvar="BNEXP_RUNS", help="The folder of the records.")
]
RUNS = Path("runs")
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file, or a shipped config's name; not needed with --resume.",
            autocompletion=completion.configs,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="Dotted overrides: training.steps=500"),
    ] = None,
    device: Device = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Continue this run from its checkpoint.",
            autocompletion=completion.runs,
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Train in N processes together.")
    ] = None,
    changed_data: ChangedData = False,
    runs_dir: RunsDir = RUNS,
    quiet: Quiet = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve everything, estimate time and memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a network and compare its BN statistics."""
    from bnexp.cli.train import run_train

    run_train(
        config,
        overrides or [],
        device,
        name,
        resume,
        changed_data,
        runs=runs_dir,
        processes=processes,
        quiet=quiet,
        dry_run=dry_run,
        as_json=as_json,
    )


def evaluate(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Run folder or name; the newest finished run if left out.",
            autocompletion=completion.runs,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="data.root=FOLDER", help="Where the run's images have moved."),
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
        str | None, typer.Option(help="Which weights: last, best, best-on-test, ema, swa.")
    ] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Also evaluate mini-batch statistics.")
    ] = False,
    device: Device = None,
    changed_data: ChangedData = False,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
    as_markdown: Markdown = False,
) -> None:
    """Evaluate a run under each kind of BN statistics."""
    from bnexp.cli.eval import run_eval

    run_eval(
        run,
        recompute_stats,
        method or [],
        samples,
        weights,
        batch,
        device,
        as_json,
        changed_data,
        overrides or [],
        runs_dir,
        as_markdown,
    )


def audit(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [MODEL] [key=value]...",
            help="A YAML file; torchvision/NAME, timm/NAME or package.module:callable; overrides.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="The model's checkpoint.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Where in the file the weights are.")] = None,
    population: Annotated[
        str | None,
        typer.Option(help="What to recompute from: a folder, or package.module:callable."),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(help="What to score on: a folder per class, or package.module:callable."),
    ] = None,
    mend: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write the checkpoint with recomputed statistics."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Mend even where it is said not to help.")
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Also the score by the number of samples.")
    ] = False,
    device: Device = None,
    name: Annotated[str | None, typer.Option(help="Name of the record's folder.")] = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
    as_markdown: Markdown = False,
) -> None:
    """Judge a model trained anywhere: verdict, findings, layers; and mend its checkpoint."""
    from bnexp.cli.audit import run_audit

    options = {
        "model.weights": weights,
        "model.key": key,
        "data.population": population,
        "data.test": test,
        "curve": "true" if curve else None,
        "device": device,
        "name": name,
    }
    run_audit(what or [], options, mend, force, as_json, runs_dir, as_markdown)


def study(
    path: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A study file, or a shipped one's name.",
            autocompletion=completion.studies,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=a,b,c", help="More levels, or a key of the base: key=value."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Trainings at a time; as many as fit if left out."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: auto, or where.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Also try again what failed before.")
    ] = False,
    runs_dir: RunsDir = RUNS,
    quiet: Quiet = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run, and estimate the time.")
    ] = False,
    as_json: Json = False,
    as_markdown: Markdown = False,
) -> None:
    """Run many experiments from one file, and judge its claims; again: go on."""
    from bnexp.cli.study import run_study_command

    run_study_command(
        path,
        overrides or [],
        jobs,
        ray,
        retry,
        dry_run,
        as_json,
        quiet or as_json,
        runs_dir,
        as_markdown,
    )


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Run folders or names; the newest finished run if left out.",
            autocompletion=completion.runs,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page, or the folder of the figures; in the run's folder if left out.",
        ),
    ] = None,
    file_format: Annotated[
        str, typer.Option("--format", help="html: one page; png or svg: every figure as a file.")
    ] = "html",
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write one self-contained HTML page about runs."""
    from bnexp.cli.report import run_report

    run_report(runs or [], output, file_format, runs_dir)


def runs(
    folder: Annotated[
        Path,
        typer.Option("--runs-dir", "--folder", envvar="BNEXP_RUNS", help="The folder of the runs."),
    ] = RUNS,
    as_json: Json = False,
) -> None:
    """List the runs, newest first."""
    from bnexp.cli.runs import run_runs

    run_runs(folder, as_json)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN", help="Two runs or more.", autocompletion=completion.runs),
    ],
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
    as_markdown: Markdown = False,
) -> None:
    """Set runs side by side."""
    from bnexp.cli.compare import run_compare

    run_compare(runs, runs_dir, as_json, as_markdown)


def config(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file, or a shipped config's name.",
            autocompletion=completion.configs,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Dotted overrides.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema for editors instead.")
    ] = False,
) -> None:
    """Print the resolved config, defaults filled in."""
    from bnexp.cli.config import run_config

    run_config(path, overrides or [], schema)


def export(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Run folder or name.", autocompletion=completion.runs),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file: .pt or .safetensors.")],
    weights: Annotated[
        str | None, typer.Option(help="Which weights: last, best, best-on-test, ema, swa.")
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(help="Which statistics: running, recomputed, or an estimator's name."),
    ] = None,
    device: Device = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write a run's network as a plain state_dict that loads without bnexp."""
    from bnexp.cli.export import run_export

    run_export(run, out, weights, statistics, device, runs_dir)


def init(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A shipped config; without it, they are listed.",
            autocompletion=completion.shipped,
        ),
    ] = None,
    path: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Where to; NAME.yaml if left out.")
    ] = None,
) -> None:
    """Write a commented config to start from."""
    from bnexp.cli.lists import run_init

    run_init(name, path)


def models(as_json: Json = False) -> None:
    """List the networks a config can name."""
    from bnexp.cli.lists import run_models

    run_models(as_json)


def data(
    root: Annotated[
        Path | None, typer.Option(help="Look there first, as data.root in a config says.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the data sets a config can name, and where their files are."""
    from bnexp.cli.lists import run_data

    run_data(root, as_json)
