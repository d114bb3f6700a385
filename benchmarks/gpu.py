"""Training steps on a GPU: bnexp's loop with all its logging, bare loops and the usual script.

    python benchmarks/gpu.py [--device cuda|cpu] [--models M ...] [--batches N ...] [--rounds N]
                             [--only CONTENDER ...] [--seconds S] [--json FILE]

Contenders, all on the same network, in float32 with TensorFloat-32, channels_last, SGD with
Nesterov momentum:

    bare            images on the device, torch.nn's layers, fused optimizer, nothing logged
    bare compiled   the same with torch.compile (inductor)
    bare graph      the same, forward to optimizer captured in a CUDA graph
    bnexp           bnexp's own loop: three estimators, EMA accuracy, steps.csv
    bnexp compiled  the same with performance.compile
    usual           DataLoader with worker processes over PIL images, ToTensor and Normalize, and
                    loss.item() and the accuracy at every step

They take turns in rotating order; a turn is some untimed and then so many timed steps, ended by
a synchronization. Printed are the medians over rounds of the step time, images per second, and
the median of the ratios to `bare` within a round. Without CUDA there are no graphs. A contender
that fails is left out and named. Images are random. --json appends a line for every row.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sessions import DATA, Loop, make_training, wait_for
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bnexp.networks import build_model
from bnexp.nn import restore_batchnorm
from bnexp.performance import allow_tf32, keep_freed_memory

IMAGES = 50_000
EVERY = 100  # bnexp flushes its log after so many steps: turns of it are multiples of that
Turn = Callable[[int], float]  # steps to be timed -> seconds


class BareLoop:
    """The least that trains: random batches of images on the device, nothing logged."""

    def __init__(self, name: str, device: torch.device, batch_size: int) -> None:
        self.device, self.batch_size = device, batch_size
        _, size, channels = DATA[name]
        self.model = plain_network(name, device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.001, momentum=0.9, nesterov=True, fused=True
        )
        images = torch.randn(IMAGES, channels, size, size, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (IMAGES,), device=device)
        self.order = torch.randperm(IMAGES, device=device)
        self.at = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        if self.at + self.batch_size > IMAGES:
            self.order, self.at = torch.randperm(IMAGES, device=self.device), 0
        chosen = self.order[self.at : self.at + self.batch_size]
        self.at += self.batch_size
        return self.images[chosen], self.labels[chosen]

    def turn(self, forward: nn.Module) -> Turn:
        def step() -> None:
            x, y = self.batch()
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(forward(x), y).backward()
            self.optimizer.step()

        return timed(step, self.device)

    def graph_turn(self) -> Turn:
        """The step from forward to optimizer as one CUDA graph, its batch copied into place."""
        x, y = (t.clone() for t in self.batch())

        def work() -> None:
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(5):
                self.optimizer.zero_grad(set_to_none=True)
                work()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):  # gradients are made in, and stay in, the graph's memory
            work()

        def step() -> None:
            images, labels = self.batch()
            x.copy_(images)
            y.copy_(labels)
            graph.replay()

        return timed(step, self.device)


def plain_network(name: str, device: torch.device) -> nn.Module:
    _, size, channels = DATA[name]
    torch.manual_seed(0)
    model = build_model(name, channels=channels, image_size=(size, size), num_classes=10)
    return restore_batchnorm(model).to(device, memory_format=torch.channels_last).train()


def timed(step: Callable[[], None], device: torch.device, warm: int = 3) -> Turn:
    def turn(steps: int) -> float:
        for _ in range(warm):
            step()
        wait_for(device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        wait_for(device)
        return time.perf_counter() - started

    return turn


def bnexp_turn(
    name: str, device: torch.device, batch_size: int, compiled: bool, folder: Path
) -> Turn:
    training = make_training(
        name, device, batch_size, {"compile": compiled}, train=IMAGES, test=100
    )
    loop = Loop(training, folder)

    def turn(steps: int) -> float:
        warm = EVERY - training.state.step % EVERY if steps % EVERY == 0 else 3
        return loop.seconds(steps, warm)

    return turn


class PilImages(Dataset):
    def __init__(self, name: str) -> None:
        _, size, channels = DATA[name]
        rng = np.random.default_rng(0)
        shape = (IMAGES, size, size, channels) if channels > 1 else (IMAGES, size, size)
        self.images = rng.integers(0, 256, shape, dtype=np.uint8)
        self.labels = rng.integers(0, 10, IMAGES).tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize([0.5] * channels, [0.25] * channels)]
        )

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def usual_turn(name: str, device: torch.device, batch_size: int, workers: int) -> Turn:
    """As most scripts are; the workers start and end with a turn, so as not to disturb others."""
    model = plain_network(name, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, nesterov=True)
    loader = DataLoader(
        PilImages(name),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )

    def endless():
        while True:
            yield from loader

    def turn(steps: int) -> float:
        batches = endless()
        warm = 2 * workers + 2  # what the workers had prefetched when the turn began
        for number in range(warm + steps):
            if number == warm:
                wait_for(device)
                started = time.perf_counter()
            x, y = next(batches)
            x = x.to(device, non_blocking=True).to(memory_format=torch.channels_last)
            y = y.to(device, non_blocking=True)
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            (logits.argmax(1) == y).float().mean().item()
        wait_for(device)
        seconds = time.perf_counter() - started
        batches.close()
        return seconds

    return turn


CONTENDERS = ("bare", "bare compiled", "bare graph", "bnexp", "bnexp compiled", "usual")


def make_turn(
    contender: str, name: str, device: torch.device, batch_size: int, workers: int, folder: Path
) -> Turn:
    if contender == "usual":
        return usual_turn(name, device, batch_size, workers)
    if contender.startswith("bnexp"):
        return bnexp_turn(name, device, batch_size, contender.endswith("compiled"), folder)
    loop = BareLoop(name, device, batch_size)
    if contender == "bare graph":
        return loop.graph_turn()
    return loop.turn(torch.compile(loop.model) if contender == "bare compiled" else loop.model)


def measure(name: str, batch_size: int, arguments: argparse.Namespace, folder: Path) -> list[dict]:
    """One row per contender that ran."""
    device = arguments.device
    turns: dict[str, Turn] = {}
    steps: dict[str, int] = {}
    for contender in arguments.only:
        if contender == "bare graph" and device.type != "cuda":
            continue
        try:
            turn = make_turn(contender, name, device, batch_size, arguments.workers, folder)
            turn(2)  # compiles, and tunes convolutions
            each = turn(5) / 5
        except Exception as error:  # the others are still worth having
            reason = (str(error).splitlines() or [""])[0]
            print(
                f"{name}, {batch_size}, {contender}: {type(error).__name__}: {reason}",
                file=sys.stderr,
            )
            continue
        count = max(5, round(arguments.seconds / each))
        if contender.startswith("bnexp") and count >= EVERY // 2:
            count = max(1, round(count / EVERY)) * EVERY
        turns[contender], steps[contender] = turn, min(count, 2000)
    times: dict[str, list[float]] = {contender: [] for contender in turns}
    order = list(turns)
    for number in range(arguments.rounds):
        start = number % len(order)
        for contender in order[start:] + order[:start]:
            times[contender].append(turns[contender](steps[contender]) / steps[contender])
    rows = []
    for contender, each in times.items():
        base = times.get("bare", each)
        ratio = statistics.median(a / b for a, b in zip(each, base, strict=True))
        median = statistics.median(each)
        rows.append(
            {
                "network": name,
                "batch": batch_size,
                "contender": contender,
                "ms": 1e3 * median,
                "ms_least": 1e3 * min(each),
                "ms_most": 1e3 * max(each),
                "images_per_second": batch_size / median,
                "ratio_to_bare": ratio,
                "steps": steps[contender],
                "rounds": arguments.rounds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--models", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 512, 1024])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn, about")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    device = arguments.device
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is usable here; try --device cpu")
    allow_tf32(True)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{what}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{arguments.workers} DataLoader workers, {arguments.rounds} rounds\n"
    )
    print("| network | batch | contender | step, ms (range) | images/s | ÷ bare |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for name in arguments.models:
        for batch_size in arguments.batches:
            # Else torch.compile would make batch sizes dynamic and give up after some networks.
            torch._dynamo.reset()
            with tempfile.TemporaryDirectory() as folder:
                rows = measure(name, batch_size, arguments, Path(folder))
            for row in rows:
                print(
                    f"| {name} | {batch_size} | {row['contender']} | {row['ms']:.3f} "
                    f"({row['ms_least']:.3f}…{row['ms_most']:.3f}) | "
                    f"{row['images_per_second']:,.0f} | {row['ratio_to_bare']:.2f} |",
                    flush=True,
                )
                if arguments.json:
                    with arguments.json.open("a") as file:
                        file.write(json.dumps({"device": what, **row}) + "\n")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
