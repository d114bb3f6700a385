"""What comparing several kinds of statistics costs, and what a report of a long run takes.

    python benchmarks/evaluation.py [--rounds N] [--steps N]

Prints Markdown. First the comparison of five kinds of statistics on the 10,000 test images of
Fashion-MNIST (predictions, intervals, tests) against five bare passes: a loop that counts right
answers, over the same batches on the same device with the same folded BN layers. They take turns;
medians of the ratios. Then the time and size of `bnexp report` for a run of so many steps, which is
trained first, on the digits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bnexp.analysis.comparison import compare
from bnexp.condition import Condition
from bnexp.config import resolve
from bnexp.evaluation.predictions import predict_under
from bnexp.nn.folding import folded
from bnexp.performance import keep_freed_memory
from bnexp.training.build import build_training

KINDS = ("running", "one", "two", "three", "four")
CONFIG = {
    "data": {"name": "fashion-mnist"},
    "model": {"name": "small-cnn"},
    "statistics": {"estimators": {name: {"rule": "cumulative"} for name in KINDS[1:]}},
    "training": {"steps": 1},
}


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare_kinds(rounds: int) -> None:
    training = build_training(resolve(CONFIG, [], "benchmark"), torch.device("cpu"))
    model, test = training.state.model.eval(), training.data.test
    kinds = {Condition(name): s for name, s in training.state.estimates().items()}
    size = training.config.test.batch_size

    def bare_passes() -> None:
        for _ in kinds:
            right = torch.zeros((), dtype=torch.int64)
            with torch.inference_mode(), folded(model):
                for x, y in test.batches(size):
                    right += (model(x).argmax(1) == y).sum()
            right.item()

    def comparison() -> None:
        found = predict_under(model, lambda: test.batches(size), kinds, fold=True)
        compare(found, Condition("running"), training.data.info.classes)

    ratios = []
    for i in range(rounds + 1):
        order = (comparison, bare_passes) if i % 2 else (bare_passes, comparison)
        taken = {function: seconds(function) for function in order}
        if i:
            ratios.append(taken[comparison] / taken[bare_passes])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"| five kinds against five bare passes | {middle:.2f} ({low:.2f}…{high:.2f}) |")


def report(steps: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        config = Path(name) / "long.yaml"
        config.write_text(
            "data: {name: digits}\nmodel: {name: mlp}\n"
            f"training: {{steps: {steps}, batch_size: 32}}\n"
            f"test: {{every: {max(1, steps // 200)}, statistics: [running, recomputed]}}\n"
        )
        run_bnexp(name, "train", str(config))
        taken = [seconds(lambda: run_bnexp(name, "report")) for _ in range(3)]
        (page,) = Path(name).glob("runs/*/report.html")
        print(f"| report of {steps:,} steps, s | {statistics.median(taken):.1f} |")
        print(f"| its size, KB | {page.stat().st_size / 1000:.0f} |")


def run_bnexp(folder: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "bnexp", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50_000)
    arguments = parser.parse_args()
    keep_freed_memory()
    print("| what | measured |\n| --- | ---: |")
    compare_kinds(arguments.rounds)
    report(arguments.steps)


if __name__ == "__main__":
    main()
