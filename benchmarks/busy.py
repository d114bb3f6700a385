"""What waiting threads cost: recomputing and training, on a quiet machine and on a busy one.

    python benchmarks/busy.py [--rounds N] [--images N]

Prints Markdown. Every figure is a process of its own with as many threads as cores, alone and
beside one busy process per core. A fair share beside those is half of the machine, so that twice
the quiet time is fair and what is beyond it was lost to threads that spin while they wait. In the
second line `bnexp` chooses, as its command does where the user has set nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

SETTINGS: dict[str, dict[str, str]] = {
    "as OpenMP has it": {},
    "as `bnexp` chooses": {"CHOOSE": "1"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = {name for setting in SETTINGS.values() for name in setting} | {"GOMP_SPINCOUNT"}

WORK = """
import os, sys, time
sys.path.insert(0, {folder!r})
from bnexp.performance import keep_freed_memory, wait_briefly
if "CHOOSE" in os.environ:
    wait_briefly()
keep_freed_memory()
import torch
from recompute import images, small_cnn, split
from bnexp.statistics import recompute_statistics
x, model = images({images}), small_cnn()
batches = split(x, 128, torch.device("cpu"))
def exact():
    recompute_statistics(model, batches, "exact")
def train():
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for batch in batches[:30]:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
{work}()
started = time.perf_counter()
{work}()
print(time.perf_counter() - started)
"""


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute all the time, ended at the end."""
    started = [
        subprocess.Popen([sys.executable, "-c", "while True: sum(range(100000))"])
        for _ in range(processes)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def seconds(work: str, images: int, setting: dict[str, str]) -> float:
    code = WORK.format(folder=os.path.dirname(os.path.abspath(__file__)), images=images, work=work)
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **setting},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=8000)
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    found: dict[tuple[str, str, bool], list[float]] = {}
    began = time.monotonic()
    for _ in range(arguments.rounds):
        for beside in (False, True):
            with busy(cores if beside else 0):
                for work in ("exact", "train"):
                    for name, setting in SETTINGS.items():
                        time_taken = seconds(work, arguments.images, setting)
                        found.setdefault((work, name, beside), []).append(time_taken)
    print(f"{cores} cores, {arguments.rounds} rounds, {time.monotonic() - began:.0f} s in all\n")
    print("| work | setting | quiet, s | of the first | busy, s | of the fair share |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for work in ("exact", "train"):
        first = statistics.median(found[work, "as OpenMP has it", False])
        for name in SETTINGS:
            quiet, loaded = (statistics.median(found[work, name, b]) for b in (False, True))
            row = (f"{quiet:.2f}", f"{quiet / first:.2f}", f"{loaded:.2f}")
            print(f"| {work} | {name} | {' | '.join(row)} | {loaded / (2 * first):.2f} |")


if __name__ == "__main__":
    main()
