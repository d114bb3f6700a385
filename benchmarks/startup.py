"""How long commands take that do little: beside a process that only imports torch.

    python benchmarks/startup.py [--rounds N]

Whole processes of one thread, in turns, of `import torch`, `bnexp --help`, `bnexp data`,
`bnexp train smoke` (300 steps of a small network) and `bnexp eval` of that run. Prints medians
over the rounds of wall and of processor seconds, and of the ratios of wall seconds to those of
`import torch` in the same round. The process that draws a training's picture uses another core; it
is in the processor seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
COMMANDS = {
    "`import torch`": (sys.executable, "-c", "import torch"),
    "`bnexp --help`": ("bnexp", "--help"),
    "`bnexp data`": ("bnexp", "data"),
    "`bnexp train smoke`": ("bnexp", "train", "smoke", "--quiet"),
    "`bnexp eval`": ("bnexp", "eval"),
}


def took(words: tuple[str, ...], folder: str) -> tuple[float, float]:
    """Processor and wall seconds of a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [str(BIN / words[0]), *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        check=True,
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        took(COMMANDS["`bnexp train smoke`"], folder)  # files are read, and compiled, once before
        for _ in range(rounds):
            for name, words in COMMANDS.items():
                found[name].append(took(words, folder))
    base = [wall for _, wall in found["`import torch`"]]
    print("| | wall seconds | processor seconds | ratio to `import torch` |")
    print("| --- | ---: | ---: | ---: |")
    for name, values in found.items():
        processor, wall = (statistics.median(v) for v in zip(*values, strict=True))
        ratio = statistics.median(w / b for (_, w), b in zip(values, base, strict=True))
        print(f"| {name} | {wall:.2f} | {processor:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
