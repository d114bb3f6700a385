"""StatisticsTracker on whole models: what counts, what the buffers show, what is saved."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bnexp.errors import UserError
from bnexp.nn import (
    BatchNorm2d,
    convert_batchnorm,
    freeze_batchnorm,
    set_normalization_batch,
)
from bnexp.statistics.rules import Cumulative, Ema, Pooled, Rule
from bnexp.statistics.statistics import Statistics, running_statistics
from bnexp.statistics.tracker import StatisticsTracker

ALL = {
    "ema": Ema(0.9),
    "slow": Ema(0.99),
    "debiased": Ema(0.99, debias=True),
    "mean": Cumulative(),
    "pooled": Pooled(),
    "window": Pooled(2),
}


def network(norm=nn.BatchNorm2d, **options):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        norm(5, **options),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3),
        norm(4, **options),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6, **options),
    )


def batches(n, seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size + i % 3, 3, 8, 8, generator=generator) * 2 + i for i in range(n)]


class Oracle:
    """What every BN layer of a plain network got, by float64 numpy, through forward hooks."""

    def __init__(self, model):
        self.values = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                self.values[name] = []
                layer.register_forward_pre_hook(
                    lambda layer, args, name=name: (
                        self.values[name].append(
                            args[0].detach().double().transpose(0, 1).flatten(1).numpy().copy()
                        )
                        if layer.training
                        else None
                    )
                )

    def check(self, statistics: dict[str, Statistics], rtol=1e-5):
        for name, inputs in self.values.items():
            mean = np.array([x.mean(1) for x in inputs])
            var = np.array([x.var(1, ddof=1) for x in inputs])
            expected = {
                "mean": (mean.mean(0), var.mean(0)),
                "pooled": _pooled(inputs),
                "window": _pooled(inputs[-2:]),
                "debiased": (_ema(mean, 0.99), _ema(var, 0.99)),
                "ema": (_ema(mean, 0.9, 0.0), _ema(var, 0.9, 1.0)),
                "slow": (_ema(mean, 0.99, 0.0), _ema(var, 0.99, 1.0)),
            }
            for estimator, result in statistics.items():
                for got, want in zip(
                    (result.mean[name], result.var[name]), expected[estimator], strict=True
                ):
                    np.testing.assert_allclose(
                        got.double(), want, rtol=rtol, atol=1e-5, err_msg=f"{estimator} {name}"
                    )
                assert result.count[name] == len(inputs)


def _pooled(inputs):
    values = np.concatenate(inputs, axis=1)
    return values.mean(1), values.var(1, ddof=1)


def _ema(values, decay, start=None):
    total = np.zeros(values.shape[1]) if start is None else np.full(values.shape[1], start)
    for value in values:
        total = decay * total + (1 - decay) * value
    return total if start is not None else total / (1 - decay ** len(values))


@pytest.mark.parametrize("first", list(ALL))
def test_every_estimator_from_one_run(first):
    model = network()
    oracle = Oracle(model)
    tracker = StatisticsTracker(model, {first: ALL[first], **ALL})
    for x in batches(7):
        model(x).sum().backward()
        tracker.update()
        shown = running_statistics(model)
    statistics = tracker.statistics()
    assert list(statistics) == list(tracker.estimators)
    oracle.check(statistics)
    for name in shown.names:
        assert torch.equal(shown.mean[name], statistics[first].mean[name])
        assert torch.equal(shown.var[name], statistics[first].var[name])
        assert shown.count[name] == 7


def test_offsets_cost_no_digits_over_many_steps():
    """1000 ± 0.1: an average kept in float32 would stand still at a decay of 0.9999."""
    layer = nn.BatchNorm1d(1, dtype=torch.float64)
    tracker = StatisticsTracker(
        layer.float(), {"slow": Ema(0.9999, debias=True), "mean": Cumulative(), "pool": Pooled()}
    )
    means = []
    for i in range(3000):
        x = torch.tensor([[1000.0 + i / 3000], [1000.25 + i / 3000]])
        means.append(x.double().mean().item())
        layer(x)
        tracker.update()
    statistics = tracker.statistics()
    weights = 0.9999 ** np.arange(2999, -1, -1.0)
    assert abs(statistics["mean"].mean[""].item() - np.mean(means)) < 1e-4
    assert abs(statistics["slow"].mean[""].item() - np.average(means, weights=weights)) < 1e-4
    assert abs(statistics["pool"].mean[""].item() - np.mean(means)) < 1e-4


def test_update_launches_do_not_grow_with_layers_and_read_nothing_back():
    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls.append(str(function))
            return function(*args, **(kwargs or {}))

    def calls(layers):
        model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(layers)])
        tracker = StatisticsTracker(model, ALL)
        for _ in range(2):
            model(torch.randn(4, 3))
            with Count() as count:
                tracker.update()
        return count.calls

    few, many = calls(1), calls(60)
    assert few == many
    assert not any("_local_scalar_dense" in call or "nonzero" in call for call in many)

    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(30)])
    tracker = StatisticsTracker(model, {f"e{i}": Ema(i / 10) for i in range(8)})
    model(torch.randn(4, 3))
    tracker.update()
    model(torch.randn(4, 3))
    with Count() as count:
        tracker.update()
    assert len(count.calls) <= 10


def test_gradient_accumulation_every_forward_counts_with_or_without_update():
    """In every order of forward passes and updates, what torch.nn counts."""
    results = []
    for updates in ([0, 1, 2, 3, 4, 5], [1, 3, 5], [], [0, 0, 5, 5, 5]):
        model = network()
        oracle = Oracle(model)
        tracker = StatisticsTracker(model, ALL)
        for i, x in enumerate(batches(6)):
            model(x).sum().backward()
            for _ in range(updates.count(i)):
                tracker.update()
        results.append(tracker.statistics())
        oracle.check(results[-1])
        assert model[1].num_batches_tracked == 6
    for other in results[1:]:
        for name, statistics in other.items():
            for layer in statistics.names:
                assert torch.equal(statistics.var[layer], results[0][name].var[layer])


def test_update_between_forward_and_backward_with_frozen_neighbours():
    """Autograd must not take an update for a change of something it needs."""
    model, reference = network(), network()
    for m in (model, reference):
        m[1].eval()
    tracker = StatisticsTracker(model, ALL)
    for x in batches(3):
        a, b = model(x), reference(x)
        tracker.update()
        a, b = a + model(x), b + reference(x)
        tracker.update()
        ga = torch.autograd.grad(a.square().sum(), model.parameters())
        gb = torch.autograd.grad(b.square().sum(), reference.parameters())
        assert all(torch.equal(p, q) for p, q in zip(ga, gb, strict=True))
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def test_one_layer_compiled_and_its_neighbour_not():
    """What the compiled layer writes must not look to autograd like a change of the other's."""
    model, reference = network(), network()
    tracker = StatisticsTracker(model, ALL)
    model[4].compile(backend="aot_eager")
    for x in batches(2):
        for m in (model, reference):
            m(x).square().sum().backward()
        tracker.update()
    torch.testing.assert_close(
        dict(model.named_buffers()), dict(reference.named_buffers()), rtol=1e-4, atol=1e-5
    )


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.bns = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(2), nn.BatchNorm1d(3)])

    def forward(self, x, which):
        for i in which:
            x[i] = self.bns[i](x[i])
        return x


