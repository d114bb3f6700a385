"""Several real processes that are one training, against one process with the same config."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from several import interrupt_me, kill_me, run_ranks, values
from torch import nn
from torchvision.ops import StochasticDepth

from bnexp import TorchRanks, recompute_statistics, run_experiment
from bnexp.config import resolve
from bnexp.data import Augmentation, sampling
from bnexp.data.sampling import Pass, Share
from bnexp.errors import Interrupted, RunFailed, UserError
from bnexp.ranks import Alone
from bnexp.records import Run
from bnexp.statistics import running_statistics
from bnexp.training import loop
from bnexp.training.build import build_training, freeze_when_due
from bnexp.training.checkpoints import newest_checkpoint
from bnexp.training.processes import WholeBatchDraws, _try_out, share_of_rank

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
CONFIG = {
    "name": "several",
    "data": {
        "name": "digits",
        "val_fraction": 0.1,
        "augment": {"crop_padding": 1},
        "limit": {"test": 200},
    },
    # Without max pooling, where rounding decides which of two equal values has the gradient, and
    # from there on two trainings part; with it in float64 below.
    "model": {"name": "mlp"},
    "statistics": {
        "recompute": {"samples": 250},
        "estimators": {
            "average": {"rule": "cumulative"},
            "window": {"rule": "pooled", "window": 7},
        },
    },
    "training": {
        "steps": 50,
        "batch_size": 50,
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "plateau", "patience": 20, "min_delta": 0.05, "factor": 0.5},
        "label_smoothing": 0.1,
        "check_every": 10,
        "averages": {"ema": {"decay": 0.9}, "swa": {"start": 0.5, "every": 5}},
    },
    "test": {"every": 25, "statistics": ["running", "recomputed", "batch"], "batch_size": 60},
    "checkpoints": {"every_steps": 10, "keep": 1},
}


def config(*overrides):
    return resolve(CONFIG, list(overrides), "the test")


def in_ranks(rank, settings, folder, resume=None):
    outcome = run_experiment(settings, folder, resume=resume, ranks=TorchRanks())
    return outcome.record.path, outcome.comparison.to_dict(), outcome.weights


def newest(path):
    return newest_checkpoint(Run(path).checkpoints)[0]


def furthest(one, other):
    """The largest difference of any number in two trees."""
    if isinstance(one, torch.Tensor):
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((furthest(one[k], other[k]) for k in one), default=0.0)
    if isinstance(one, list | tuple):
        return max((furthest(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    return float(one != other)


def assert_same_training(one, other):
    """To rounding, after the same steps."""
    first, second = newest(one), newest(other)
    assert first["step"] == second["step"]
    assert furthest(first["model"], second["model"]) < 1e-5
    assert furthest(first["averages"], second["averages"]) < 1e-5
    for name in ("averages", "mini_batches"):
        assert furthest(first["tracker"][name], second["tracker"][name]) < 1e-5
    for part in ("collapse", "plateau", "best", "rng"):
        assert furthest(first[part], second[part]) < 1e-5, part
    columns, others = Run(one).steps(), Run(other).steps()
    for name in ("step", "epoch", "lr", "accuracy", "ema_accuracy"):
        assert (columns[name] == others[name]).all(), name
    assert abs(columns["loss"] - others["loss"]).max() < 1e-5
    rows, other_rows = Run(one).evals(), Run(other).evals()
    assert len(rows) == len(other_rows)
    for row, again in zip(rows, other_rows, strict=True):
        assert [row[k] for k in ("step", "split", "statistics", "samples", "accuracy")] == [
            again[k] for k in ("step", "split", "statistics", "samples", "accuracy")
        ]
        assert abs(row["loss"] - again["loss"]) < 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The record of one process, and its comparison."""
    outcome = run_experiment(config(), tmp_path_factory.mktemp("alone") / "run")
    return outcome.record.path, outcome.comparison.to_dict()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_train_as_one_process_does(alone, tmp_path, size):
    """50 samples for 3 or 4 ranks are uneven shares; 200 test images for 60 a batch, too."""
    path, comparison = alone
    results = values(run_ranks(in_ranks, size, config(), tmp_path / "run", deadline=300))
    assert_same_training(path, tmp_path / "run")
    for _, found, weights in results:
        assert found == results[0][1]
        assert weights == "last"
        kinds = [(kind["label"], kind["accuracy"]) for kind in comparison["kinds"]]
        assert [(kind["label"], kind["accuracy"]) for kind in found["kinds"]] == kinds
        assert found["verdict"] == comparison["verdict"]
    assert Run(tmp_path / "run").environment["processes"] == size
    assert Run(tmp_path / "run").state["state"] == "finished"


