"""Several processes against one: what is gained, and what their meetings cost.

    python benchmarks/processes.py [--rounds N] [--only PART ...] [--quick] [--processor-time]

Prints Markdown; a function per part:

exact     `recompute_statistics(method="exact")` on 8,000 images: one process of two threads against
          two processes of one thread each, which have half of the images; and two processes with
          more and more images each
meetings  one meeting of the ranks, with the moments of a BN layer

The processes live through all rounds, in which the contenders take turns; which begins alternates.
A round gives one ratio; printed are the medians with their quartiles. With --processor-time the
time is that of the processor (of the busiest rank) instead of the wall clock: steadier where others
use the machine, and it leaves out what ranks wait for one another.
"""

from __future__ import annotations

import argparse
import json
import os
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

    from bnexp.ranks import Alone, TorchRanks
    from bnexp.statistics import recompute_statistics

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

    jobs: dict[str, Callable[[int], None]] = {"exact": exact, "meet": meet}
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


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"exact": exact, "meetings": meetings}


def main() -> None:
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