@pytest.mark.parametrize("first", list(ALL))
def test_each_layer_counts_for_itself(first):
    """Layers skipped, called several times and in eval mode, at random."""
    model, reference = Branches(), Branches()
    oracle = Oracle(model)
    tracker = StatisticsTracker(model, {first: ALL[first], **ALL})
    random = np.random.default_rng(0)
    for step in range(30):
        which = random.integers(0, 3, size=random.integers(0, 5)).tolist()
        for i in range(3):
            training = bool(random.random() < 0.8)
            model.bns[i].train(training)
            reference.bns[i].train(training)
        x = [torch.randn(4, c) + step for c in (3, 2, 3)]
        model(list(x), which)
        reference(list(x), which)
        if random.random() < 0.8:
            tracker.update()
    for i in range(3):
        assert len(oracle.values[f"bns.{i}"]) > 3
        assert reference.bns[i].num_batches_tracked == len(oracle.values[f"bns.{i}"])
    oracle.check(tracker.statistics())
    assert [b.num_batches_tracked for b in model.bns] == [
        b.num_batches_tracked for b in reference.bns
    ]
    if first == "ema":
        model.bns[1].eval(), reference.bns[1].eval()
        x = torch.randn(4, 2)
        torch.testing.assert_close(model.bns[1](x), reference.bns[1](x))


