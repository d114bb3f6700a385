"""What an audit costs beside the passes it can't do without.

    python benchmarks/audit.py [--images 2000] [--rounds 3] [--healthy] [--device cuda]

ResNet-18 at 64 px, as many images to recompute from as to test on, four conditions: running
averages, recomputed ones (exact), a blend of both, and batch statistics. The bare passes are one
recomputation and an evaluation under each condition. Where averages cost something, gradients are
taken at three points on 1,000 test images: the attribution's passes, also timed by themselves; an
audit may take 1.2 times the bare passes and these. The model is trained for a few steps on noise of
ten kinds; its averages then get momentum 0.002's share of their start, or with --healthy
none. Rounds are interleaved; medians, of wall and of processor time, in Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision.models import resnet18

import bnexp
from bnexp.evaluation.attribution import attribute
from bnexp.evaluation.scoring import Task, scores_under
from bnexp.evaluation.subsets import Batches
from bnexp.performance import keep_freed_memory
from bnexp.statistics import batch_statistics

SIZE, BATCH = 64, 64
Stopwatch = tuple[float, float]


def images(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noise of ten kinds: so many cells across, brighter the more there are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    x = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    for label in range(10):
        of = labels == label
        coarse = torch.randn(int(of.sum()), 3, 2 + label, 2 + label, generator=generator)
        x[of] += nn.functional.interpolate(coarse, SIZE) + 0.1 * label
    x = x.contiguous(memory_format=torch.channels_last)
    return list(zip(x.split(BATCH), labels.split(BATCH), strict=True))


def trained(data: list, steps: int, device: str, healthy: bool) -> nn.Module:
    torch.manual_seed(0)
    model = resnet18(num_classes=10).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for step in range(steps):
        x, y = (t.to(device) for t in data[step % len(data)])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    bnexp.recompute_statistics(model, data).copy_to(model)
    if not healthy:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                share = 0.998**steps
                layer.running_mean.mul_(1 - share)
                layer.running_var.mul_(1 - share).add_(share)
    return model.eval()


def timed(function: Callable[[], object], device: str) -> Stopwatch:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    keep_freed_memory()
    population, test = images(given.images, 1), images(given.images, 2)
    model = trained(population, given.steps, given.device, given.healthy)
    task = Task(torch.device(given.device))
    running = bnexp.running_statistics(model)
    recomputed = bnexp.recompute_statistics(model, population)

    def bare() -> None:
        bnexp.recompute_statistics(model, population)
        conditions = {
            "running": running.applied_to,
            "recomputed": recomputed.applied_to,
            "blended": recomputed.applied_to,
            "batch": batch_statistics,
        }
        for name, condition in conditions.items():
            scores_under(model, test, {name: condition}, task)

    looked = Batches(test)
    looked.sizes.extend(len(y) for _, y in test)
    some = looked.only(looked.spread(1000))
    gradients = partial(attribute, model, lambda: some, task.loss, running, recomputed)
    audits = []

    def audit() -> None:
        audits.append(bnexp.audit(model, population, test, batch=True, prior=500))

    whats = {"bare passes": bare, "the attribution's three": gradients, "audit": audit}
    times: dict[str, list[Stopwatch]] = {name: [] for name in whats}
    for _ in range(given.rounds):
        for name, function in whats.items():
            times[name].append(timed(function, given.device))
    found = audits[-1]
    attributed = found.attribution is not None
    print(found.summary, "\n")
    print("| | wall, s | processor, s |\n| --- | ---: | ---: |")
    for name, rounds in times.items():
        wall, processor = (statistics.median(t) for t in zip(*rounds, strict=True))
        print(f"| {name} | {wall:.1f} | {processor:.1f} |")
    for kind, name in enumerate(("wall", "processor")):
        ratios = [
            (audit[kind] - attributed * three[kind]) / passes[kind]
            for passes, three, audit in zip(*times.values(), strict=True)
        ]
        shown = ", ".join(f"{r:.2f}" for r in ratios)
        print(f"\naudit{' less the three' * attributed} / bare passes, {name} time: "
              f"{statistics.median(ratios):.2f} ({shown})")  # fmt: skip
    print("\n" + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items()))


if __name__ == "__main__":
    main()
