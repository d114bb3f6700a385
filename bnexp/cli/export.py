"""bnexp export: a run's network as a plain state_dict that loads without bnexp."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bnexp.atomic import write_atomically
from bnexp.cli.eval import WEIGHTS
from bnexp.config import resolve
from bnexp.errors import UserError
from bnexp.importing import require_extra
from bnexp.performance import prepare_process, quick_imports, wait_briefly
from bnexp.records import find_run

if TYPE_CHECKING:
    from torch import Tensor

    from bnexp.training.trained import Trained


SUFFIXES = (".pt", ".pth", ".safetensors")


def run_export(
    run: str, out: Path, weights: str | None, statistics: str | None, device: str | None, runs: Path
) -> None:
    """Write the weights, with the statistics of that name in the BN buffers, to `out`.

    Where nothing was chosen: the weights the run ended with, and its running averages; averaged
    weights get recomputed statistics, since no others belong to them.
    """
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"--weights {weights}: allowed are {', '.join(WEIGHTS)}")
    if out.exists():
        raise UserError(f"{out} exists already; name another file")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out} can't be written: there is no folder {out.parent}")
    if out.suffix not in SUFFIXES:
        raise UserError(f"{out}: the name of the file must end in {', '.join(SUFFIXES)}")
    if out.suffix == ".safetensors":
        require_extra("safetensors", str(out))
    found = find_run(run, runs)
    config = resolve(found.config, [], f"{found.path}/config.yaml")
    wait_briefly()
    with quick_imports():
        prepare_process(config.performance.allocator, config.performance.tf32)
        from bnexp.device import resolve_device
        from bnexp.training.trained import load_trained

    weights = weights or found.state["weights"]
    trained = load_trained(found, config, resolve_device(device or config.device), weights)
    for line in trained.warnings:
        print(f"bnexp: {line}", file=sys.stderr)
    kind = statistics or ("recomputed" if weights in ("ema", "swa") else "running")
    tensors = _state_dict(trained, kind)
    write_atomically(out, _serialized(tensors, out))
    print(
        f"{out}: {len(tensors)} tensors of {config.model.name}, {weights} weights with {kind} "
        f"statistics, after {trained.step:,} steps",
        file=sys.stderr,
    )
    print(out)


def _state_dict(trained: Trained, kind: str) -> dict[str, Tensor]:
    from bnexp.condition import Condition
    from bnexp.nn import restore_batchnorm
    from bnexp.nn.find import batchnorm_layers
    from bnexp.training.build import autocast
    from bnexp.training.subject import run_sources, run_subject

    model, config = trained.model, trained.config
    if batchnorm_layers(model):
        with autocast(config, trained.device):
            sources = run_sources(
                run_subject(model, trained.data, config),
                trained.estimates,
                config,
                recompute=kind == "recomputed" or kind in config.statistics.adapted,
                weights=trained.weights,
            )
            condition = Condition(kind, trained.weights)
            if condition not in sources:
                known = [*trained.estimates, "recomputed", *config.statistics.adapted]
                raise UserError(f"--statistics {kind}: this run has {', '.join(known)}")
            source = sources[condition]
            chosen = source() if callable(source) else source
        model = copy.deepcopy(model)  # not tracked
        assert chosen is not None
        chosen.copy_to(model)
        restore_batchnorm(model)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _serialized(tensors: dict[str, Tensor], out: Path) -> bytes:
    if out.suffix == ".safetensors":
        from safetensors.torch import save

        return save(tensors)
    import torch

    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()