def test_eval_and_state_dict_see_the_last_forward_pass_without_update():
    model, reference = network(), network()
    StatisticsTracker(model, ALL)
    x = batches(1)[0]
    model(x), reference(x)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))
    model.train()(x), reference.train()(x)
    torch.testing.assert_close(dict(model.state_dict()), dict(reference.state_dict()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    model, reference = network(), network()
    tracker = StatisticsTracker(model, ALL)
    for x in batches(3):
        gradients = []
        for m, wrap in ((model, True), (reference, False)):
            leaf = x.clone().requires_grad_()
            output = checkpoint(m, leaf, use_reentrant=reentrant) if wrap else m(leaf)
            output.square().sum().backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)
        tracker.update()
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def test_empty_batches_count_nothing():
    layer = nn.BatchNorm1d(3)
    oracle = Oracle(layer)
    tracker = StatisticsTracker(layer, ALL)
    layer(torch.randn(5, 3))
    tracker.update()
    layer(torch.randn(0, 3))
    tracker.update()
    oracle.values[""].pop()
    oracle.check(tracker.statistics())


def test_layers_without_running_statistics_and_models_without_layers():
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 3)
    )
    tracker = StatisticsTracker(model, ALL)
    model(torch.randn(4, 3))
    tracker.update()
    assert tracker.statistics()["ema"].names == ("0",)
    assert model[1].running_mean is None and type(model[1]) is nn.BatchNorm1d
    empty = StatisticsTracker(nn.Linear(3, 3), ALL)
    empty.update()
    assert len(empty.statistics()["mean"]) == 0
    empty.load_state_dict(empty.state_dict())


def test_names_shared_layers_and_compiled_models():
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.BatchNorm1d(3)))
    tracker = StatisticsTracker(torch.compile(model, backend="eager"), ALL)
    model(torch.randn(4, 3))
    assert tracker.statistics()["ema"].count == {"0": 2, "1.1": 1}
    tracker.close()


def test_wrong_use_is_refused_and_changes_nothing():
    model = network()
    for estimators, message in [
        ({}, "at least one"),
        ({"a": 0.9}, "'a' is 0.9"),
        ({"a": Ema}, "'a' is"),
    ]:
        with pytest.raises(UserError, match=message):
            StatisticsTracker(model, estimators)
    with pytest.raises(UserError, match="'1' is a SyncBatchNorm"):
        StatisticsTracker(nn.Sequential(nn.BatchNorm2d(2), nn.SyncBatchNorm(2)), ALL)
    with pytest.raises(UserError, match="lazy"):
        StatisticsTracker(nn.Sequential(nn.LazyBatchNorm2d()), ALL)
    assert type(model[1]) is nn.BatchNorm2d
    tracker = StatisticsTracker(model, ALL)
    with pytest.raises(UserError, match="a StatisticsTracker already"):
        StatisticsTracker(model, ALL)
    tracker.close()
    StatisticsTracker(model, ALL).close()


