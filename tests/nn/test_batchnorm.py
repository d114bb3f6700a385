"""The layers against torch.nn's: outputs, gradients, buffers and errors, bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torchvision
from torch import nn

from bnexp.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert_batchnorm
from bnexp.statistics.rules import Cumulative, Ema, Pooled
from bnexp.statistics.tracker import StatisticsTracker

PAIRS = {
    "1d": (BatchNorm1d, nn.BatchNorm1d, (6, 5)),
    "1d-length": (BatchNorm1d, nn.BatchNorm1d, (6, 5, 7)),
    "2d": (BatchNorm2d, nn.BatchNorm2d, (6, 5, 4, 3)),
    "3d": (BatchNorm3d, nn.BatchNorm3d, (6, 5, 2, 4, 3)),
}
EIGHT = {
    "ema": Ema(0.9),
    "slow": Ema(0.999),
    "debiased": Ema(0.99, debias=True),
    "mean": Cumulative(),
    "pooled": Pooled(),
    "window": Pooled(3),
    "wide": Pooled(40),
    "last": Ema(0.0),
}


def pair(kind, **options):
    ours_class, torch_class, shape = PAIRS[kind]
    ours, theirs = ours_class(5, **options), torch_class(5, **options)
    if theirs.affine:
        with torch.no_grad():
            theirs.weight.uniform_(0.5, 2)
            if theirs.bias is not None:
                theirs.bias.normal_()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, shape


def steps(layer, inputs, after=lambda: None):
    """Outputs and gradients of a few training steps with gradient descent on the parameters."""
    results = []
    for x in inputs:
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        output = layer(x)
        after()
        parameters = [p for p in layer.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(output.square().sum() + output.sum(), [x, *parameters])
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients[1:], strict=True):
                parameter -= 0.01 * gradient
        results += [output.detach(), *gradients, *(p.detach().clone() for p in parameters)]
    return results


def assert_identical(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a, b)


def inputs_like(shape, dtype=torch.float32, memory_format=torch.contiguous_format, n=3):
    return [
        (torch.randn(shape, dtype=torch.float64) * 2 + i).to(dtype).to(memory_format=memory_format)
        for i in range(n)
    ]


OPTIONS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.3},
    {"eps": 1e-2},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("kind, options", itertools.product(PAIRS, OPTIONS))
def test_untracked_is_bit_identical_buffers_included(kind, options):
    ours, theirs, shape = pair(kind, **options)
    inputs = inputs_like(shape)
    assert_identical(steps(ours, inputs), steps(theirs, inputs))
    for (name, a), (other, b) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)
    assert_identical([ours.eval()(inputs[0])], [theirs.eval()(inputs[0])])


@pytest.mark.parametrize("kind, options", itertools.product(PAIRS, OPTIONS))
def test_tracked_is_bit_identical_and_buffers_agree_to_rounding(kind, options):
    ours, theirs, shape = pair(kind, **options)
    momentum = options.get("momentum", 0.1)
    first = Cumulative() if momentum is None else Ema(1 - momentum)
    inputs = inputs_like(shape, n=6)
    tracker = StatisticsTracker(ours, {"first": first, **EIGHT})
    assert_identical(steps(ours, inputs, tracker.update), steps(theirs, inputs))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize(
    "memory_format, dtype",
    [
        (torch.channels_last, torch.float32),
        (torch.channels_last, torch.float64),
        (torch.contiguous_format, torch.float64),
        (torch.contiguous_format, torch.bfloat16),
        (torch.channels_last, torch.bfloat16),
    ],
)
def test_memory_formats_and_dtypes(tracked, memory_format, dtype):
    ours, theirs, shape = pair("2d")
    ours.to(dtype)
    theirs.to(dtype)
    inputs = inputs_like(shape, dtype, memory_format)
    after = StatisticsTracker(ours, EIGHT).update if tracked else lambda: None
    assert_identical(steps(ours, inputs, after), steps(theirs, inputs))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("tracked", [False, True])
def test_channels_last_3d(tracked):
    ours, theirs, shape = pair("3d")
    after = StatisticsTracker(ours, EIGHT).update if tracked else lambda: None
    inputs = inputs_like(shape, memory_format=torch.channels_last_3d)
    assert_identical(steps(ours, inputs, after), steps(theirs, inputs))


def small_net(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), nn.Conv2d(5, 5, 3), norm(5), nn.ReLU()
    )


@pytest.mark.parametrize("tracked", [False, True])
def test_autocast(tracked):
    ours, theirs = small_net(BatchNorm2d), small_net(nn.BatchNorm2d)
    after = StatisticsTracker(ours, EIGHT).update if tracked else lambda: None
    inputs = inputs_like((4, 3, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = steps(ours, inputs, after), steps(theirs, inputs)
    assert_identical(a, b)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("tracked", [False, True])
def test_double_backward(tracked):
    ours, theirs, shape = pair("2d", dtype=torch.float64)
    if tracked:
        StatisticsTracker(ours, EIGHT)
    x = torch.randn(shape, dtype=torch.float64)

    def second_order(layer):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [leaf, layer.weight])

    assert_identical(second_order(ours), second_order(theirs))


@pytest.mark.parametrize("tracked", [False, True])
def test_without_gradients_and_without_grad_mode(tracked):
    ours, theirs, shape = pair("2d")
    after = StatisticsTracker(ours, {"first": Ema(0.9)}).update if tracked else lambda: None
    ours.requires_grad_(False)
    theirs.requires_grad_(False)
    inputs = inputs_like(shape)
    assert_identical(steps(ours, inputs, after), steps(theirs, inputs))
    with torch.no_grad():
        assert torch.equal(ours(inputs[0]), theirs(inputs[0]))
    after()
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert ours.num_batches_tracked == 4


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize(
    "kind, shape",
    [
        ("1d", (1, 5)),
        ("1d", (6, 4)),
        ("1d", (5,)),
        ("1d", (2, 5, 3, 3)),
        ("2d", (1, 5, 1, 1)),
        ("2d", (5, 4, 4)),
        ("2d", (2, 6, 3, 3)),
        ("3d", (2, 5, 3, 3)),
        ("1d", (0, 5)),
        ("2d", (0, 5, 3, 3)),
        ("1d", (1, 5, 2)),
        ("2d", (1, 5, 1, 2)),
        ("3d", (1, 5, 1, 1, 1)),
    ],
)
def test_accepts_and_refuses_the_shapes_that_torch_does(kind, shape, tracked):
    ours, theirs, _ = pair(kind)
    if tracked:
        StatisticsTracker(ours, EIGHT)

    def outcome(layer):
        try:
            return layer(torch.ones(shape).cumsum(0))
        except (ValueError, RuntimeError) as error:
            return type(error), str(error)

    a, b = outcome(ours), outcome(theirs)
    if isinstance(b, tuple):
        assert a == b
    else:
        assert torch.equal(a, b)


@pytest.mark.parametrize("tracked", [False, True])
def test_track_running_stats_switched_off_later(tracked):
    ours, theirs, shape = pair("2d")
    after = StatisticsTracker(ours, EIGHT).update if tracked else lambda: None
    ours.track_running_stats = theirs.track_running_stats = False
    inputs = inputs_like(shape)
    assert_identical(steps(ours, inputs, after), steps(theirs, inputs))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("tracked", [False, True])
def test_eval_outputs_and_gradients(tracked):
    ours, theirs, shape = pair("2d", momentum=0.5)
    after = StatisticsTracker(ours, {"first": Ema(0.5)}).update if tracked else lambda: None
    steps(ours, inputs_like(shape), after)
    steps(theirs, inputs_like(shape))
    theirs.load_state_dict(ours.state_dict())
    inputs = inputs_like(shape)
    assert_identical(steps(ours.eval(), inputs, after), steps(theirs.eval(), inputs))


def test_is_instance_of_torchs_and_has_its_constructor_and_repr():
    for ours, theirs, _ in PAIRS.values():
        assert issubclass(ours, theirs)
        assert str(ours(5, momentum=None)) == str(theirs(5, momentum=None))
        layer = ours(3, 1e-3, 0.2, False, True, None, torch.float64)
        assert layer.eps == 1e-3 and layer.running_mean.dtype == torch.float64


@pytest.mark.parametrize("tracked", [False, True])
def test_state_dicts_travel_both_ways(tracked):
    reference = torchvision.models.resnet18(num_classes=3)
    model = convert_batchnorm(torchvision.models.resnet18(num_classes=3))
    if tracked:
        StatisticsTracker(model, EIGHT)
    assert list(model.state_dict()) == list(reference.state_dict())
    with torch.no_grad():
        for buffer in reference.buffers():
            buffer += 1
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), reference.eval()(x))
    reference.load_state_dict(model.state_dict())
    # checkpoints from before num_batches_tracked existed
    old = {k: v for k, v in reference.state_dict().items() if "num_batches" not in k}
    model.load_state_dict(old)
    if tracked:
        model.load_state_dict(copy.deepcopy(reference.state_dict()), assign=True)
        assert torch.equal(model.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(
    "copying",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(_saved(m), weights_only=False),
    ],
)
@pytest.mark.parametrize("tracked", [False, True])
def test_copies_stand_on_their_own(copying, tracked):
    model = small_net(BatchNorm2d)
    tracker = StatisticsTracker(model, EIGHT) if tracked else None
    model(torch.randn(4, 3, 8, 8))
    copied = copying(model)  # with the moments of the last forward pass, update() or not
    assert type(copied[1]) is BatchNorm2d
    before = {k: v.clone() for k, v in copied.state_dict().items()}
    assert before["1.num_batches_tracked"] == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model(torch.randn(4, 3, 8, 8))
    if tracker:
        tracker.update()
    assert all(torch.equal(v, before[k]) for k, v in copied.state_dict().items())
    copied(torch.randn(4, 3, 8, 8))
    assert copied[1].num_batches_tracked == 2 == model[1].num_batches_tracked


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("tracked", [False, True])
def test_export(tracked):
    model, reference = small_net(BatchNorm2d), small_net(nn.BatchNorm2d)
    if tracked:
        StatisticsTracker(model, EIGHT)
    x = torch.randn(4, 3, 8, 8)
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), reference.eval()(x))


@pytest.mark.slow
@pytest.mark.parametrize("tracked", [False, True])
def test_compiled_full_graph(tracked):
    ours, theirs = small_net(BatchNorm2d), small_net(nn.BatchNorm2d)
    after = (
        StatisticsTracker(ours, {"first": Ema(0.9), **EIGHT}).update if tracked else (lambda: None)
    )
    # aot_eager traces as inductor does, without the minute of C++ compilation
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = inputs_like((4, 3, 8, 8), n=4)
    for a, b in zip(steps(compiled, inputs, after), steps(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-5
    )
    assert ours[1].num_batches_tracked == 4
