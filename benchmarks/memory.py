"""How much memory a long run takes, from its beginning to its end (Linux).

    python benchmarks/memory.py [--steps N] [--set KEY=VALUE ...]

Runs the real command on the embedded digits, with logging, five estimators, parameter averages,
evaluations and checkpoints, and reads its resident memory from outside every half second. Prints
a markdown table of the memory at shares of the run, and the peak, which the final evaluation and
the picture count towards.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """\
name: long
data: {{name: digits, val_fraction: 0.1}}
model: {{name: mlp}}
statistics:
  estimators:
    ema-0.99: {{rule: ema, decay: 0.99}}
    debiased: {{rule: ema, decay: 0.999, debias: true}}
    average: {{rule: cumulative}}
    pooled: {{rule: pooled, window: 50}}
  recompute: {{samples: 300}}
training:
  steps: {steps}
  batch_size: 16
  optimizer: {{lr: 0.01}}
  averages: {{ema: {{decay: 0.999}}}}
test: {{every: {every}, statistics: [running, recomputed]}}
checkpoints: {{every_seconds: 10}}
"""
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def resident(pid: int, field: str = "VmRSS") -> float | None:
    """MiB, or None when the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in status.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return None


def last_step(path: Path) -> int:
    """The step of the last whole row of steps.csv."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 500))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    step = lines[-2].partition(b",")[0] if len(lines) > 2 else b""
    return int(step) if step.isdigit() else 0


def watch(command: list[str], folder: Path) -> tuple[list[tuple[int, float]], float]:
    """(step, MiB) over the run, and the peak in MiB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    samples, peak = [], 0.0
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            now, high = resident(process.pid), resident(process.pid, "VmHWM")
            step = last_step(folder / "runs" / "long-1" / "steps.csv")
            if now and step:
                samples.append((step, now))
            peak = max(peak, high or 0.0)
            time.sleep(0.5)
    if process.returncode:
        sys.exit((folder / "output").read_text()[-3000:])
    return samples, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").exists():
        sys.exit("this benchmark reads /proc, which only Linux has")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = arguments.steps
        (folder / "long.yaml").write_text(CONFIG.format(steps=steps, every=max(1, steps // 50)))
        started = time.perf_counter()
        samples, peak = watch(
            [sys.executable, "-m", "bnexp", "train", "long.yaml", *arguments.overrides], folder
        )
        seconds = time.perf_counter() - started
    print(f"{steps:,} steps in {seconds:.0f} s\n")
    print("| share of the run | step | resident memory, MiB |")
    print("| ---: | ---: | ---: |")
    for share in SHARES:
        reached = [sample for sample in samples if sample[0] >= share * steps] or samples[-1:]
        step, memory = reached[0]
        print(f"| {share:.0%} | {step:,} | {memory:.1f} |")
    print(f"| peak, to the end of the command | | {peak:.1f} |")


if __name__ == "__main__":
    main()
