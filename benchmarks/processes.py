"""Several processes against one: what is gained, and what their meetings cost.

    python benchmarks/processes.py [--rounds N] [--only PART ...] [--quick] [--processor-time]

Prints Markdown; a function per part:

exact     `recompute_statistics(method="exact")` on 8,000 images: one process of two threads against
          two processes of one thread each, which have half of the images; and two processes with
          more and more images each
meetings  one meeting of the ranks, with the moments of a BN layer
exchanges one exchange of tensors in a step: the moments of a BN layer, and gradients
steps     the share of what is exchanged in a step of training
train     a whole `bnexp train`, imports and all: one process of two threads against two of one

The processes live through all rounds, in which the contenders take turns; which begins alternates.
A round gives one ratio; printed are the medians with their quartiles. With --processor-time the
time is that of the processor (of the busiest rank) instead of the wall clock: steadier where others
use the machine, and it leaves out what ranks wait for one another.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMAGES, BATCH = 8000, 128


class Group:
    """Processes that are the ranks of one group, each with so many threads, told what to do."""

    def __init__(self, size: int, threads: int, processor_time: bool) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.size = size
        self._ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    "--worker",
                    json.dumps(
                        {
                            "rank": rank,
                            "size": size,
                            "store": str(Path(self._folder.name, "store")),
                            "processor_time": processor_time,
                        }
                    ),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
                    "OMP_NUM_THREADS": str(threads),
                },
            )
            for rank in range(size)
        ]

    def seconds(self, job: str, *arguments: int) -> float:
        """Of the slowest rank."""
        for rank in self._ranks:
            rank.stdin.write(json.dumps([job, *arguments]) + "\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self._ranks]
        if not all(answers):
            sys.exit("a rank has failed")
        return max(map(float, answers))

    def close(self) -> None:
        for rank in self._ranks:
            rank.stdin.close()
        for rank in self._ranks:
            rank.wait()
        self._folder.cleanup()


def work(job: dict) -> None:
    """A rank: does what it reads on stdin, and writes the seconds that it took."""
    from bnexp.performance import keep_freed_memory

    keep_freed_memory()
    import torch
    import torch.distributed as distributed
    from recompute import images, small_cnn

    from bnexp.collectives import Collectives
    from bnexp.config import resolve
    from bnexp.ranks import Alone, TorchRanks
    from bnexp.statistics import recompute_statistics
    from bnexp.training.build import build_training
    from bnexp.training.loop import train_step

    distributed.init_process_group(
        "gloo", init_method=f"file://{job['store']}", rank=job["rank"], world_size=job["size"]
    )
    ranks = TorchRanks() if job["size"] > 1 else Alone()
    model = small_cnn()
    all_batches = [
        b.contiguous(memory_format=torch.channels_last) for b in images(IMAGES).split(BATCH)
    ]

    def exact(own: int) -> None:
        """Of so many images that this rank has."""
        count = -(-own // BATCH)
        start = job["rank"] * count
        mine = [all_batches[i % len(all_batches)] for i in range(start, start + count)]
        recompute_statistics(model, mine, "exact", memory="8GiB", ranks=ranks)

    def meet(channels: int) -> None:
        value = torch.randn(2, channels, dtype=torch.float64)
        for _ in range(100):
            ranks.gather(value, "a BN layer")

    def exchange(channels: int) -> None:
        value = torch.randn(2 * channels + 1, dtype=torch.float64)
        for _ in range(100):
            collectives.gather(value)

    def add_up(numbers: int) -> None:
        value = torch.zeros(numbers)
        for _ in range(20):
            distributed.all_reduce(value, group=collectives.group)

    def steps(kind: int) -> None:
        """20 steps: 0: BN over all ranks; 1: over each rank's part; 2: and no gradients told."""
        training, model, batches = trainings(kind == 0)
        without = contextlib.nullcontext() if kind < 2 else model.no_sync()
        with without:
            for _ in range(20):
                train_step(training, model, batches, 0.01)

    @functools.cache
    def trainings(across: bool) -> tuple:
        part = None if across else BATCH // job["size"]
        config = resolve(
            {
                "data": {"name": "digits"},
                "model": {"name": "small-cnn"},
                "statistics": {"normalization_batch": part},
                "training": {"steps": 10**6, "batch_size": BATCH},
            },
            ["data.image_size=28"],
            "the benchmark",
        )
        training = build_training(config, torch.device("cpu"), ranks=ranks)
        training.state.model.train()
        batches = training.data.train.training_batches(BATCH, share=training.processes.share)
        model = training.state.model
        return training, model if job["size"] == 1 else training.processes.parallel(model), batches

    collectives = Collectives(ranks, torch.device("cpu")) if job["size"] > 1 else None
    jobs: dict[str, Callable[[int], None]] = {
        "exact": exact,
        "meet": meet,
        "exchange": exchange,
        "add_up": add_up,
        "steps": steps,
    }
    clock = time.process_time if job["processor_time"] else time.perf_counter
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        ranks.gather(None, "the start")
        started = clock()
        jobs[name](*arguments)
        print(clock() - started, flush=True)
    distributed.destroy_process_group()


