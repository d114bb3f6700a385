"""The figures and numbers of docs/moving-averages.md and docs/statistics.md: `make figures`.

Trains the runs of configs/ into runs/ beside this file (those that are there already are kept;
delete the folder to start afresh), measures, draws, and writes numbers.json. MNIST and
Fashion-MNIST are looked for, or downloaded to, where bnexp always does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# The networks are so small that a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["BNEXP_DATA"] = os.path.abspath(os.environ.get("BNEXP_DATA") or ROOT / "data")

# Overrides of a config's stages: the first starts the run, the others resume it.
DENSE_AT_BOTH_ENDS = (
    ("training.steps=300",),
    ("training.steps=2700", "test.every=300"),
    ("training.steps=3000", "test.every=15"),
)
PAPER = (
    ("training.steps=500", "test.every=20", "checkpoints.every_steps=20"),
    ("training.steps=50000", "test.every=250", "checkpoints.every_steps=500"),
)
RUNS = {
    "ema-accuracy": ((),),
    "statistics-batch-8": DENSE_AT_BOTH_ENDS,
    "statistics-batch-128": DENSE_AT_BOTH_ENDS,
    "annealed-batch-8": ((),),
    "averaged-weights": ((),),
    "variance-cnn": ((),),
    "paper-with-bn": PAPER,
    "paper-without-bn": PAPER,
}


def train(name: str) -> Path:
    """The folder of the finished run `name`, trained now if it is not there."""
    from bnexp.config import load_config
    from bnexp.records import Run

    folder = HERE / "runs" / f"{name}-1"
    config = HERE / "configs" / f"{name}.yaml"
    if folder.exists():
        state = Run(folder).state
        whole = load_config(config).training.steps or state.get("total_steps")
        if state["state"] == "finished" and state["step"] == whole:
            return folder
        shutil.rmtree(folder)
    bnexp = [sys.executable, "-m", "bnexp", "train"]
    for stage, overrides in enumerate(RUNS[name]):
        what = ["--resume", str(folder)] if stage else [str(config)]
        command = [*bnexp, *what, *overrides]
        done = subprocess.run(command, cwd=HERE, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            sys.exit(done.returncode)
    return folder


def measured(name: str, measure, folder: Path) -> dict:
    """measure(folder), kept in the run folder for the next time."""
    kept = folder / f"{name}.json"
    source = HERE / "measure.py"
    if kept.exists() and kept.stat().st_mtime > source.stat().st_mtime:
        return json.loads(kept.read_text())
    found = measure(folder)
    kept.write_text(json.dumps(found))
    return found


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import draw
    import measure

    started = time.perf_counter()
    runs = {}
    for name in RUNS:
        before = time.perf_counter()
        runs[name] = train(name)
        print(f"{name}: {time.perf_counter() - before:.0f} s", flush=True)

    accuracy = measured("ema-accuracy", measure.ema_accuracy, runs["ema-accuracy"])
    small, large = (
        measured("statistics", measure.statistics_curves, runs[f"statistics-batch-{size}"])
        for size in (8, 128)
    )
    weights = measured("weights", measure.averaged_weights, runs["averaged-weights"])
    with_bn, without = (
        measured("inputs", measure.sigmoid_inputs, runs[f"paper-{kind}-bn"])
        for kind in ("with", "without")
    )
    variances = [
        measured("variances", measure.variances, runs[name])
        for name in ("statistics-batch-8", "variance-cnn")
    ]
    figures = {
        "ema-accuracy": draw.ema_accuracy(accuracy),
        "statistics": draw.statistics(small, large),
        "weights": draw.weights(weights),
        "paper": draw.paper(with_bn, without),
    }
    for name, figure in figures.items():
        draw.save(figure, HERE / f"{name}.png")

    numbers = {
        "ema_accuracy": {
            "final_train": accuracy["train"][-1],
            "final_train_with_batch_statistics": accuracy["train_with_batch_statistics"],
            "final_test": accuracy["test"][-1],
            "decays": {
                decay: {
                    **{k: v for k, v in found.items() if k != "curve"},
                    "final": found["curve"][-1],
                }
                for decay, found in accuracy["decays"].items()
            },
        },
        "statistics_gap_to_recomputed": {
            f"batch {run['batch_size']}": run["gap"] for run in (small, large)
        },
        "annealed_batch_8": measure.final_comparison(runs["annealed-batch-8"]),
        "weights": {
            "final": measure.final_comparison(runs["averaged-weights"]),
            "curves": {kind: curve["values"] for kind, curve in weights["accuracy"].items()},
            "stale_std_over_recomputed": weights["std_ratio"],
        },
        "paper": {
            kind: {k: found[k] for k in found if k.startswith("median") or k == "unit"}
            | {
                "test_at": {
                    s: found["test"][found["tested"].index(s)]
                    for s in (20, 100, 500, 1000, 5000, 10000, 50000)
                }
            }
            for kind, found in (("with", with_bn), ("without", without))
        },
        "paper_with_bn_at_the_end": measure.final_comparison(runs["paper-with-bn"]),
        "variances": variances,
    }
    (HERE / "numbers.json").write_text(json.dumps(_rounded(numbers), indent=1) + "\n")
    subprocess.run([sys.executable, HERE / "layer_errors.py"], cwd=ROOT, check=True)
    print(f"figures made in {time.perf_counter() - started:.0f} s")


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
