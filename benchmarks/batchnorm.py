"""What bnexp's BN layers and estimators cost, against torch.nn's layers.

The variants take turns, in rotating order, and each round gives their ratios of wall time to
torch.nn's; printed are the medians of these ratios with their quartiles, so that whatever else
the machine does hits all alike. "8 estimators" includes `tracker.update()`. "torch.nn again" is
a second plain copy: how far its ratios are from 1 is how far the others' may be by chance.

    python benchmarks/batchnorm.py [--device cpu|cuda] [--rounds N] [--layers N] [--only PART]

--only layers: a chain of N equal BN layers, forward and backward (one update serves all the
layers of a network, so a chain is what a network pays). --only resnet20: a whole training step,
SGD included. Steps of less than 20 ms get ten times the rounds, ResNet-20 a quarter.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from bnexp.networks import build_model
from bnexp.nn import convert_batchnorm, restore_batchnorm
from bnexp.performance import keep_freed_memory
from bnexp.statistics.rules import Cumulative, Ema
from bnexp.statistics.tracker import StatisticsTracker

EIGHT = {
    **{f"ema-{d}": Ema(d) for d in (0.9, 0.95, 0.99, 0.999)},
    **{f"debiased-{d}": Ema(d, debias=True) for d in (0.9, 0.99, 0.999)},
    "average": Cumulative(),
}
SHAPES = [
    (128, 100),
    (512, 64, 49),
    (128, 16, 32, 32),
    (128, 32, 28, 28),
    (128, 64, 8, 8),
    (32, 256, 14, 14),
    (8, 16, 8, 16, 16),
]
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(steps: list[Callable[[], None]], rounds: int, device: torch.device) -> list[str]:
    """Columns of the table: the first step's milliseconds, then the others' ratios to it."""
    for step in steps * 3:
        step()
    if seconds(steps[0], device) < 0.02:
        rounds *= 10
    times: list[list[float]] = [[] for _ in steps]
    for i in range(rounds):
        for j in range(len(steps)):
            k = (i + j) % len(steps)
            times[k].append(seconds(steps[k], device))
    columns = [f"{statistics.median(times[0]) * 1e3:.2f}"]
    for other in times[1:]:
        ratios = [t / base for t, base in zip(other, times[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        columns.append(f"{middle:.3f} ({low:.3f}…{high:.3f})")
    return columns


def variants(model: nn.Module) -> list[tuple[nn.Module, Callable[[], None]]]:
    """torch.nn's layers, ours, ours with estimators, torch.nn's again; and what ends a step."""
    plain = restore_batchnorm(model)
    again = copy.deepcopy(plain)
    ours, tracked = convert_batchnorm(copy.deepcopy(plain)), copy.deepcopy(plain)
    tracker = StatisticsTracker(tracked, EIGHT)
    return [
        (plain, lambda: None),
        (ours, lambda: None),
        (tracked, tracker.update),
        (again, lambda: None),
    ]


def chain_step(chain: nn.Module, update: Callable[[], None], x: torch.Tensor, gradient):
    def step() -> None:
        output = chain(x)
        update()
        output.backward(gradient)
        x.grad = None
        chain.zero_grad()

    return step


def training_step(model: nn.Module, update: Callable[[], None], x: torch.Tensor, y: torch.Tensor):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(x), y)
        update()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=60, type=int)
    parser.add_argument("--layers", default=10, type=int)
    parser.add_argument("--only", choices=["layers", "resnet20"])
    arguments = parser.parse_args()
    device = arguments.device
    keep_freed_memory()
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
        f"{arguments.rounds} rounds\n"
    )
    print(
        "| what | format | torch.nn, ms | bnexp ÷ torch.nn | with 8 estimators | torch.nn again |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES if arguments.only != "resnet20" else []:
        for last in (False, True) if len(shape) == 4 else (False,):
            chain = nn.Sequential(*(KINDS[len(shape)](shape[1]) for _ in range(arguments.layers)))
            x, gradient = (torch.randn(shape, device=device) for _ in range(2))
            if last:
                x, gradient = (t.to(memory_format=torch.channels_last) for t in (x, gradient))
            x.requires_grad_()
            steps = [chain_step(m, end, x, gradient) for m, end in variants(chain.to(device))]
            columns = compare(steps, arguments.rounds, device)
            layout = "channels_last" if last else "contiguous"
            print(
                f"| {arguments.layers} × BN {shape} | {layout} |",
                " | ".join(columns),
                "|",
                flush=True,
            )
    if arguments.only != "layers":
        model = build_model("resnet20", channels=3, image_size=(32, 32), num_classes=10)
        model.to(device, memory_format=torch.channels_last)
        x = torch.randn(128, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        y = torch.randint(10, (128,), device=device)
        steps = [training_step(m, end, x, y) for m, end in variants(model)]
        columns = compare(steps, max(8, arguments.rounds // 4), device)
        print("| resnet20 training step, 128 × 3×32×32 | channels_last |", " | ".join(columns), "|")


if __name__ == "__main__":
    main()