@pytest.mark.parametrize(("size", "part"), [(2, 25), (3, 10)])
def test_ghost_batches_of_ranks_are_those_of_one_process(tmp_path, size, part):
    """With batch_size / N it is what is usually done; 5 parts for 3 ranks are uneven shares."""
    settings = config(f"statistics.normalization_batch={part}")
    run_experiment(settings, tmp_path / "one")
    values(run_ranks(in_ranks, size, settings, tmp_path / "several", deadline=300))
    assert_same_training(tmp_path / "one", tmp_path / "several")


def _in_float64(rank, size, settings):
    """The state after 50 steps in float64, from the parts that `train_step` is made of."""
    torch.manual_seed(0)
    training = build_training(settings, CPU, ranks=TorchRanks() if size > 1 else Alone())
    state, processes = training.state, training.processes
    state.model.double().train()
    model = processes.parallel(state.model)
    batch = settings.training.batch_size
    batches = training.data.train.training_batches(batch, share=processes.share)
    with processes.stepping():
        for _ in range(50):
            freeze_when_due(training)
            x, y = next(batches)
            loss = processes.loss(model(x.double()), y, 0.1, batch)
            processes.for_backward(loss).backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.tracker.update()
            state.step += 1
    state.merge()
    statistics = state.estimates()
    return {
        "model": state.model.state_dict(),
        "statistics": {k: [s.mean, s.var] for k, s in statistics.items()},
    }


@pytest.mark.parametrize(("size", "part", "frozen_from"), [(3, None, 48), (3, 10, 48), (2, 25, 50)])
def test_float64_steps_agree_to_twelve_digits(size, part, frozen_from):
    settings = config(
        f"statistics.normalization_batch={part or 'null'}",
        f"statistics.freeze_from_step={frozen_from}",
    )
    ranks = values(run_ranks(_in_float64, size, size, settings, deadline=300))
    one = _in_float64(0, 1, settings)
    for found in ranks:
        assert furthest(one["model"], found["model"]) < 1e-12
        assert furthest(one["statistics"], found["statistics"]) < 1e-12


def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    """Two, then one, then three; each ends by a first signal, here the end of its steps."""
    path = tmp_path / "run"
    short = "training.averages.swa=null"  # another length would move its start
    steps = [config(short, f"training.steps={n}") for n in (20, 35, 50)]
    values(run_ranks(in_ranks, 2, steps[0], path, deadline=300))
    run_experiment(steps[1], resume=path)
    values(run_ranks(in_ranks, 3, steps[2], None, path, deadline=300))
    run_experiment(steps[2], tmp_path / "one")
    first, second = newest(path), newest(tmp_path / "one")
    assert furthest(first["model"], second["model"]) < 1e-5
    assert (Run(path).steps()["accuracy"] == Run(tmp_path / "one").steps()["accuracy"]).all()
    environment = Run(path).environment
    assert environment["processes"] == 2
    assert [resume["processes"] for resume in environment["resumes"]] == [1, 3]


# ------------------------------------------------------------------------------------- faults


def _failing(rank, settings, folder, fault, step, culprit):
    """A training in which `fault` strikes one rank in a step."""
    taken = 0

    def train_step(*arguments):
        nonlocal taken
        taken += 1
        if rank == culprit and taken == step:
            fault()
        return original(*arguments)

    original, loop.train_step = loop.train_step, train_step
    started = time.monotonic()
    try:
        run_experiment(settings, folder, ranks=TorchRanks(), handle_signals=True)
    finally:
        print(f"rank {rank} ended after {time.monotonic() - started:.1f} s")


def _use_up_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20,) * 2)
    kept = [bytearray(2**18) for _ in range(10**6)]
    del kept


