"""Time, memory and error of recomputing population statistics, beside torch's and fvcore's ways.

    python benchmarks/recompute.py [--device cuda] [--repeats 7] [--quick]

Prints Markdown. All contenders run in this process, one after the other in every round, on the
same batches (already on the device, channels_last), with the same allocator settings; the table
has medians. Errors are the worst over layers and channels against one float64 forward pass over
all samples as a single batch: means in standard deviations, variances relative.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

from bnexp.performance import keep_freed_memory

if __name__ == "__main__" and "--plain-malloc" not in sys.argv:
    keep_freed_memory()

import numpy as np
import torch
from torch import nn

from bnexp.statistics import METHODS, Statistics, recompute_statistics, running_statistics

FOLDERS = ("data/FashionMNIST/raw", "data", "/usr/share/datasets/fashion-mnist")


def images(count: int) -> torch.Tensor:
    """The first `count` training images of Fashion-MNIST, normalized; random ones without it."""
    root = os.environ.get("BNEXP_DATA")
    for folder in (*([root] if root else []), *FOLDERS):
        file = Path(folder) / "train-images-idx3-ubyte.gz"
        if file.exists():
            raw = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=16)
            pixels = torch.from_numpy(raw.reshape(-1, 1, 28, 28)[:count].copy())
            return (pixels.float() / 255 - 0.286) / 0.353
    print("Fashion-MNIST not found: random images", file=sys.stderr)
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def small_cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 128),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        .to(memory_format=torch.channels_last)
        .eval()
    )


def deep_cnn(depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers, channels = [], 1
    for _ in range(depth):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        channels = 16
    return nn.Sequential(*layers).to(memory_format=torch.channels_last).eval()


def split(x: torch.Tensor, size: int, device: torch.device) -> list[torch.Tensor]:
    return [b.to(device).contiguous(memory_format=torch.channels_last) for b in x.split(size)]


def by_torch(model: nn.Module, batches: list) -> Statistics:
    model = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, model)
    return running_statistics(model)


def by_fvcore(model: nn.Module, batches: list) -> Statistics:
    from fvcore.nn.precise_bn import update_bn_stats

    model = copy.deepcopy(model).train()
    update_bn_stats(model, batches, num_iters=len(batches), progress=None)
    return running_statistics(model)


CONTENDERS = {
    "torch `update_bn`": by_torch,
    "fvcore `update_bn_stats`": by_fvcore,
    **{
        f"bnexp `{method}`": lambda model, batches, method=method: recompute_statistics(
            model, batches, method
        )
        for method in METHODS
    },
}


@torch.no_grad()
def oracle(model: nn.Sequential, batches: list) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """float64 moments of every BN input, all samples as one batch, layer by layer."""
    layers, result = copy.deepcopy(model).double(), {}
    parts = [b.double() for b in batches]
    for name, layer in layers.named_children():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            rows = [p.movedim(1, -1).reshape(-1, p.shape[1]) for p in parts]
            count = sum(len(r) for r in rows)
            mean = sum(r.sum(0) for r in rows) / count
            var = sum((r - mean).square().sum(0) for r in rows) / count
            layer.running_mean, layer.running_var = mean, var
            result[name] = (mean.cpu(), var.cpu())
        parts = [layer(p) for p in parts]
    return result


def errors(found: Statistics, truth: dict) -> list[float]:
    return [
        max(
            ((found.mean[name].cpu().double() - mean).abs() / var.sqrt()).max().item(),
            ((found.var[name].cpu().double() - var).abs() / var).max().item(),
        )
        for name, (mean, var) in truth.items()
    ]


def timed(function, *args, device: torch.device) -> tuple[float, Statistics]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def compare(device: torch.device, repeats: int) -> None:
    model = small_cnn().to(device)
    batches = split(images(10_000), 128, device)
    truth = oracle(model, batches)
    seconds = {name: [] for name in CONTENDERS}
    found = {}
    for round_ in range(repeats + 1):
        for name, function in CONTENDERS.items():
            taken, found[name] = timed(function, model, batches, device=device)
            if round_:
                seconds[name].append(taken)
    base = statistics.median(seconds["fvcore `update_bn_stats`"])
    print("\n### 10,000 images, batches of 128, small CNN\n")
    print("| method | s | of fvcore | " + " | ".join(f"error, layer {n}" for n in truth) + " |")
    print("| --- " * (3 + len(truth)) + "|")
    for name, times in seconds.items():
        cells = " | ".join(f"{e:.1e}" for e in errors(found[name], truth))
        median = statistics.median(times)
        print(f"| {name} | {median:.2f} | {median / base:.2f} | {cells} |")


def one_exact(samples: int, depth: int, device: torch.device) -> None:
    """Run `exact` once in this fresh process; print seconds and bytes beyond the inputs."""
    model = (deep_cnn(depth) if depth else small_cnn()).to(device)
    batches = split(images(samples), 128, device)
    recompute_statistics(model, batches[:2], "exact")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    seconds, _ = timed(recompute_statistics, model, batches, "exact", device=device)
    after = torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")
    print(seconds, after - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def grow(device: torch.device, title: str, unit: str, settings: list[tuple[int, int]]) -> None:
    print(f"\n### {title}\n")
    print(f"| {unit} | s | ms per 1000 images and layer | memory, MiB |\n| --- | --- | --- | --- |")
    for samples, depth in settings:
        command = [sys.executable, __file__, "--device", str(device), "--one", f"{samples},{depth}"]

        def measure(*options: str, command: list[str] = command) -> list[str]:
            return subprocess.run(
                [*command, *options], check=True, stdout=subprocess.PIPE, text=True
            ).stdout.split()

        seconds = float(measure()[0])
        # With freed memory kept, what a sweep takes hides in what was there before it.
        memory = int(measure("--plain-malloc")[1])
        each = seconds * 1e6 / samples / (depth or 3)
        label = samples if unit == "images" else depth
        print(f"| {label} | {seconds:.2f} | {each:.2f} | {memory / 2**20:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeats", default=7, type=int)
    parser.add_argument("--quick", action="store_true", help="only the comparison, 3 rounds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--plain-malloc", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        one_exact(*map(int, args.one.split(",")), args.device)
        return
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    compare(args.device, 3 if args.quick else args.repeats)
    if not args.quick:
        grow(
            args.device,
            "`exact`, small CNN, by number of images",
            "images",
            [(n, 0) for n in (1000, 2000, 5000, 10_000, 20_000, 50_000)],
        )
        grow(
            args.device,
            "`exact`, 1000 images, by number of BN layers",
            "BN layers",
            [(1000, d) for d in (10, 20, 50, 100)],
        )


if __name__ == "__main__":
    main()
