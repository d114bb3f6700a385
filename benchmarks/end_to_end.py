"""Whole training runs against each other: the usual PyTorch script, Lightning and bnexp.

python benchmarks/end_to_end.py [--rounds N] [--steps N] [--data FOLDER] [--workers N]

Each trains the same CNN for one epoch of Fashion-MNIST at batch 128 by SGD with Nesterov
momentum, with the whole test set every 100 steps and at the end, as a process of its own from
start to exit: imports, reading the data, training, logging and evaluating all count. They take
turns, a round is one run of each, and the order rotates. Prints a markdown table; times are
medians over rounds, ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLACES = [
    Path(os.environ.get("BNEXP_DATA", "data")),
    Path("data/FashionMNIST/raw"),
    Path("/usr/share/datasets/fashion-mnist"),
]
FILES = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]
CONFIG = """\
data:
  name: fashion-mnist
  root: {data}
model:
  name: small-cnn
training:
  {length}
  batch_size: 128
  optimizer: {{name: sgd, lr: 0.05, momentum: 0.9, nesterov: true, weight_decay: 0.0}}
  schedule: {{name: constant}}
test:
  every: 100
  batch_size: 250
  statistics: [running]
"""


@dataclass
class Result:
    seconds: float
    steps: int
    test_accuracy: float


def prepare(source: Path | None, target: Path) -> Path:
    """Fashion-MNIST as torchvision wants it, unpacked, in `target`; all contenders read it."""
    for place in [source] if source else PLACES:
        if all((place / f"{name}-ubyte.gz").is_file() for name in FILES):
            break
    else:
        sys.exit(f"no Fashion-MNIST in {source or PLACES}; name its folder with --data")
    raw = target / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        with gzip.open(place / f"{name}-ubyte.gz") as packed:
            (raw / f"{name}-ubyte").write_bytes(packed.read())
    return target


def run_script(script: str, data: Path, steps: int | None, workers: int) -> Result:
    command = [sys.executable, str(HERE / "contenders" / script), str(data)]
    command += ["--workers", str(workers)] + (["--steps", str(steps)] if steps else [])
    seconds, output = timed(command, HERE)
    return Result(seconds, **json.loads(output.splitlines()[-1]))


def run_bnexp(data: Path, steps: int | None) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "speed.yaml"
        length = f"steps: {steps}" if steps else "epochs: 1"
        config.write_text(CONFIG.format(data=data, length=length))
        seconds, _ = timed(
            [str(Path(sys.executable).with_name("bnexp")), "train", str(config)], Path(folder)
        )
        (evals,) = Path(folder).glob("runs/*/evals.csv")
        with evals.open() as lines:
            rows = [row for row in csv.DictReader(lines) if row["split"] == "test"]
        last = [row for row in rows if row["statistics"] == "running"][-1]
        return Result(seconds, int(last["step"]), float(last["accuracy"]))


def timed(command: list[str], folder: Path) -> tuple[float, str]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    started = time.perf_counter()
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr[-3000:]}")
    return seconds, finished.stdout


def table(results: dict[str, list[Result]], baseline: str) -> str:
    lines = [
        f"| | seconds (median) | range | ratio to {baseline} | test accuracy | steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in results.items():
        seconds = [run.seconds for run in runs]
        pairs = zip(runs, results[baseline], strict=True)
        ratio = statistics.median(run.seconds / base.seconds for run, base in pairs)
        accuracy = statistics.median(run.test_accuracy for run in runs)
        lines.append(
            f"| {name} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to "
            f"{max(seconds):.1f} | {ratio:.3f} | {accuracy:.4f} | {runs[-1].steps} |"
        )
    return "\n".join(lines)


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="fewer than the epoch's 468, to try it out")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--workers", type=int, default=2, help="of the other two's DataLoaders")
    parser.add_argument("--only", nargs="+", help="contenders to run: usual, lightning, bnexp")
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="bnexp-end-to-end-"))
    try:
        data = prepare(arguments.data, folder)
        scripts = {"usual": "usual_script.py", "lightning": "lightning_script.py"}
        contenders: dict[str, Callable[[], Result]] = {
            name: lambda script=script: run_script(script, data, arguments.steps, arguments.workers)
            for name, script in scripts.items()
        }
        contenders["bnexp"] = lambda: run_bnexp(data, arguments.steps)
        chosen = [name for name in contenders if name in (arguments.only or contenders)]
        results: dict[str, list[Result]] = {name: [] for name in chosen}
        for number in range(arguments.rounds):
            start = number % len(chosen)
            for name in chosen[start:] + chosen[:start]:
                results[name].append(contenders[name]())
                print(f"round {number + 1}: {name} {results[name][-1]}", file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    import torch

    print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, DataLoader workers {arguments.workers}, "
        f"{arguments.rounds} rounds\n"
    )
    print(table(results, chosen[0]))


if __name__ == "__main__":
    main()
