"""`exact` on many networks as they are, against float64.

    python tests/campaigns/networks.py [--timm 200] [--seconds 3000] [--images 6] [--only SUBSTRING]

Every classifier of torchvision that has BN layers, and so many of timm's, freshly initialized, on
random images. The reference is one training-mode pass of the float64 network over all images as a
single batch; what float32 allows is how far the same pass in float32 is from it. A network fails
where an error of `exact` (means in standard deviations, variances relative, worst channel) is above
1e-4, unless it is within ten times what float32 allows and `exact` in float64 is right to 1e-9: the
network is ill-conditioned then. Prints a line per network that fails or can not be tried, and a
summary; ends with exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from bnexp.errors import UserError
from bnexp.nn.find import batchnorm_layers
from bnexp.statistics import Statistics, recompute_statistics

ALLOWED = 1e-4
ALLOWED_FLOAT64 = 1e-9
LARGEST = 150_000_000  # parameters
SIZES = (64, 96, 128, 160, 224, 299)  # the smallest that a network takes


def torchvision_names() -> list[str]:
    from torchvision import models

    return [f"torchvision/{name}" for name in models.list_models(module=models)]


def timm_names() -> list[str]:
    """In an order that mixes the families, always the same."""
    import random

    import timm

    names = [f"timm/{name}" for name in timm.list_models()]
    random.Random(0).shuffle(names)
    return names


def build(name: str) -> nn.Module:
    library, _, known = name.partition("/")
    torch.manual_seed(0)
    if library == "torchvision":
        from torchvision import models

        options = {"init_weights": True} if known in ("googlenet", "inception_v3") else {}
        return models.get_model(known, weights=None, **options).eval()
    import timm

    return timm.create_model(known, pretrained=False).eval()


def single_pass(model: nn.Module, images: torch.Tensor) -> Statistics:
    """Population statistics by torch's own layers: all images as one mini-batch."""
    model = copy.deepcopy(model)
    layers = batchnorm_layers(model)
    values: dict[str, int] = {}
    for name, layer in layers.items():
        layer.train()
        layer.momentum = 1.0
        layer.register_forward_pre_hook(
            lambda _, x, name=name: values.update({name: x[0].numel() // x[0].shape[1]})
        )
    with torch.no_grad():
        model(images)
    names = [name for name in layers if name in values]
    return Statistics(
        {name: layers[name].running_mean.double() for name in names},
        {
            name: layers[name].running_var.double() * (values[name] - 1) / values[name]
            for name in names
        },
        {name: values[name] for name in names},
    )


def distance(found: Statistics, truth: Statistics, eps: dict[str, float]) -> float:
    """Worst over layers and channels. Infinite where the layers are not the same."""
    if set(found.names) != set(truth.names):
        return float("inf")
    worst = 0.0
    for name in truth.names:
        var = truth.var[name] + eps[name]
        mean = ((found.mean[name] - truth.mean[name]).abs() / var.sqrt()).max()
        spread = ((found.var[name] - truth.var[name]).abs() / var).max()
        worst = max(worst, float(mean), float(spread))
    return worst


def try_out(name: str, count: int) -> tuple[str, float, float]:
    """What became of it, the error of `exact`, and that of a float32 pass."""
    try:
        with torch.device("meta"):
            if sum(p.numel() for p in build(name).parameters()) > LARGEST:
                return "too large", 0.0, 0.0
    except Exception:
        pass  # some can't be built without memory: try for real
    model = build(name)
    layers = batchnorm_layers(model)
    if not layers:
        return "no BN layer", 0.0, 0.0
    generator = torch.Generator().manual_seed(1)
    for size in SIZES:
        images = torch.randn(count, 3, size, size, generator=generator)
        try:
            with torch.no_grad():
                model(images[:1])
            break
        except (RuntimeError, AssertionError, ValueError, IndexError, TypeError):
            continue
    else:
        return "takes none of these images", 0.0, 0.0
    truth = single_pass(copy.deepcopy(model).double(), images.double())
    eps = {n: layer.eps for n, layer in layers.items()}
    allowed = distance(single_pass(model, images), truth, eps)
    weights = [p.detach().clone() for p in model.parameters()]
    parts = [images[:1], images[1:3], images[3:]]
    try:
        found = recompute_statistics(model, parts)
    except UserError as error:
        return f"refused: {error}", 0.0, allowed
    if not all(map(torch.equal, weights, model.parameters())):
        return "CHANGED THE WEIGHTS", 0.0, allowed
    error = distance(found, truth, eps)
    if error <= ALLOWED:
        return "right", error, allowed
    in_float64 = recompute_statistics(model.double(), [part.double() for part in parts])
    right = error <= 10 * allowed and distance(in_float64, truth, eps) <= ALLOWED_FLOAT64
    return "right" if right else "WRONG", error, allowed


def candidates(arguments: argparse.Namespace) -> Iterator[str]:
    for name in [*torchvision_names(), *timm_names()]:
        if arguments.only in name:
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timm", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.monotonic()
    tried: dict[str, dict[str, int]] = {}
    errors: list[float] = []
    failed = 0
    for name in candidates(arguments):
        library = name.partition("/")[0]
        counts = tried.setdefault(library, {})
        if library == "timm" and counts.get("right", 0) >= arguments.timm:
            break
        if time.monotonic() - started > arguments.seconds:
            print(f"stopped after {arguments.seconds:.0f} s, before {name}")
            break
        try:
            outcome, error, allowed = try_out(name, arguments.images)
        except Exception as problem:  # a campaign goes on, and counts it
            outcome, error, allowed = f"FAILED {type(problem).__name__}: {problem}"[:200], 0.0, 0.0
        kind = outcome.partition(":")[0].split(" ")[0] if outcome[0].isupper() else outcome
        kind = kind.partition(":")[0]
        counts[kind] = counts.get(kind, 0) + 1
        if outcome == "right":
            errors.append(error)
        elif outcome not in ("no BN layer", "too large", "takes none of these images"):
            print(f"{name}: {outcome} (error {error:.1e}, float32 {allowed:.1e})", flush=True)
            failed += outcome[0].isupper()
    for library, counts in tried.items():
        print(library, ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
    if errors:
        errors.sort()
        print(
            f"errors of those right: median {errors[len(errors) // 2]:.1e}, "
            f"worst {errors[-1]:.1e}; {time.monotonic() - started:.0f} s"
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