@pytest.mark.parametrize("convert", [False, True])
def test_close_leaves_the_model_as_it_was(convert):
    model = network()
    if convert:
        convert_batchnorm(model)
    kinds = [type(m) for m in model]
    with StatisticsTracker(model, ALL) as tracker:
        assert type(model[1]) is BatchNorm2d
        for x in batches(3):
            model(x)
    tracker.close()
    after = tracker.statistics()
    assert [type(m) for m in model] == kinds
    assert "slot" not in vars(model[1])
    assert torch.equal(model[1].running_var, after["ema"].var["1"])
    assert model[1].num_batches_tracked == 3
    storages = {b.untyped_storage().data_ptr() for b in model.buffers()}
    assert len(storages) == len(list(model.buffers()))
    reference = network()
    reference.load_state_dict(model.state_dict())
    x = batches(1)[0]
    assert torch.equal(model(x), reference(x))
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b)
    tracker.update()
    assert torch.equal(tracker.statistics()["ema"].var["1"], after["ema"].var["1"])


def test_a_tracker_can_be_collected():
    model = network()
    tracker = StatisticsTracker(model, ALL)
    reference = weakref.ref(tracker)
    tracker.close()
    del tracker
    gc.collect()
    assert reference() is None


def train(model, tracker, inputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        tracker.update()
        optimizer.step()


@pytest.mark.parametrize("first", list(ALL))
@pytest.mark.parametrize("model_first", [True, False])
def test_resume_is_bit_exact(first, model_first):
    estimators = {first: ALL[first], **ALL}
    model = network()
    tracker = StatisticsTracker(model, estimators)
    model[1].eval()
    train(model, tracker, batches(2))  # layers at different counts
    model[1].train()
    train(model, tracker, batches(3, seed=1))
    file = io.BytesIO()
    torch.save((model.state_dict(), tracker.state_dict()), file)
    train(model, tracker, batches(5, seed=2))

    file.seek(0)
    saved_model, saved_tracker = torch.load(file, weights_only=True)
    resumed = network()
    other = StatisticsTracker(resumed, estimators)
    train(resumed, other, batches(1, seed=9))
    if model_first:
        resumed.load_state_dict(saved_model)
        other.load_state_dict(saved_tracker)
    else:
        other.load_state_dict(saved_tracker)
        resumed.load_state_dict(saved_model)
    train(resumed, other, batches(5, seed=2))
    for (name, a), (_, b) in zip(
        model.state_dict().items(), resumed.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    mine, theirs = tracker.statistics(), other.statistics()
    for name, statistics in mine.items():
        assert statistics.count == theirs[name].count
        for layer in statistics.names:
            assert torch.equal(statistics.mean[layer], theirs[name].mean[layer])
            assert torch.equal(statistics.var[layer], theirs[name].var[layer])


def test_states_of_other_trackers_are_refused():
    tracker = StatisticsTracker(network(), ALL)
    for estimators, message in [
        ({**ALL, "ema": Ema(0.8)}, r"other estimators: 'ema': Ema\(decay=0.8"),
        ({"ema": ALL["ema"]}, "1 of them, here 6"),
    ]:
        state = StatisticsTracker(network(), estimators).state_dict()
        with pytest.raises(UserError, match=message):
            tracker.load_state_dict(state)
    with pytest.raises(UserError, match="other layers: '0': 3, here '1': 5"):
        tracker.load_state_dict(
            StatisticsTracker(nn.Sequential(nn.BatchNorm1d(3)), ALL).state_dict()
        )
    damaged = tracker.state_dict()
    del damaged["mass"]
    with pytest.raises(UserError, match="'mass' does not fit"):
        tracker.load_state_dict(damaged)
    with pytest.raises(UserError, match="other estimators: it has none"):
        tracker.load_state_dict({})


@pytest.mark.parametrize("first", ["ema", "mean", "debiased", "pooled"])
@pytest.mark.parametrize("pending", [False, True])
def test_moving_casting_and_replacing_buffers(first, pending):
    """float64 and back, and tensors put in place of the buffers, lose and repeat nothing."""
    model = network()
    oracle = Oracle(model)
    tracker = StatisticsTracker(model, {first: ALL[first], **ALL})
    for i, x in enumerate(batches(10)):
        if i == 2:
            model.double()
        if i == 4:
            model.float()
        if i == 6:
            model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        if i == 7:
            model[1].running_mean = model[1].running_mean.clone()
        if i == 8:
            model.to("cpu")
        model(x.to(model[0].weight.dtype)).sum().backward()
        if not pending:
            tracker.update()
    tracker.update()
    assert model[1].num_batches_tracked == 10
    oracle.check(tracker.statistics(), rtol=2e-5)
    assert torch.equal(model[4].running_var, tracker.statistics()[first].var["4"])


def test_layers_of_several_dtypes():
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(2).double(), nn.BatchNorm1d(3)])
    oracle = Oracle(model)
    tracker = StatisticsTracker(model, ALL)
    for _ in range(4):
        for layer in model:
            layer(torch.randn(5, layer.num_features, dtype=layer.weight.dtype))
        tracker.update()
    statistics = tracker.statistics()
    oracle.check(statistics)
    assert statistics["ema"].names == ("0", "1", "2")
    assert statistics["ema"].mean["1"].dtype == torch.float64
    state = tracker.state_dict()
    again = StatisticsTracker(copy.deepcopy(model), ALL)
    again.load_state_dict(state)
    assert torch.equal(again.statistics()["pooled"].var["1"], statistics["pooled"].var["1"])


