"""Evaluating over several ranks gives the predictions of one process, in its order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from several import run_ranks, values
from torch import nn

from bnexp.errors import RunFailed, UserError
from bnexp.evaluation.evaluate import compare_evaluation, evaluate, sources
from bnexp.evaluation.scoring import Task, scores_under
from bnexp.evaluation.subject import Subject
from bnexp.ranks import Alone, TorchRanks
from bnexp.statistics import batch_statistics, running_statistics

pytestmark = pytest.mark.slow


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8),
        nn.Linear(8, 3),
    ).eval()  # fmt: skip


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(110, 4, generator=generator) * 2 + 0.5
    y = (x.sum(1) > 0).long() + (x[:, 0] > 2).long()
    return list(zip(x.split(16), y.split(16), strict=True))  # the last one is short


# Runs of whole batches; the last rank of three has none.
PARTS = {1: [slice(None)], 2: [slice(5), slice(5, None)], 3: [slice(2), slice(2, None), slice(0)]}


def subject(ranks):
    mine = PARTS[ranks.size][ranks.rank]

    def test(samples):
        return batches()[mine]

    return Subject(network(), lambda method: batches()[mine], test, ("a", "b", "c"), ranks)


def compared(of):
    estimates = {"running": running_statistics(of.model)}
    found = evaluate(of, sources(of, estimates, methods=["exact", "pooled"], batch=True))
    found.seconds = dict.fromkeys(found.seconds, 0.0)
    predictions = {
        str(c): (p.predicted.tolist(), p.labels.tolist(), p.loss, p.confidence)
        for c, p in found.predictions.items()
    }
    return predictions, found.rows(1, "test"), compare_evaluation(of, found, {}).to_dict()


def of_ranks(rank):
    return compared(subject(TorchRanks()))


@pytest.mark.parametrize("size", [2, 3])
def test_all_conditions_are_those_of_one_process(size):
    expected, _, comparison = compared(subject(Alone()))
    outcomes = values(run_ranks(of_ranks, size))
    for predictions, rows, found in outcomes:
        assert rows == outcomes[0][1] and found == outcomes[0][2]
        assert predictions.keys() == expected.keys()
        for name, (predicted, labels, loss, confidence) in expected.items():
            assert predictions[name][:2] == (predicted, labels), name
            assert predictions[name][2] == pytest.approx(loss, rel=1e-4, abs=1e-6)
            assert predictions[name][3] == pytest.approx(confidence, rel=1e-4)
        assert found["verdict"] == comparison["verdict"]


def scored(rank):
    model = network()
    settings = {"running": running_statistics(model).applied_to, "batch": batch_statistics}
    own = Task(
        torch.device("cpu"), None, lambda output, batch: -output.square().sum(1), TorchRanks()
    )
    found = scores_under(model, batches(), settings, own)
    with pytest.raises(UserError, match=r"rank 2 has other test batches than rank 0.*the same"):
        mine = batches() if rank < 2 else batches()[::-1]
        scores_under(model, mine, settings, own)
    return {name: scores.values for name, scores in found.items()}


def test_scores_of_the_users_own():
    model = network()
    settings = {"running": running_statistics(model).applied_to, "batch": batch_statistics}
    own = Task(torch.device("cpu"), score=lambda output, batch: -output.square().sum(1))
    expected = scores_under(model, batches(), settings, own)
    for found in values(run_ranks(scored, 3)):
        for name, scores in expected.items():
            assert found[name] == pytest.approx(scores.values, rel=1e-5), name


def nobody_has_any(rank):
    of = replace(subject(TorchRanks()), test=lambda samples: [])
    evaluate(of, sources(of, {"running": running_statistics(of.model)}))


def a_loader_that_fails(rank):
    def test(samples):
        yield from batches()[:2]
        if rank == 1:
            raise OSError("cannot decode dog.jpg")

    of = replace(subject(TorchRanks()), test=test)
    evaluate(of, sources(of, {"running": running_statistics(of.model)}))


def test_faults():
    for outcome in run_ranks(nobody_has_any, 2):
        assert type(outcome.error) is UserError
        assert str(outcome.error) == "there are no samples to evaluate on: the split is empty"
    for outcome in run_ranks(a_loader_that_fails, 3):
        assert type(outcome.error) is RunFailed
        assert str(outcome.error) == "rank 1: OSError: cannot decode dog.jpg"