def _raise():
    raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.parametrize(
    ("fault", "culprit", "said"),
    [
        (_use_up_memory, 1, "rank 1: out of memory with training.batch_size 50"),
        (_use_up_memory, 0, "out of memory with training.batch_size 50"),
        (_raise, 1, "rank 1: the disk is full (somewhere)"),
    ],
)
def test_a_rank_that_fails_in_a_step_ends_all_with_its_reason(tmp_path, fault, culprit, said):
    """Well before the process group's timeout."""
    path = tmp_path / "run"
    outcomes = run_ranks(_failing, 2, config(), path, fault, 15, culprit, deadline=100, timeout=90)
    for outcome in outcomes:
        assert isinstance(outcome.error, RunFailed), outcome.trace
        assert said.removeprefix("rank 1: ") in str(outcome.error)
        assert outcome.seconds < 85
    state = Run(path).state
    assert (state["state"], state["step"]) == ("failed", 10)
    assert said in state["message"]
    values(run_ranks(in_ranks, 2, None, None, path, deadline=300))
    assert Run(path).state["state"] == "finished"


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_killed_rank_ends_the_others_and_the_run_resumes(alone, tmp_path, culprit):
    path = tmp_path / "run"
    outcomes = run_ranks(
        _failing, 3, config(), path, kill_me, 15, culprit, deadline=100, timeout=90
    )
    assert outcomes[culprit].error is None  # it had no time to say anything
    for rank, outcome in enumerate(outcomes):
        if rank != culprit:
            assert isinstance(outcome.error, RunFailed), outcome.trace
            assert outcome.seconds < 85
    state = Run(path).state
    assert state["state"] == ("killed" if culprit == 0 else "failed")
    assert state["step"] == 10
    run_experiment(resume=path)
    assert_same_training(alone[0], path)


def test_one_signal_to_one_rank_ends_all_after_the_same_step(alone, tmp_path):
    path = tmp_path / "run"
    outcomes = run_ranks(_failing, 2, config(), path, interrupt_me, 15, 1, deadline=100)
    for outcome in outcomes:
        assert isinstance(outcome.error, Interrupted), outcome.trace
        assert "go on with: bnexp train --resume" in str(outcome.error)
    state = Run(path).state
    assert state["state"] == "interrupted"
    assert 15 <= state["step"] <= 17
    values(run_ranks(in_ranks, 2, None, None, path, deadline=300))
    assert_same_training(alone[0], path)


def _other_config(rank, folder):
    run_experiment(config(f"seed={rank}"), folder, ranks=TorchRanks())


def test_ranks_that_were_told_different_things_are_refused(tmp_path):
    for outcome in run_ranks(_other_config, 2, tmp_path / "run"):
        assert isinstance(outcome.error, UserError)
        assert "the config" in str(outcome.error)
    assert not (tmp_path / "run").exists()


def _unchosen(rank, folder):
    run_experiment(config(), folder)


def test_ranks_must_be_chosen(tmp_path):
    for outcome in run_ranks(_unchosen, 2, tmp_path / "run"):
        assert isinstance(outcome.error, UserError)
        assert "bnexp.TorchRanks()" in str(outcome.error)


# ------------------------------------------------------------------- what needs one process only


class _Two(Alone):
    size = 2


def test_mini_batches_that_can_not_be_shared_are_refused():
    with pytest.raises(UserError, match="1 images: they can't be shared by 2 processes"):
        share_of_rank(config("training.batch_size=1"), _Two())
    with pytest.raises(UserError, match=r"1 normalization batches of 50 .* start 1 or fewer"):
        share_of_rank(config("statistics.normalization_batch=50"), _Two())