def test_half_precision_layers_keep_exact_averages():
    layer = nn.BatchNorm1d(2).to(torch.bfloat16)
    tracker = StatisticsTracker(layer, {"ema": Ema(0.999), "mean": Cumulative()})
    for _ in range(600):
        layer((torch.randn(64, 2) + 3).to(torch.bfloat16))
        tracker.update()
    # bfloat16 buffers of torch's would stand still at 3·(1-0.999)/2⁻⁸ steps
    expected = 3 * (1 - 0.999**600)
    assert layer.running_mean.dtype == torch.bfloat16
    assert (layer.running_mean.double() - expected).abs().max() < 0.03


@pytest.mark.parametrize("write", ["load", "reset", "copy_to"])
def test_a_first_ema_goes_on_from_what_is_written_into_the_buffers(write):
    model, reference = network(), network()
    tracker = StatisticsTracker(model, ALL)
    donor = network()
    for x in batches(3, seed=5):
        donor(x)
    for i, x in enumerate(batches(6)):
        if i == 3:
            for m in (model, reference):
                if write == "load":
                    m.load_state_dict(donor.state_dict())
                elif write == "reset":
                    for layer in (m[1], m[4], m[7]):
                        layer.reset_running_stats()
                else:
                    running_statistics(donor).copy_to(m)
        model(x), reference(x)
        tracker.update()
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def test_starting_from_pretrained_buffers():
    model = network()
    for x in batches(3):
        model(x)
    reference = copy.deepcopy(model)
    start = running_statistics(model)
    tracker = StatisticsTracker(model, ALL)
    for statistics in tracker.statistics().values():
        assert torch.equal(statistics.var["4"], start.var["4"])
    for x in batches(3, seed=3):
        model(x), reference(x)
        tracker.update()
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))
    assert tracker.statistics()["mean"].count["1"] == 3 and model[1].num_batches_tracked == 6


def test_nothing_in_statistics_aliases_the_tracker():
    model = network()
    tracker = StatisticsTracker(model, ALL)
    model(batches(1)[0])
    before = tracker.statistics()
    kept = {n: s.var["1"].clone() for n, s in before.items()}
    state = tracker.state_dict()
    averages = state["averages"].clone()
    model(batches(1, seed=4)[0])
    tracker.update()
    assert all(torch.equal(before[n].var["1"], v) for n, v in kept.items())
    assert torch.equal(state["averages"], averages)


