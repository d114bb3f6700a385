"""What each performance setting is worth: on against off, all others as bnexp has them.

    python benchmarks/settings.py [--device cpu|cuda] [--rounds N] [--only SETTING ...] [--quick]
                                  [--processor-time]

Every variant is a process of its own (the allocator is set before the first allocation) with a
real training of bnexp: its model, optimizer, estimators and step log, and its evaluation of 10,000
test images. The two variants of a setting take turns, and which begins alternates; a round gives
one ratio on / off, and printed are the medians of these with their quartiles. `nothing` compares
two equal processes: how far its ratios are from 1 is how far the others' may be by chance.
With --processor-time, times are of the processor instead of the wall clock: steadier where others
use the machine, and only right with one thread (OMP_NUM_THREADS=1). Images are random, of
Fashion-MNIST's shape for small-cnn and CIFAR-10's for resnet20.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BATCH_SIZE = 128
SETTINGS = ("nothing", "allocator", "channels_last", "compile", "fold_batchnorm", "tf32")
TOUCHES = {"compile": ("step",), "fold_batchnorm": ("evaluation",)}


class Worker:
    """A process with one model under given settings, which does as it is told and is timed."""

    def __init__(self, model: str, performance: dict, options: dict) -> None:
        job = {"model": model, "performance": performance, **options}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
        )

    def seconds(self, what: str, count: int) -> float:
        self._process.stdin.write(f"{what} {count}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit("a worker has failed")
        return float(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def work(job: dict) -> None:
    """The worker: reads `step N` or `evaluation N` on stdin, writes seconds for each on stdout."""
    if job["performance"].get("allocator", True):
        from bnexp.performance import keep_freed_memory

        keep_freed_memory()
    import tempfile

    import sessions
    import torch
    from sessions import Loop, make_training, wait_for

    from bnexp.condition import Condition
    from bnexp.evaluation.evaluate import evaluate
    from bnexp.training.subject import run_subject

    device = torch.device(job["device"])
    clock = sessions.clock = getattr(time, job["clock"])
    training = make_training(
        job["model"], device, BATCH_SIZE, job["performance"], train=4096, test=job["test"]
    )
    subject = run_subject(training.state.model, training.data, training.config)
    with tempfile.TemporaryDirectory() as name:
        loop = Loop(training, Path(name))
        for line in sys.stdin:
            what, count = line.split()
            if what == "step":
                seconds = loop.seconds(int(count), warm=2)
            else:
                started = clock()
                for _ in range(int(count)):
                    running = {Condition("running"): training.state.estimates()["running"]}
                    evaluate(subject, running, fold=training.config.performance.fold_batchnorm)
                wait_for(device)
                seconds = clock() - started
            print(seconds, flush=True)


def compare(model: str, setting: str, rounds: int, options: dict) -> list[str]:
    """Rows of the table."""
    on, off = ({} if setting == "nothing" else {setting: value} for value in (True, False))
    workers = [Worker(model, performance, options) for performance in (on, off)]
    rows = []
    for what in TOUCHES.get(setting, ("step", "evaluation")):
        for worker in workers:
            worker.seconds(what, 1)
        once = workers[1].seconds(what, 5) / 5
        count = max(1, round(0.5 / once))
        times: list[list[float]] = [[], []]
        for number in range(rounds):
            for index in (0, 1) if number % 2 else (1, 0):
                times[index].append(workers[index].seconds(what, count) / count)
        ratios = [a / b for a, b in zip(*times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        first, second = (1e3 * statistics.median(each) for each in times)
        rows.append(
            f"| {model} | {what} | {setting} | {first:.2f} | {second:.2f} | {middle:.3f} "
            f"({low:.3f}…{high:.3f}) |"
        )
    for worker in workers:
        worker.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--models", nargs="+", default=["small-cnn", "resnet20"])
    parser.add_argument("--quick", action="store_true", help="5 rounds, 1,000 test images")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(json.loads(arguments.worker))
        return
    import torch

    rounds, test = (5, 1000) if arguments.quick else (arguments.rounds, 10_000)
    clock = "process_time" if arguments.processor_time else "perf_counter"
    options = {"device": arguments.device, "test": test, "clock": clock}
    print(
        f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, "
        f"batches of {BATCH_SIZE}, {test:,} test images, {rounds} rounds, "
        f"{'processor' if arguments.processor_time else 'wall'} time\n"
    )
    print("| network | what | setting | on, ms | off, ms | on / off (quartiles) |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for model in arguments.models:
        for setting in arguments.only:
            if setting == "tf32" and not arguments.device.startswith("cuda"):
                continue
            for row in compare(model, setting, rounds, options):
                print(row, flush=True)


if __name__ == "__main__":
    main()