@pytest.mark.parametrize("count", [1, 2, 7, 50])
@pytest.mark.parametrize("unit", [1, 3, 10])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_a_partition_in_whole_units(count, unit, size):
    slices = [Share(rank, size, unit).of(count) for rank in range(size)]
    assert [i for part in slices for i in range(count)[part]] == list(range(count))
    assert all(part.start % unit == 0 or part.start == count for part in slices)
    units = [-(-(part.stop - part.start) // unit) for part in slices]
    assert max(units) - min(units) <= 1


@pytest.mark.parametrize("count", [1, 60, 61, 119, 180, 200])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_pass_is_shared_by_whole_batches(count, size):
    whole = Pass(torch.arange(count), None)
    batches = [part.order.tolist() for part in whole.batches(60)]
    shares = [
        [part.order.tolist() for part in whole.shared(60, Share(rank, size)).batches(60)]
        for rank in range(size)
    ]
    assert [batch for share in shares for batch in share] == batches
    for share in shares:  # a short one is never alone: under `batch` it is filled up
        assert len(batches) == 1 or [len(b) for b in share] != [count % 60]


def test_a_share_of_a_mini_batch_is_augmented_as_in_the_whole():
    augmentation = Augmentation(crop_padding=2, flip=True)
    whole = next(sampling.training_passes(100, 30, 1, augmentation, 5))
    parts = [list(whole.batches(30, Share(rank, 4))) for rank in range(4)]
    for batch, *shared in zip(whole.batches(30), *parts, strict=True):
        assert torch.equal(torch.cat([part.order for part in shared]), batch.order)
        assert torch.equal(torch.cat([part.draws for part in shared]), batch.draws)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.3),
        nn.Dropout(0.5, inplace=True),
        nn.Dropout2d(0.4),
        StochasticDepth(0.4, "row"),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dropout_is_what_one_process_draws(layer, channels_last):
    x = torch.randn(10, 4, 3, 5)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    torch.manual_seed(3)
    expected, after = layer(x.clone()), torch.get_rng_state()
    parts = []
    for rank in range(3):
        share = Share(rank, 3)
        torch.manual_seed(3)
        with WholeBatchDraws(10, share):
            parts.append(layer(x[share.of(10)].clone()))
        assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(torch.cat(parts), expected)


def test_random_numbers_that_depend_on_the_split_are_refused():
    x = torch.randn(2, 3, 4, 4)
    assert _try_out(nn.Conv2d(3, 2, 1), x) == (False, False)
    assert _try_out(nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 2, 1)), x) == (True, False)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.alpha_dropout(self.layer(x), 0.1, self.training) + torch.randn_like(x)

    with pytest.raises(UserError, match=r"by alpha_dropout, randn_like, which .* train it in one"):
        _try_out(Noisy(), x)
    plain = Noisy()
    plain.forward = lambda x: plain.layer(x)
    before = torch.get_rng_state()
    assert _try_out(plain, x) == (False, True)
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------- torch's own, as a peer


def _usual(rank):
    """DistributedDataParallel with plain layers: this rank's running averages, and its weights."""
    torch.manual_seed(0)
    training = build_training(config("data.augment.crop_padding=0"), CPU)
    training.state.tracker.close()
    from bnexp.nn import restore_batchnorm

    plain = restore_batchnorm(training.state.model).train()
    assert not any(type(m).__module__.startswith("bnexp.nn") for m in plain.modules())
    parallel = nn.parallel.DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    # as a DistributedSampler that isn't told to shuffle: half of the classes each
    everything = [training.data.train.batches(2000)]
    x, y = next(everything[0])
    order = y.argsort(stable=True)
    x, y = x[order], y[order]
    half = len(x) // 2
    x, y = (t[rank * half : (rank + 1) * half] for t in (x, y))
    generator = torch.Generator().manual_seed(rank)
    for _ in range(30):
        chosen = torch.randint(half, (8,), generator=generator)
        F.cross_entropy(parallel(x[chosen]), y[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    own = running_statistics(plain)
    ranks = TorchRanks()
    whole = recompute_statistics(plain, list(x.split(50)), method="exact", ranks=ranks)
    return own, whole


def _off(one, other):
    return max(float((one.mean[k] - other.mean[k]).abs().max()) for k in one.mean)


def test_rank_0s_buffers_under_ddp_are_off_and_the_union_is_not():
    """What `DistributedDataParallel` broadcasts before each forward pass, and what a checkpoint
    holds, is rank 0's: it has seen rank 0's classes alone."""
    (own, whole), (others, again) = values(run_ranks(_usual, 2, deadline=120))
    assert _off(whole, again) == 0
    assert _off(own, whole) > 0.1
    # rank 1's are rank 0's but for its last mini-batch
    assert 0 < _off(own, others) < _off(own, whole)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: one rank over NCCL could not be tried"
)
def test_one_rank_over_nccl(tmp_path):
    """All that one GPU can show."""
    from bnexp.collectives import Collectives
    from bnexp.statistics.across import AcrossRanks

    device = torch.device("cuda", 0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        collectives = Collectives(TorchRanks(), device)
        layer = nn.BatchNorm2d(5).to(device)
        x = torch.randn(6, 5, 4, 4, device=device, requires_grad=True)
        affine = (layer.weight, layer.bias, layer.eps)
        output, *_, count = AcrossRanks(collectives.gather)(x, affine)
        expected = layer(x)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(output)
        (ours,) = torch.autograd.grad(output, x, grad)
        (torchs,) = torch.autograd.grad(expected, x, grad)
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)
        assert count == 6 * 16
        assert collectives.union(5)() == 5
        collectives.close()
    finally:
        torch.distributed.destroy_process_group()
