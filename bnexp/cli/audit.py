"""bnexp audit"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexp.analysis.expectations import unmet_cost
from bnexp.cli.tables import refuse_both
from bnexp.config.audit import AuditConfig
from bnexp.config.loading import load, resolved
from bnexp.dotted import within
from bnexp.errors import ExpectationNotMet, UserError
from bnexp.performance import keep_freed_memory, quick_imports, wait_briefly
from bnexp.records.audit import next_folder, write_audit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bnexp.data.open import Opened
    from bnexp.networks.weights import Checkpoint, Match


def run_audit(
    words: list[str],
    options: dict[str, str | None],
    mend: Path | None,
    force: bool,
    as_json: bool,
    runs: Path,
    as_markdown: bool = False,
) -> None:
    """`words`: [CONFIG] [MODEL] key=value...; `options`: further overrides by their keys."""
    refuse_both(as_json, as_markdown)
    config = _config(words, options)
    if mend is not None:
        if config.model.weights is None:
            raise UserError("--mend writes a checkpoint again: say which with --weights")
        if mend.exists():
            raise UserError(f"--mend {mend} exists: name a file that doesn't")
        if not mend.parent.is_dir():
            raise UserError(f"--mend {mend} can't be written: there is no folder {mend.parent}")
    wait_briefly()
    with quick_imports():
        keep_freed_memory()
        import torch

        from bnexp.auditing import audit
        from bnexp.device import resolve_device
        from bnexp.networks.weights import same_averages_as, write_mended
        from bnexp.records.environment import describe_environment
        from bnexp.report.audit_page import render

    def say(text: str) -> None:
        if not as_json:
            print(text, file=sys.stderr)

    device = resolve_device(config.device)
    model, checkpoint, found = _model(config, say)
    model = _placed(model, device, config.channels_last)
    population, test = _data(config, say)
    result = audit(
        model,
        population.batches,
        test.batches,
        methods=config.methods,
        batch=config.batch,
        score=_function(config.score),
        classes=test.classes,
        forward=_forward(config, device),
        samples=config.samples,
        memory=config.memory,
        device=device,
        progress=not as_json,
        prior=config.prior,
        curve=config.curve,
        score_name=config.score_name,
        not_in_file=found.missing_buffers if found else (),
        same_averages_as=same_averages_as(checkpoint, found, model)
        if checkpoint is not None and found is not None
        else None,
    )
    comparison, findings = result.comparison.to_dict(), result.to_dict()
    folder = next_folder(config.name, runs)
    environment = describe_environment(0, str(device), torch.get_num_threads())
    page = render(
        result.comparison,
        findings,
        title=folder.name,
        config=config.to_yaml(),
        environment=environment,
    )
    write_audit(
        folder,
        comparison=comparison,
        findings=findings,
        statistics=result.statistics,
        config=config.to_yaml(),
        environment=environment,
        page=page,
    )
    if as_json:
        whole = {"record": str(folder), "comparison": comparison, **findings}
        print(json.dumps(whole, indent=2, allow_nan=False))
    else:
        print(result.markdown() if as_markdown else result)
    say(f"\nrecord and page: {folder}/report.html")
    if mend is not None and checkpoint is not None and found is not None:
        write_mended(checkpoint, found, result.mended(force=force), mend)
        say(f"mended: {mend}")
    if unmet := unmet_cost(result.comparison, config.expect.cost):
        raise ExpectationNotMet(unmet)


def _config(words: list[str], options: dict[str, str | None]) -> AuditConfig:
    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    models = [name for name in names if name not in files]
    if len(files) > 1 or len(models) > 1:
        raise UserError(f"one config and one model are audited, not {' and '.join(names)}")
    said = {"model.name": models[0] if models else None, **options}
    overrides = [f"{key}={value}" for key, value in said.items() if value is not None] + overrides
    if files:
        return load(Path(files[0]), overrides, AuditConfig)
    if not models:
        raise UserError(
            "say what to audit: a config, or a model as in: bnexp audit torchvision/resnet18 "
            "--weights her.ckpt --population data/train --test data/val"
        )
    keys = [override.partition("=")[0] for override in overrides]
    for flag, key, use in (
        ("--population", "data.population", "to recompute statistics from"),
        ("--test", "data.test", "with labels, to test on"),
    ):
        if not any(within(key, [given]) or within(given, [key]) for given in keys):
            raise UserError(
                f"say which images {use}: {flag} with a folder per class, or "
                "package.module:callable"
            )
    return resolved({"data": {}}, overrides, "audit", AuditConfig)


def _model(config: AuditConfig, say: Any) -> tuple[nn.Module, Checkpoint | None, Match | None]:
    from bnexp.networks.open import open_model
    from bnexp.networks.weights import load_weights, match, number_of_classes, read_checkpoint

    wanted, arguments = config.model, dict(config.model.arguments)
    from_library = wanted.name.startswith(("torchvision/", "timm/"))
    model = open_model(wanted.name, arguments)
    if wanted.weights is None:
        if from_library:
            raise UserError(f"{wanted.name} has random weights: say which are judged (--weights)")
        return model, None, None
    checkpoint = read_checkpoint(wanted.weights)
    found = match(checkpoint, model, wanted.key)
    classes = number_of_classes(found)
    if classes is not None and from_library and "num_classes" not in arguments:
        model = open_model(wanted.name, {**arguments, "num_classes": classes})
        found = match(checkpoint, model, wanted.key)
        say(f"{wanted.name} with {classes} classes, as in the weights")
    load_weights(checkpoint, model, found)
    say(f"{wanted.weights}: {found}")
    return model, checkpoint, found


def _placed(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    import torch

    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def _data(config: AuditConfig, say: Any) -> tuple[Opened, Opened]:
    from bnexp.data.open import Preparation, classes_of, open_batches, transform_of
    from bnexp.importing import is_object_name

    data = config.data
    transform = None
    if not (is_object_name(data.population) and is_object_name(data.test)):
        own = Preparation(data.resize, data.crop, data.mean, data.std)
        like = data.transforms or config.model.name
        if data.transforms is not None or (own.empty and not is_object_name(like)):
            transform, how = transform_of(like)
            say(f"images are prepared {how}")
        elif not own.empty:
            transform = own.transform()
            say(f"images are prepared as the config says: {own.words}")
    classes = classes_of(data.population) or classes_of(data.test)
    labelled = classes_of(data.population) is not None
    common: dict[str, Any] = {
        "transform": transform,
        "batch_size": data.batch_size,
        "workers": data.workers,
    }
    population = open_batches(
        data.population,
        arguments=data.population_arguments,
        classes=classes if labelled else None,
        **common,
    )
    test = open_batches(data.test, arguments=data.test_arguments, classes=classes, **common)
    say(f"population: {population.description}; test: {test.description}")
    return population, test


def _function(name: str | None) -> Any:
    from bnexp.importing import import_object

    if name is None:
        return None
    found = import_object(name)
    if not callable(found):
        raise UserError(f"{name} is a {type(found).__name__}: a function is needed")
    return found


def _forward(config: AuditConfig, device: torch.device) -> Any:
    import torch

    from bnexp.evaluation.scoring import input_of

    own = _function(config.forward)
    if config.precision == "float32":
        return own
    dtype = getattr(torch, config.precision)

    def forward(model: nn.Module, batch: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return own(model, batch) if own is not None else model(input_of(batch))

    return forward
