"""What a study costs beside its experiments: locally, on Ray, and with a thousand of them finished.

    python benchmarks/study.py [--ray] [--steps N] [--rounds N] [--finished N]

Prints Markdown. The 12 experiments are run one after another in one process of one thread, which
has imported everything: the sum of their computing time. Then as a study with two processes, and
with --ray on a Ray cluster of two CPUs that was started, and has run something, before. Other work
on the machine makes all of them longer, so read the shares.
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

STUDY = """
name: bench
base:
  data: {{name: digits}}
  model: {{name: small-cnn}}
  training: {{steps: {steps}, batch_size: 64, optimizer: {{name: sgd, lr: 0.05}}}}
vary: {{training.optimizer.lr: [0.02, 0.05, 0.1, 0.2]}}
seeds: 3
claims:
  - says: recomputed statistics are as good
    compare: [running, recomputed]
    expect: equal within 0.01
"""

ONE_BY_ONE = """
import sys, tempfile, time
from pathlib import Path
from bnexp.study.file import read_study
from bnexp.study.jobs import Job
from bnexp.study.run import plan_study
from bnexp.study.worker import run_job
import torch._dynamo, scipy.stats
plan = plan_study(read_study(Path({study!r})))
folder = Path(tempfile.mkdtemp())
wall, cpu = time.perf_counter(), time.process_time()
for t in plan.trainings:
    found = run_job(Job(t.key, t.label, "digits", t.config.to_yaml(), folder / t.key, 1), False)
    assert found.kind == "finished", found
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--finished", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "bench.yaml").write_text(STUDY.format(steps=arguments.steps))
        _twelve(folder, arguments.rounds, arguments.ray)
        _finished(folder, arguments.finished)


def _twelve(folder: Path, rounds: int, on_ray: bool) -> None:
    found: dict[str, list[tuple[float, float]]] = {"alone": [], "local": [], "ray": []}
    cluster = _cluster(folder) if on_ray else None
    try:
        for i in range(rounds):
            found["alone"].append(_one_by_one(folder))
            found["local"].append(_study(folder, f"local-{i}", "--jobs", "2"))
            if cluster is not None:
                found["ray"].append(_study(folder, f"ray-{i}", "--ray", cluster.address))
    finally:
        if cluster is not None:
            cluster.shutdown()
    half = statistics.median(wall for wall, _ in found["alone"]) / 2
    local = statistics.median(wall for wall, _ in found["local"])
    print("12 experiments, two at a time | wall, s | share\n--- | ---: | ---:")
    print(f"one after another, halved | {half:.1f} | 1")
    print(f"locally | {local:.1f} | {local / half:.2f} of the halved sum")
    if found["ray"]:
        ray = statistics.median(wall for wall, _ in found["ray"])
        print(f"Ray | {ray:.1f} | {ray / local:.2f} of locally")
    print()


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _one_by_one(folder: Path) -> tuple[float, float]:
    code = ONE_BY_ONE.format(study=str(folder / "bench.yaml"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), check=True, capture_output=True, text=True
    )
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def _bnexp(folder: Path, *arguments: str) -> tuple[float, float]:
    """Wall and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    command = [sys.executable, "-m", "bnexp", *arguments]
    subprocess.run(command, cwd=folder, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _study(folder: Path, runs: str, *options: str) -> tuple[float, float]:
    return _bnexp(folder, "study", "bench.yaml", "--quiet", "--runs-dir", runs, *options)


def _cluster(folder: Path):
    """Two CPUs, with the workers that an earlier study has started."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(_environment())
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False},
    )
    ray.init(address=cluster.address, log_to_driver=False)
    ray.get(ray.remote(lambda: None).remote())
    ray.shutdown()
    return cluster


def _finished(folder: Path, number: int) -> None:
    """A study of `number` experiments that have all finished: copies of one."""
    from bnexp.study.file import read_study
    from bnexp.study.run import find_record, plan_study

    text = STUDY.format(steps=20).replace("[0.02, 0.05, 0.1, 0.2]", "[0.02]")
    (folder / "bench.yaml").write_text(text.replace("seeds: 3", "seeds: 1"))
    _study(folder, "one")
    (made,) = [p for p in (folder / "one" / "bench-1" / "experiments").iterdir() if p.is_dir()]
    levels = max(1, number // 20)
    rates = f"{{from: 1.0e-4, to: {1e-4 * levels:.10g}, step: 1.0e-4}}"
    text = text.replace("[0.02]", rates).replace("seeds: 3", "seeds: 20")
    (folder / "bench.yaml").write_text(text)
    plan = plan_study(read_study(folder / "bench.yaml"))
    record = find_record(plan, folder / "many")
    for training in plan.trainings:
        target = record.experiments / training.key
        subprocess.run(["cp", "-r", str(made), str(target)], check=True)
    print(f"{len(plan.trainings):,} finished experiments | wall, s | CPU, s\n--- | ---: | ---:")
    for what, arguments in (
        ("bnexp study: find them finished, collect", ["study", "bench.yaml", "--quiet"]),
        ("bnexp report", ["report", "bench-1"]),
        ("bnexp runs", ["runs"]),
    ):
        wall, cpu = _bnexp(folder, *arguments, "--runs-dir", "many")
        print(f"{what} | {wall:.1f} | {cpu:.1f}")


if __name__ == "__main__":
    main()