def test_not_a_number_reaches_the_estimators_as_in_torch():
    model, reference = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    tracker = StatisticsTracker(model, {"ema": Ema(0.9)})
    bad = torch.tensor([[1.0, float("nan")], [2.0, 1.0]])
    for x in (torch.randn(4, 2), bad, torch.randn(4, 2)):
        model(x), reference(x)
        tracker.update()
    torch.testing.assert_close(
        dict(model.named_buffers()), dict(reference.named_buffers()), equal_nan=True
    )
    assert not model.running_mean[0].isnan()


@pytest.mark.parametrize("how", ["frozen", "ghost batches"])
def test_closing_keeps_what_a_layer_was_set_to_meanwhile(how):
    model = network()
    tracker = StatisticsTracker(model, ALL)
    x = batches(1)[0]
    if how == "frozen":
        freeze_batchnorm(model)
    else:
        set_normalization_batch(model, 2)
    expected = model(x)
    tracker.close()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("moved", ["assigned", "cast"])
def test_training_goes_on_after_an_inference_mode_pass_over_moved_buffers(moved):
    model = network()
    tracker = StatisticsTracker(model, ALL)
    x = batches(1)[0]
    model(x).sum().backward()
    if moved == "cast":
        model.double()
        x = x.double()
    else:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).sum().backward()
    tracker.update()
    assert set(tracker.statistics()["mean"].count.values()) == {2}


def test_a_functional_call_leaves_the_models_own_statistics_alone():
    model, plain = network(), network()
    plain.load_state_dict(model.state_dict())
    StatisticsTracker(model, {"ema": Ema(0.9)})
    x = batches(1)[0]
    model(x)  # not fed yet
    plain(x)
    others = {
        **dict(model.named_parameters()),
        **{name: torch.full_like(buffer, 1000) for name, buffer in model.named_buffers()},
    }
    torch.func.functional_call(model.eval(), others, (x,))
    for name, buffer in plain.named_buffers():
        assert torch.allclose(dict(model.named_buffers())[name], buffer, atol=1e-6), name


@pytest.mark.parametrize("way", ["load_state_dict", "reset", "copy_to"])
def test_statistics_are_what_was_written_into_the_buffers(way):
    model, donor = network(), network()
    tracker = StatisticsTracker(model, {"ema": Ema(0.9)})
    model(batches(1)[0])
    donor(batches(1)[0] + 5)
    if way == "load_state_dict":
        model.load_state_dict(donor.state_dict())
    elif way == "reset":
        model[1].reset_running_stats()
    else:
        running_statistics(donor).copy_to(model)
    assert torch.equal(tracker.statistics()["ema"].mean["1"], model[1].running_mean)
    assert torch.equal(tracker.state_dict()["averages"][0, 0, :5].float(), model[1].running_mean)


def test_exporting_with_moments_waiting_is_refused_and_loses_nothing():
    model = network()
    tracker = StatisticsTracker(model, ALL)
    x = batches(1)[0]
    model(x)
    # torch 2.6 exports by its compiler, which stops at the call that would say so.
    with pytest.raises(Exception, match=r"call its update\(\)|skip function"):
        torch.export.export(model.eval(), (x,))
    assert set(tracker.statistics()["mean"].count.values()) == {1}
    torch.export.export(model, (x,))


def test_a_model_without_memory_is_refused():
    with pytest.raises(UserError, match="meta device"):
        StatisticsTracker(network().to("meta"), ALL)


