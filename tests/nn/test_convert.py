"""convert_batchnorm on nested, shared, lazy, odd and foreign layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from bnexp.errors import UserError
from bnexp.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert_batchnorm, restore_batchnorm
from bnexp.nn.modes import freeze_batchnorm, set_normalization_batch
from bnexp.statistics.rules import Ema
from bnexp.statistics.tracker import StatisticsTracker


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.BatchNorm2d(3)
        self.again = self.shared
        self.parts = nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm2d(3, affine=False))})
        self.plain = nn.BatchNorm1d(3, track_running_stats=False)
        self.volume = nn.BatchNorm3d(3, dtype=torch.float64).eval()
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)


def test_layers_stay_the_same_objects_with_the_same_tensors_and_flags():
    model = Odd()
    model.shared.requires_grad_(False)
    before = dict(model.named_modules(remove_duplicate=False))
    tensors = {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
    names = list(model.state_dict())
    assert convert_batchnorm(model) is model
    after = dict(model.named_modules(remove_duplicate=False))
    assert all(after[name] is module for name, module in before.items())
    assert {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert list(model.state_dict()) == names
    assert type(model.shared) is type(model.parts["a"][0]) is BatchNorm2d
    assert type(model.plain) is BatchNorm1d and type(model.volume) is BatchNorm3d
    assert type(model.instance) is nn.InstanceNorm2d
    assert not model.volume.training and not model.shared.weight.requires_grad
    convert_batchnorm(model)
    assert type(model.shared) is BatchNorm2d


def test_the_model_itself_may_be_the_layer():
    layer = nn.BatchNorm1d(4)
    assert convert_batchnorm(layer) is layer and type(layer) is BatchNorm1d


def test_hooks_survive():
    layer, calls = nn.BatchNorm1d(4), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    convert_batchnorm(layer)(torch.randn(3, 4))
    assert calls == [1]


def test_restore_is_the_inverse():
    model = convert_batchnorm(Odd())
    set_normalization_batch(model, 2)
    assert restore_batchnorm(model) is model
    assert type(model.shared) is nn.BatchNorm2d and type(model.volume) is nn.BatchNorm3d
    assert str(model) == str(Odd())
    tracked = nn.Sequential(nn.BatchNorm1d(2))
    with StatisticsTracker(tracked, {"a": Ema(0.9)}), pytest.raises(UserError, match="close"):
        restore_batchnorm(tracked)


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize(
    "lazy, final, shape",
    [
        (nn.LazyBatchNorm1d, BatchNorm1d, (4, 3)),
        (nn.LazyBatchNorm2d, BatchNorm2d, (4, 3, 2, 2)),
        (nn.LazyBatchNorm3d, BatchNorm3d, (4, 3, 2, 2, 2)),
    ],
)
def test_lazy_layers_become_ours(lazy, final, shape, used_before):
    model, reference = nn.Sequential(lazy(momentum=0.3)), nn.Sequential(lazy(momentum=0.3))
    x = torch.randn(shape)
    if used_before:
        assert torch.equal(model(x), reference(x))
    convert_batchnorm(model)
    assert torch.equal(model(x), reference(x))
    assert type(model[0]) is final
    assert torch.equal(model[0].running_var, reference[0].running_var)


def test_sync_batchnorm_is_refused_and_nothing_converted():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    with pytest.raises(UserError, match=r"'1' is a SyncBatchNorm"):
        convert_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


class BatchNormAndTwice(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_foreign_subclasses_stay_as_they_are():
    model = nn.Sequential(BatchNormAndTwice(3), nn.BatchNorm2d(3))
    reference = copy.deepcopy(model)
    convert_batchnorm(model)
    assert type(model[0]) is BatchNormAndTwice and type(model[1]) is BatchNorm2d
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(model(x), reference(x))


def test_restoring_gives_foreign_subclasses_their_own_class_back():
    model = nn.Sequential(BatchNormAndTwice(3), nn.BatchNorm2d(3))
    freeze_batchnorm(model)
    assert type(model[0]) is not BatchNormAndTwice and isinstance(model[0], BatchNormAndTwice)
    assert type(model[0]).__name__ == "BatchNormAndTwice"
    restore_batchnorm(model)
    assert type(model[0]) is BatchNormAndTwice and type(model[1]) is nn.BatchNorm2d
    assert "frozen" not in vars(model[0])


class OursAndTwice(BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_of_ours_are_followed():
    layer, reference = OursAndTwice(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    with StatisticsTracker(layer, {"a": Ema(0.9)}) as tracker:
        assert torch.equal(layer(x), 2 * reference(x))
        tracker.update()
    assert type(layer) is OursAndTwice
    torch.testing.assert_close(layer.running_var, reference.running_var)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("tracked", [False, True])
def test_torchvision_networks_train_bit_identically(name, tracked):
    build = getattr(torchvision.models, name)
    torch.manual_seed(0)
    reference = build(num_classes=4)
    model = convert_batchnorm(copy.deepcopy(reference))
    for m in (model, reference):
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, reference)]
    tracker = StatisticsTracker(model, {"a": Ema(0.9), "b": Ema(0.5)}) if tracked else None
    if any(m.momentum != 0.1 for m in reference.modules() if isinstance(m, nn.BatchNorm2d)):
        tolerance = None  # its own momentum is not Ema(0.9)
    else:
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if tracked else {"rtol": 0, "atol": 0}
    for _ in range(3):
        x, y = torch.randn(4, 3, 32, 32), torch.randint(4, (4,))
        losses = []
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(m(x), y)
            if m is model and tracker:
                tracker.update()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert torch.equal(*losses)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )
    if tolerance or not tracked:
        torch.testing.assert_close(
            dict(model.named_buffers()),
            dict(reference.named_buffers()),
            **(tolerance or {"rtol": 0, "atol": 0}),
        )


def test_a_converted_network_is_traced_like_torchs():
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    model = convert_batchnorm(resnet18(num_classes=4)).eval()
    x = torch.randn(2, 3, 32, 32)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    assert type(traced.get_submodule("bn1")) is BatchNorm2d
    assert create_feature_extractor(model, ["layer1"])(x)["layer1"].shape == (2, 64, 8, 8)


def test_scripting_a_converted_model_turns_it_back():
    model, reference = convert_batchnorm(Odd()).volume, Odd().volume
    x = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    scripted = torch.jit.script(nn.Sequential(model))
    assert torch.equal(scripted(x), reference(x))
    assert type(model) is nn.BatchNorm3d


@pytest.mark.parametrize("how", ["tracked", "frozen", "ghost batches", "a subclass"])
def test_what_torchscript_cannot_know_is_refused(how):
    model = nn.Sequential(OursAndTwice(2) if how == "a subclass" else nn.BatchNorm2d(2))
    if how == "tracked":
        StatisticsTracker(model, {"a": Ema(0.9)})
    elif how == "frozen":
        freeze_batchnorm(model)
    elif how == "ghost batches":
        set_normalization_batch(model, 4)
    kind = type(model[0])
    with pytest.raises(UserError, match=r"restore_batchnorm\(model\) first"):
        torch.jit.script(model)
    assert type(model[0]) is kind


def test_fuse_modules_works_on_restored_models():
    model = convert_batchnorm(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))).eval()
    x = torch.randn(2, 2, 5, 5)
    expected = model(x)
    fused = torch.ao.quantization.fuse_modules(restore_batchnorm(model), [["0", "1"]])
    torch.testing.assert_close(fused(x), expected)