def quartiles(values: list[float], digits: int = 3) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def exact(options: argparse.Namespace) -> None:
    total = IMAGES // 4 if options.quick else IMAGES
    one = Group(1, 2, options.processor_time)
    two = Group(2, 1, options.processor_time)
    own = [total // 8, total // 4, total // 2]
    times: dict[int, list[float]] = {n: [] for n in own}
    ratios, alone, together = [], [], []
    for group, n in ((one, total), (two, total // 2)):
        group.seconds("exact", n)  # warms up
    for number in range(options.rounds):
        for turn in (0, 1) if number % 2 else (1, 0):
            if turn:
                alone.append(one.seconds("exact", total))
            else:
                together.append(two.seconds("exact", total // 2))
        ratios.append(together[-1] / alone[-1])
        for n in own[:-1]:
            times[n].append(two.seconds("exact", n))
        times[own[-1]].append(together[-1])
    one.close()
    two.close()
    print(f"\n## `exact` on {total:,} images (small CNN, batches of {BATCH})\n")
    print("| | seconds |\n| --- | ---: |")
    print(f"| one process of two threads | {quartiles(alone)} |")
    print(f"| two processes of one thread | {quartiles(together)} |")
    print(f"| ratio | {quartiles(ratios)} |")
    print("\n| images of each of two ranks | seconds | per 1,000 images |\n| ---: | ---: | ---: |")
    for n, found in times.items():
        median = statistics.median(found)
        print(f"| {n:,} | {quartiles(found)} | {1000 * median / n:.3f} |")


def meetings(options: argparse.Namespace) -> None:
    print("\n## One meeting of the ranks (moments of a BN layer, float64)\n")
    print("| ranks | channels | microseconds |\n| ---: | ---: | ---: |")
    for size in (2, 4):
        group = Group(size, 1, options.processor_time)
        for channels in (64, 512, 2048):
            found = [1e4 * group.seconds("meet", channels) for _ in range(options.rounds)]
            print(f"| {size} | {channels} | {quartiles(found, 0)} |")
        group.close()


def exchanges(options: argparse.Namespace) -> None:
    print("\n## One exchange of tensors in a step\n")
    print("| ranks | what | microseconds |\n| ---: | --- | ---: |")
    for size in (2, 4):
        group = Group(size, 1, options.processor_time)
        for channels in (64, 512, 2048):
            found = [1e4 * group.seconds("exchange", channels) for _ in range(options.rounds)]
            print(f"| {size} | gather, moments of {channels} channels | {quartiles(found, 0)} |")
        for numbers in (50_000, 1_000_000):
            found = [5e4 * group.seconds("add_up", numbers) for _ in range(options.rounds)]
            print(f"| {size} | all-reduce, {numbers:,} gradients | {quartiles(found, 0)} |")
        group.close()


def steps(options: argparse.Namespace) -> None:
    one, two = Group(1, 2, options.processor_time), Group(2, 1, options.processor_time)
    found: dict[int, list[float]] = {0: [], 1: [], 2: []}
    alone = []
    for number in range(options.rounds + 1):
        by_one = 50 * one.seconds("steps", 0)
        by_two = {kind: 50 * two.seconds("steps", kind) for kind in found}
        if number:  # the first warms up
            alone.append(by_one)
            for kind, times in found.items():
                times.append(by_two[kind])
    one.close()
    two.close()
    print(f"\n## A step of two ranks (small CNN, 28 × 28 pixels, mini-batches of {BATCH})\n")
    print("| | milliseconds |\n| --- | ---: |")
    print(f"| one process of two threads | {quartiles(alone, 1)} |")
    print(f"| BN over the whole mini-batch, gradients told | {quartiles(found[0], 1)} |")
    print(f"| BN over each rank's part, gradients told | {quartiles(found[1], 1)} |")
    print(f"| BN over each rank's part, nothing told | {quartiles(found[2], 1)} |")
    told, apart, silent = (statistics.median(found[kind]) for kind in found)
    print(f"\nShare of the exchanges of BN layers {(told - apart) / told:.0%}, ", end="")
    print(f"of the gradients {(apart - silent) / told:.0%}; ", end="")
    print(f"a step takes {told / statistics.median(alone):.2f} of the one process's.")


def train(options: argparse.Namespace) -> None:
    """Processor time is that of all processes together."""
    length = "training.steps=100" if options.quick else "training.epochs=1"
    ways = {"one process of two threads": (1, 2), "two processes of one thread": (2, 1)}
    wall: dict[str, list[float]] = {way: [] for way in ways}
    busy: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(max(1, options.rounds // 3)):
        for way, (processes, threads) in list(ways.items())[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "bnexp", "train", "fashion-mnist", length, "-q"]
                command.append("expect.test_accuracy=0")
                command += ["--runs-dir", folder, "--processes", str(processes)]
                environment = {
                    **os.environ,
                    "PYTHONPATH": str(HERE.parent),
                    "OMP_NUM_THREADS": str(threads),
                }
                before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                wall[way].append(time.perf_counter() - started)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                took = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
                busy[way].append(took)
    print(f"\n## `bnexp train fashion-mnist {length}`, whole processes\n")
    print("| | seconds | of processor |\n| --- | ---: | ---: |")
    for way in ways:
        print(f"| {way} | {quartiles(wall[way], 1)} | {quartiles(busy[way], 1)} |")
    for what, times in (("seconds", wall), ("of processor", busy)):
        ratios = [b / a for a, b in zip(*times.values(), strict=True)]
        print(f"\nRatio, {what}: {quartiles(ratios)}.")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "exact": exact,
    "meetings": meetings,
    "exchanges": exchanges,
    "steps": steps,
    "train": train,
}


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return
    for part in options.only:
        PARTS[part](options)


if __name__ == "__main__":
    main()