def test_a_state_saved_by_the_first_version_is_read():
    """Written then after three steps; the second layer sat the first one out."""
    estimators = {
        "ema": Ema(0.5),
        "debiased": Ema(0.5, debias=True),
        "mean": Cumulative(),
        "pool": Pooled(),
        "window": Pooled(2),
    }
    double = {"dtype": torch.float64}
    saved = {
        "estimators": {
            "ema": "Ema(decay=0.5, debias=False)",
            "debiased": "Ema(decay=0.5, debias=True)",
            "mean": "Cumulative()",
            "pool": "Pooled(window=None)",
            "window": "Pooled(window=2)",
        },
        "layers": {"0": 1, "1": 1},
        "mini_batches": torch.tensor([3, 2]),
        "untouched": torch.tensor([[0, 0], [1, 1]], **double),
        "averages": torch.tensor(
            [
                [[2.375, 2.125], [5.5, 5.375]],
                [[19 / 7, 17 / 6], [43 / 7, 41 / 6]],
                [[2.5, 2.75], [29 / 6, 6.25]],
            ],
            **double,
        ),
        "mass": torch.tensor([[[2, 2]], [[1.75, 1.5]], [[3, 2]]], **double),
        "turn": torch.tensor([3, 2]),
        "pool pool": torch.tensor([[[6, 4], [2.5, 2.75], [15.5, 12.75]]], **double),
        "pool window": torch.tensor(
            [[[2, 2], [3, 2.5], [8, 4.5]], [[2, 2], [2.5, 3], [4.5, 8]]], **double
        ),
    }

    def feed(model, values, layers):
        for index in layers:
            model[index](torch.tensor([[1.0], [values]], dtype=model[index].weight.dtype))

    model, reference = (
        nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1).double()) for _ in range(2)
    )
    oracle = StatisticsTracker(reference, estimators)
    for i in range(3):
        feed(reference, 3 + i, [0, 1] if i else [0])
        oracle.update()
    tracker = StatisticsTracker(model, estimators)
    tracker.load_state_dict(saved)
    for m in (model, reference):
        feed(m, 9, [0, 1])
    for name, expected in oracle.statistics().items():
        got = tracker.statistics()[name]
        assert got.count == expected.count
        for layer in expected.names:
            torch.testing.assert_close(got.mean[layer], expected.mean[layer])
            torch.testing.assert_close(got.var[layer], expected.var[layer])

    # It had counters of pools without any pool.
    alone = {"estimators": {"ema": "Ema(decay=0.5, debias=False)"}, "layers": saved["layers"]}
    rest = {name: saved[name] for name in ("mini_batches", "untouched", "turn")}
    first = {name: saved[name][:1] for name in ("averages", "mass")}
    fresh = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1).double())
    StatisticsTracker(fresh, {"ema": Ema(0.5)}).load_state_dict({**alone, **rest, **first})
    assert fresh[0].running_mean.item() == 2.375


class Newest(Rule):
    """An estimator of someone else's: the newest mini-batch."""

    def label(self):
        return "the newest mini-batch"

    def bank(self):
        return NewestBank


class NewestBank:
    def __init__(self, rules, start):
        self.values = start.clone()

    def update(self, batch, counts, seen):
        self.values.copy_(batch if seen is None else torch.where(seen, batch, self.values))

    def value(self, name):
        return self.values

    def follow(self, name, buffers):
        pass

    def state(self):
        return {"newest": self.values}


def test_an_estimator_needs_nothing_but_its_rule_and_bank():
    model = network()
    oracle = Oracle(model)
    tracker = StatisticsTracker(model, {"newest": Newest(), **ALL})
    train(model, tracker, batches(3))
    newest = tracker.statistics()["newest"]
    for name, inputs in oracle.values.items():
        np.testing.assert_allclose(newest.mean[name], inputs[-1].mean(1), rtol=1e-4, atol=1e-5)
        assert torch.equal(newest.mean[name], model.get_submodule(name).running_mean)
    other = network()
    again = StatisticsTracker(other, tracker.estimators)
    again.load_state_dict({**tracker.state_dict(), "estimators": again.state_dict()["estimators"]})
    assert torch.equal(again.statistics()["newest"].var["1"], newest.var["1"])


def lightning_update(model, inputs):
    """What Lightning's StochasticWeightAveraging does before, in and after its last epoch."""
    momenta = {}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.zeros_like(module.running_mean)
            module.running_var = torch.ones_like(module.running_var)
            momenta[module] = module.momentum
            module.momentum = None
            module.num_batches_tracked *= 0
    model.train()
    for x in inputs:
        model(x)
    for module, momentum in momenta.items():
        module.momentum = momentum


