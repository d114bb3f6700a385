"""The figure of docs/processes.md: whose running averages does a DDP checkpoint hold?

    python docs/figures/processes.py [--draw]

Trains a small CNN of plain torch.nn layers on the digits under torch's DistributedDataParallel, in
four processes over gloo with four images each, once with images dealt out at random and once with
each process having classes of its own; writes processes.json and draws processes.png. `--draw`
draws what the file holds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as distributed  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

PROCESSES, IMAGES, STEPS, EVERY = 4, 4, 400, 20
RUN = {
    "name": "processes",
    "data": {"name": "digits"},
    "model": {"name": "small-cnn"},
    "training": {"steps": STEPS, "batch_size": PROCESSES * IMAGES},
}


def train(rank: int, store: str, out: str) -> None:
    """One of the processes, for both ways to deal out the images."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES
    )
    found = {dealt: _curves(rank, dealt) for dealt in ("at random", "by classes")}
    if rank == 0:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")
    distributed.barrier()
    distributed.destroy_process_group()


def _curves(rank: int, dealt: str) -> dict:
    from bnexp import TorchRanks, recompute_statistics, running_statistics
    from bnexp.config import resolve
    from bnexp.evaluation.predictions import predict_under
    from bnexp.nn import restore_batchnorm
    from bnexp.nn.find import layer_eps
    from bnexp.statistics import Statistics, layer_drift
    from bnexp.training.build import build_training

    ranks = TorchRanks()
    training = build_training(resolve(RUN, [], "the figure"), torch.device("cpu"))
    training.state.tracker.close()
    model = restore_batchnorm(training.state.model)
    # Training doesn't read running averages: rank 0's are those that it broadcasts by default.
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    x, y = next(training.data.train.batches(10_000))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    if dealt == "by classes":
        order = y.argsort(stable=True)
    mine = order.tensor_split(PROCESSES)[rank]
    draw = torch.Generator().manual_seed(100 + rank)
    test = list(training.data.test.batches(250))
    rows = []
    for step in range(1, STEPS + 1):
        model.train()
        chosen = mine[torch.randint(len(mine), (IMAGES,), generator=draw)]
        F.cross_entropy(parallel(x[chosen]), y[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY:
            continue
        own = running_statistics(model)
        every = ranks.gather((own.mean, own.var), "running averages")
        count = dict.fromkeys(own.mean, step)
        kinds = {f"rank {r}": Statistics(*pair, count) for r, pair in enumerate(every)}
        mean, var = (
            {name: torch.stack([pair[i][name] for pair in every]).mean(0) for name in own.mean}
            for i in (0, 1)
        )
        kinds["merged"] = Statistics(mean, var, count)
        population = list(x[mine].split(100))
        kinds["recomputed"] = recompute_statistics(model, population, ranks=ranks)
        row = {"step": step, "drift": {}, "accuracy": {}}
        if rank == 0:
            for name, found in predict_under(model, lambda: test, kinds).items():
                row["accuracy"][name] = found.accuracy
            for name, statistics in kinds.items():
                drift = layer_drift(statistics, kinds["recomputed"], layer_eps(model))
                row["drift"][name] = max(layer.drift for layer in drift)
        rows.append(row)
        ranks.gather(None, "the evaluation")
    return {"rows": rows}


def draw(found: dict) -> None:
    from draw import BLUE, GREEN, INK, MUTED, ORANGE, _figure, save

    figure, axes = _figure(8.6, 5.4, 2, 2, sharex=True)
    for row, (dealt, content) in enumerate(found.items()):
        rows = content["rows"]
        steps = [r["step"] for r in rows]
        for column, what in enumerate(("drift", "accuracy")):
            axis = axes[row][column]
            for rank in range(1, PROCESSES):
                values = [r[what][f"rank {rank}"] for r in rows]
                label = "ranks 1 to 3" if rank == 1 else None
                axis.plot(steps, values, color=MUTED, linewidth=0.7, alpha=0.7, label=label)
            for name, colour, marker, dashes in (
                ("rank 0", ORANGE, "x", "--"),
                ("merged", BLUE, "o", "-"),
                ("recomputed", GREEN, "^", ":"),
            ):
                if name == "recomputed" and what == "drift":
                    continue
                label = "rank 0 (the checkpoint)" if name == "rank 0" else name
                values = [r[what][name] for r in rows]
                axis.plot(
                    steps, values, dashes, color=colour, marker=marker, markersize=4, label=label
                )
            axis.set_title(
                f"{'Drift' if what == 'drift' else 'Test accuracy'}, images dealt out {dealt}",
                color=INK,
            )
            if what == "drift":
                axis.set_ylim(bottom=0)
                axis.set_ylabel("of the worst layer, in σ")
        axes[row][1].legend(loc="lower right", fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    save(figure, HERE / "processes.png")


def main() -> None:
    path = HERE / "processes.json"
    if "--draw" not in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                train, (str(Path(folder, "store")), str(path)), PROCESSES, join=True
            )
    draw(json.loads(path.read_text()))
    found = json.loads(path.read_text())
    for dealt, content in found.items():
        last = content["rows"][-1]
        print(dealt, json.dumps(last))


if __name__ == "__main__":
    main()
