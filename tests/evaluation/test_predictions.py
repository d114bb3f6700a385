"""Predictions against a plain PyTorch loop over a copy of the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnexp.errors import UserError
from bnexp.evaluation import predictions as module
from bnexp.evaluation.layer_costs import layer_costs
from bnexp.evaluation.predictions import predict, predict_under
from bnexp.statistics import Statistics, running_statistics


def model_and_batches(sizes=(16, 16, 8), seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6 * 16, 4),
    )
    batches = [(torch.randn(n, 1, 8, 8), torch.randint(0, 4, (n,))) for n in sizes]
    for x, _ in batches:
        model(x)
    return model, batches


def by_hand(model, batches):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in batches]).double()
    labels = torch.cat([y for _, y in batches])
    return logits, labels


def assert_equal(found, logits, labels):
    assert np.array_equal(found.predicted, logits.argmax(1).numpy())
    assert np.array_equal(found.labels, labels.numpy())
    assert found.predicted.dtype == found.labels.dtype == np.int64
    assert found.loss.dtype == found.confidence.dtype == np.float32
    expected = F.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(found.loss, expected.numpy(), rtol=1e-5, atol=1e-6)
    expected = logits.softmax(1).amax(1)
    np.testing.assert_allclose(found.confidence, expected.numpy(), rtol=1e-5)
    assert found.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert found.mean_loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def shifted(statistics, seed):
    generator = torch.Generator().manual_seed(seed)

    def noisy(tensors):
        return {
            k: t * torch.rand(t.shape, generator=generator).add(0.5) for k, t in tensors.items()
        }

    return Statistics(noisy(statistics.mean), noisy(statistics.var), dict(statistics.count))


def with_buffers(model, statistics):
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if name in statistics.mean:
            layer.running_mean.copy_(statistics.mean[name])
            layer.running_var.copy_(statistics.var[name])
    return model


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [
        m.training for m in model.modules()
    ]


def assert_same_state(before, after):
    assert before[1] == after[1]
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])


def test_predict_agrees_with_a_plain_loop_and_leaves_the_model_alone():
    model, batches = model_and_batches()
    model[3].eval()
    before = state(model)
    assert_equal(predict(model, iter(batches)), *by_hand(model, batches))
    assert_same_state(before, state(model))


def test_training_goes_on_after_predict():
    model, batches = model_and_batches()
    predict(model, batches)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_training_flags_are_restored_after_an_exception():
    model, batches = model_and_batches()
    model[1].eval()
    before = state(model)

    def failing():
        yield batches[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        predict(model, failing())
    assert_same_state(before, state(model))
    with pytest.raises(OSError, match="disk gone"):
        predict_under(model, failing, {"running": running_statistics(model), "batch": None})
    assert_same_state(before, state(model))


def test_half_precision_logits_become_probabilities_in_float32():
    model, batches = model_and_batches()
    model = model.bfloat16()
    batches = [(x.bfloat16(), y) for x, y in batches]
    found = predict(model, batches)
    assert_equal(found, *by_hand(model, batches))


def test_logits_that_are_no_numbers_count_as_wrong():
    model, batches = model_and_batches()
    batches[1][0][3] = float("nan")
    found = predict(model, batches)
    assert found.predicted[16 + 3] == -1
    assert not found.correct[16 + 3]
    assert (found.predicted == -1).sum() == 1


def test_no_samples_are_refused():
    model, _ = model_and_batches()
    with pytest.raises(UserError, match="no samples"):
        predict(model, [])


@pytest.mark.parametrize("block_bytes", [1, 5000, 2**20])
def test_evaluate_agrees_with_a_plain_loop_under_each_kind(monkeypatch, block_bytes):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    model, batches = model_and_batches(sizes=(16, 16, 16))
    running = running_statistics(model)
    kinds = {"running": running, "a": shifted(running, 1), "batch": None, "b": shifted(running, 2)}
    before, made = state(model), []

    def make_batches():
        made.append(1)
        yield from batches

    found = predict_under(model, make_batches, kinds)
    assert list(found) == list(kinds)
    assert len(made) == 1
    for name in ("running", "a", "b"):
        assert_equal(found[name], *by_hand(with_buffers(model, kinds[name]), batches))
    assert_equal(found["batch"], *batch_statistics_by_hand(model, batches))
    assert_same_state(before, state(model))


def batch_statistics_by_hand(model, batches):
    model = copy.deepcopy(model).eval()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in batches]).double(), torch.cat(
            [y for _, y in batches]
        )


@pytest.mark.parametrize("block_bytes", [1, 2**20])
@pytest.mark.parametrize("last", [1, 7])
def test_a_short_last_mini_batch_is_normalized_among_the_samples_before_it(
    monkeypatch, block_bytes, last
):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    model, batches = model_and_batches(sizes=(16, 16, last))
    found = predict_under(model, lambda: batches, {"batch": None})["batch"]
    assert len(found) == 32 + last
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    first, _ = batch_statistics_by_hand(model, batches[:2])
    filled, _ = batch_statistics_by_hand(model, [(x[-16:], y[-16:])])
    assert_equal(found, torch.cat([first, filled[-last:]]), y)


def test_layer_costs_exchange_one_layer_at_a_time():
    model, batches = model_and_batches(sizes=(200, 200, 100))
    running = running_statistics(model)
    other = shifted(running, 3)
    other.var["4"].mul_(4)
    reference, labels = by_hand(model, batches)
    costs = layer_costs(model, lambda: batches, running, other, running.names)
    assert list(costs) == ["1", "4"]
    changed = 0
    for name, cost in costs.items():
        mixed = Statistics(dict(running.mean), dict(running.var), dict(running.count))
        mixed.mean[name], mixed.var[name] = other.mean[name], other.var[name]
        logits, _ = by_hand(with_buffers(model, mixed), batches)
        right, base_right = logits.argmax(1) == labels, reference.argmax(1) == labels
        expected = (right.double().mean() - base_right.double().mean()).item()
        assert cost.difference == pytest.approx(expected, abs=1e-12)
        assert cost.interval[0] < expected < cost.interval[1]
        assert cost.changed == (logits.argmax(1) != reference.argmax(1)).sum().item()
        loss = F.cross_entropy(logits, labels) - F.cross_entropy(reference, labels)
        assert cost.loss_difference == pytest.approx(loss.item(), abs=1e-5)
        changed += cost.changed
    assert changed > 0