def torch_update(model, inputs):
    torch.optim.swa_utils.update_bn(inputs, model)


@pytest.mark.parametrize("update", [torch_update, lightning_update])
@pytest.mark.parametrize("first", ["ema", "mean", "pooled"])
@pytest.mark.parametrize("ghosts", [False, True])
def test_update_bn_does_what_it_does_to_torchs_layers(update, first, ghosts):
    """And the estimators, which follow training, don't count its mini-batches."""
    model, reference = network(), network()
    if ghosts:
        set_normalization_batch(model, 4), set_normalization_batch(reference, 4)
    tracker = StatisticsTracker(model, {first: ALL[first]})
    for m in (model, reference):
        for x in batches(2):
            m(x)
        update(m, batches(4, seed=1))
    for (name, got), (_, expected) in zip(
        model.named_buffers(), reference.named_buffers(), strict=True
    ):
        torch.testing.assert_close(got, expected, msg=name)
    assert set(tracker.statistics()[first].count.values()) == {2}
    for m in (model, reference):
        m(batches(1, seed=2)[0])
    assert set(tracker.statistics()[first].count.values()) == {3}
    if first == "ema":  # goes on from what update_bn wrote
        torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def test_update_bn_is_refused_where_momentum_cannot_tell():
    model = network(momentum=None)
    tracker = StatisticsTracker(model, {"mean": Cumulative()})
    with pytest.raises(UserError, match=r"close\(\) the tracker before update_bn"):
        torch.optim.swa_utils.update_bn(batches(2), model)
    tracker.close()
    torch.optim.swa_utils.update_bn(batches(2), model)


@pytest.mark.parametrize("first", ["ema", "pooled"])
def test_variances_beyond_half_precision_are_refused(first):
    layer = nn.BatchNorm1d(2).half()
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    tracker = StatisticsTracker(layer, {first: ALL[first]})
    for scale in (100.0, 200.0):
        layer((x * scale).half())
        tracker.update()
    assert layer.running_var.isfinite().all()
    layer((x * 400).half())
    with pytest.raises(UserError, match="variance of a mini-batch in a BN layer is beyond 65504"):
        tracker.update()


def test_pooled_variances_beyond_half_precision_are_refused():
    """Each mini-batch's is within, but not that of all together."""
    layer = nn.BatchNorm1d(1).half()
    tracker = StatisticsTracker(layer, {"ema": Ema(0.9), "pooled": Pooled()})
    for mean in (-1000.0, 1000.0):
        layer(torch.tensor([[mean - 1], [mean + 1]]).half())
        tracker.update()
    with pytest.raises(UserError, match=r"estimate 'pooled' is 1\.333e"):
        tracker.statistics()


def test_infinities_in_the_input_are_no_matter_of_precision():
    layer, reference = nn.BatchNorm1d(1).half(), nn.BatchNorm1d(1).half()
    tracker = StatisticsTracker(layer, {"ema": Ema(0.9)})
    x = torch.tensor([[float("inf")], [1.0]]).half()
    layer(x), reference(x)
    tracker.update()
    assert torch.equal(layer.running_mean, reference.running_mean)
    assert layer.running_var.isnan() == reference.running_var.isnan()


def test_vmap_is_refused():
    model = network()
    StatisticsTracker(model, ALL)
    x = torch.stack(batches(1) * 2)
    with pytest.raises(UserError, match=r"called inside torch\.vmap"):
        torch.vmap(model)(x)


def test_replicas_are_refused():
    model = nn.DataParallel(network())
    model.device_ids = [0, 1]
    with pytest.raises(UserError, match=r"the model is a DataParallel on 2 devices.*`\.module`"):
        StatisticsTracker(model, ALL)
    model.device_ids = [0]
    assert "module.1" in StatisticsTracker(model, ALL).statistics()["ema"].names
