"""`exact` and `pooled` as users of the API call them: with the allocator as it is, few batches too.

    python benchmarks/api.py [--rounds N] [--only NAME ...] [--parts]

Prints Markdown: times against fvcore's `update_bn_stats` on the same batches in one process, in
turns, as medians of the ratios of wall and of processor time in a round; and peak memory beyond
what was there before, each in a process of its own. Networks are torchvision's, random images.
With `--parts`: what `exact` takes for what, and what only to write, into fresh memory, and to read
all that must wait at one BN layer would add to fvcore's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import recompute
import torch
import torchvision
from torch import nn

from bnexp.statistics import estimate_memory, exact, recompute_statistics


def _random(count: int, pixels: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 3, pixels, pixels, generator=generator).split(size))


def _small_cnn() -> tuple[nn.Module, list[torch.Tensor]]:
    batches = recompute.split(recompute.images(8000), 128, torch.device("cpu"))
    return recompute.small_cnn(), batches


def _network(name: str, count: int, pixels: int, size: int) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return getattr(torchvision.models, name)().eval(), _random(count, pixels, size)


CASES: dict[str, Callable[[], tuple[nn.Module, list[torch.Tensor]]]] = {
    "small CNN, 8,000 images in batches of 128": _small_cnn,
    "ResNet-18, 256 images of 96 px in batches of 32": lambda: _network("resnet18", 256, 96, 32),
    "ResNet-50, 3 batches of 16 at 128 px": lambda: _network("resnet50", 48, 128, 16),
    "EfficientNet-B0, 4 batches of 16 at 160 px": lambda: _network("efficientnet_b0", 64, 160, 16),
}
WAYS: dict[str, Callable] = {
    "fvcore": recompute.by_fvcore,
    "exact": lambda model, batches: recompute_statistics(model, batches, "exact"),
    "pooled": lambda model, batches: recompute_statistics(model, batches, "pooled"),
}


def took(way: str, model: nn.Module, batches: list) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    WAYS[way](model, batches)
    return time.perf_counter() - wall, time.process_time() - cpu


def peak(case: str, way: str) -> int:
    """Bytes beyond what the process held before. To be called in a process of its own."""
    model, batches = CASES[case]()
    with torch.inference_mode():
        model(batches[0][:2])
    Path("/proc/self/clear_refs").write_text("5")
    before = recompute._status("VmRSS")
    WAYS[way](model, batches)
    return recompute._status("VmHWM") - before


def parts(case: str, rounds: int) -> str:
    """A row: wall time of `exact` by part, and of waiting alone, in shares of fvcore's."""
    model, batches = CASES[case]()
    took: Counter[str] = Counter()

    def timed(owner: type, name: str, part: Callable[..., str]) -> None:
        plain = getattr(owner, name)

        def call(*arguments, **options):
            started = time.perf_counter()
            try:
                return plain(*arguments, **options)
            finally:
                took[part(*arguments)] += time.perf_counter() - started

        static = isinstance(vars(owner)[name], staticmethod)
        setattr(owner, name, staticmethod(call) if static else call)

    scouts: list[object] = []

    def leg(self, job, *_) -> str:
        if job not in scouts:
            scouts.append(job)
        return "scouts" if scouts.index(job) in (1, 2) else "batches"

    timed(exact.Probe, "of_first", lambda *_: "probe")
    timed(exact.Lockstep, "_advance", leg)
    timed(exact._Sweep, "_meet", lambda *_: "meetings")
    timed(exact._Sweep, "_check", lambda *_: "check")
    names = ("batches", "probe", "scouts", "check", "meetings", "waiting alone")
    shares: dict[str, list[float]] = {name: [] for name in names}
    waiting = estimate_memory(model, batches)
    for _ in range(rounds):
        took.clear()
        scouts.clear()
        started = time.perf_counter()
        recompute.by_fvcore(model, batches)
        reference = time.perf_counter() - started
        recompute_statistics(model, batches, "exact")
        started = time.perf_counter()
        for part in [torch.ones(waiting.waiting // 4) for _ in batches]:
            part.sum()
        took["waiting alone"] = time.perf_counter() - started
        for name in names:
            shares[name].append(took[name] / reference)
    cells = [f"{statistics.median(shares[name]):.2f}" for name in names]
    return f"| {case} | {' | '.join(cells)} | {waiting.waiting * len(batches) / 2**20:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.row:
        print(parts(*arguments.row))
        return
    if arguments.peak:
        print(peak(*arguments.peak))
        return
    if arguments.parts:
        print("| | batches | probe | scouts | check | meetings | waiting alone | waiting, MiB |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for case in arguments.only:
            # In a process of its own, with that one's memory.
            command = [sys.executable, __file__, "--row", json.dumps([case, arguments.rounds])]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            print(found.stdout.splitlines()[-1], flush=True)
        return
    print("| | of fvcore's wall time | of its processor time | memory, MiB | fvcore's |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for case in arguments.only:
        model, batches = CASES[case]()
        rounds: list[dict[str, tuple[float, float]]] = []
        for number in range(arguments.rounds + 1):
            ways = list(WAYS)[:: 1 if number % 2 else -1]
            rounds.append({way: took(way, model, batches) for way in ways})
        del model, batches
        memory = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--peak", json.dumps([case, way])]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            memory[way] = int(found.stdout.split()[-1]) / 2**20
        for way in ("exact", "pooled"):
            cells = []
            for kind in range(2):
                ratios = sorted(r[way][kind] / r["fvcore"][kind] for r in rounds[1:])
                cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})")
            print(
                f"| `{way}`, {case} | {' | '.join(cells)} | {memory[way]:.0f} "
                f"| {memory['fvcore']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
