"""A model with known faults under several conditions; no config and no run folder."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bnexp.condition import Condition
from bnexp.evaluation.evaluate import compare_evaluation, evaluate, sources
from bnexp.evaluation.subject import Subject
from bnexp.statistics import Statistics, recompute_statistics, running_statistics

RUNNING, RECOMPUTED = Condition("running"), Condition("recomputed")


class Classifier(nn.Module):
    """Separates two classes by the sign of the mean, which each layer passes on."""

    def __init__(self, layers: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(2, eps=eps) for _ in range(layers))

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        return torch.stack([-x[:, 0], x[:, 0]], dim=1)


def subject(layers=3, n=400, eps=1e-5):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    x = (2.0 * y[:, None] - 1) + 0.5 * torch.randn(n, 2, generator=generator)

    def test(samples):
        return [(x[:samples], y[:samples])]

    return Subject(Classifier(layers, eps).eval(), lambda method: [x], test, ("low", "high"))


def off(statistics, names, by):
    mean = {n: m + (by if n in names else 0) for n, m in statistics.mean.items()}
    return Statistics(mean, statistics.var, statistics.count)


def compared(subject, estimates, **settings):
    found = evaluate(subject, sources(subject, estimates, methods=["exact"]))
    return compare_evaluation(subject, found, {"recomputed": "exact"}, **settings)


def test_one_layer_off_is_found_from_both_sides():
    of = subject()
    true = recompute_statistics(of.model, of.population("exact"))
    found = compared(of, {"running": off(true, ["norms.1"], 3.0)}, layer_cost_samples=100)
    rows = {row.name: row for row in found.layers[RECOMPUTED]}
    assert found.base.accuracy == pytest.approx(0.5)
    assert rows["norms.1"].mended.difference == pytest.approx(0.5, abs=0.02)
    assert rows["norms.1"].spoiled.difference == pytest.approx(-0.5, abs=0.02)
    for name in ("norms.0", "norms.2"):
        assert rows[name].mended.changed == rows[name].spoiled.changed == 0
    assert {row.spoiled.samples for row in rows.values()} == {100}


def test_where_several_layers_are_off_mending_one_does_nothing_and_spoiling_one_tells():
    of = subject()
    true = recompute_statistics(of.model, of.population("exact"))
    found = compared(of, {"running": off(true, ["norms.0", "norms.1"], 3.0)})
    rows = {row.name: row for row in found.layers[RECOMPUTED]}
    for name in ("norms.0", "norms.1"):
        assert rows[name].mended.difference == pytest.approx(0, abs=0.03)
        assert rows[name].spoiled.difference == pytest.approx(-0.5, abs=0.03)
    assert rows["norms.2"].spoiled.difference == 0


def test_in_deep_networks_the_layers_furthest_off_are_exchanged():
    of = subject(layers=6)
    true = recompute_statistics(of.model, of.population("exact"))
    found = compared(
        of, {"running": off(off(true, ["norms.4"], 1.0), ["norms.2"], 0.5)}, layer_cost_layers=2
    )
    rows = found.layers[RECOMPUTED]
    assert [row.name for row in rows[:2]] == ["norms.4", "norms.2"]
    assert [row.mended is not None for row in rows] == [True] * 2 + [False] * 4
    assert [row.spoiled is not None for row in rows] == [True] * 2 + [False] * 4


def test_drift_is_measured_with_the_layers_own_eps():
    of = subject(layers=1, eps=0.5)
    true = recompute_statistics(of.model, of.population("exact"))
    found = compared(of, {"running": off(true, ["norms.0"], 0.3)})
    (row,) = found.layers[RECOMPUTED]
    expected = np.sqrt(np.mean(0.3**2 / (true.var["norms.0"].numpy() + 0.5)))
    assert row.mean_drift == pytest.approx(expected)


def test_conditions_name_the_weights_of_the_model():
    of = subject()
    running = running_statistics(of.model)
    found = evaluate(of, sources(of, {"running": running}, methods=["exact"], weights="swa"))
    assert [str(c) for c in found.predictions] == ["swa/running", "swa/recomputed"]
    verdict = compare_evaluation(of, found, {"running": "decay 0.9"}).verdict
    assert "SWA weights with the trained model's running averages (decay 0.9)" in verdict.text
    assert found.rows(7, "test")[0][:3] == (7, "test", "swa/running")


def test_statistics_of_other_weights_are_compared_by_their_predictions_alone():
    of = subject()
    other = copy.deepcopy(of)
    found = evaluate(of, sources(of, {"running": running_statistics(of.model)}, methods=["exact"]))
    found |= evaluate(other, sources(other, {}, methods=["exact"], weights="ema"))
    comparison = compare_evaluation(of, found, {})
    assert [r.condition for r, _ in comparison.others] == [
        RECOMPUTED,
        Condition("recomputed", "ema"),
    ]
    assert list(comparison.layers) == [RECOMPUTED]


def test_several_methods_are_told_apart_and_a_network_without_bn_has_one_condition():
    of = subject()
    assert list(sources(of, {}, methods=["exact", "pooled"], batch=True)) == [
        Condition("recomputed", method="exact"),
        Condition("recomputed", method="pooled"),
        Condition("batch"),
    ]
    plain = Subject(nn.Linear(2, 2), of.population, of.test, of.classes)
    assert list(sources(plain, {}, methods=["exact"], batch=True)) == [Condition("none")]
    found = compare_evaluation(plain, evaluate(plain, sources(plain, {})), {})
    assert found.verdict.outcome == "alone"
    assert "trained weights without batch normalization" in found.verdict.text
