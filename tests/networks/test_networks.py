"""Networks by name: sizes by hand, torchvision's as torchvision builds them, and refusals."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnexp.errors import UserError
from bnexp.networks import MODELS, build_model
from bnexp.nn.batchnorm import BatchNorm1d, BatchNorm2d

SHAPES = [(1, (8, 8)), (1, (28, 28)), (3, (32, 32)), (3, (9, 21))]


def build(name, channels=3, image_size=(32, 32), num_classes=10, **keys):
    return build_model(
        name, channels=channels, image_size=image_size, num_classes=num_classes, **keys
    )


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("channels,image_size", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_ours_take_every_shape_and_learn_in_every_layer(name, channels, image_size, norm):
    torch.manual_seed(0)
    model = build(name, channels, image_size, 7, norm=norm)
    x = torch.randn(6, channels, *image_size).contiguous(memory_format=torch.channels_last)
    logits = model(x)
    assert logits.shape == (6, 7) and logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.arange(6)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert all(type(layer) in (BatchNorm1d, BatchNorm2d) for layer in layers)
    assert bool(layers) == (norm == "batch")


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_has_a_bias_exactly_where_no_normalization_follows(name):
    normalized, plain = build(name), build(name, norm="none")
    weighted = [n for n, m in normalized.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(plain.get_submodule(n).bias is not None for n in weighted)
    assert [n for n in weighted if normalized.get_submodule(n).bias is not None] == weighted[-1:]


def test_layer_names():
    names = {
        name: [n for n, m in build(name).named_modules() if isinstance(m, _BatchNorm)]
        for name in MODELS
    }
    assert names["mlp"] == names["small-cnn"] == ["bn1", "bn2", "bn3"]
    assert len(names["resnet20"]) == 19 and names["resnet20"][-1] == "layer3.2.bn2"


def test_parameters_of_the_mlp():
    assert parameters(build("mlp", 1, (28, 28))) == 784 * 100 + 2 * 100 * 100 + 3 * 200 + 1010


def test_parameters_of_the_small_cnn():
    convolutions = 9 * 32 + 9 * 32 * 64 + 2 * (32 + 64)
    for channels, size, flat in [(1, 28, 64 * 49), (1, 8, 64 * 4)]:
        expected = convolutions + flat * 128 + 2 * 128 + 128 * 10 + 10
        assert parameters(build("small-cnn", channels, (size, size))) == expected


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_small_cnn_is_bit_for_bit_the_one_that_rectifies_before_it_pools(norm):
    model = build("small-cnn", 1, (28, 28), norm=norm)
    names = (
        "conv1",
        "bn1",
        "relu1",
        "pool1",
        "conv2",
        "bn2",
        "relu2",
        "pool2",
        "flatten",
        "fc1",
        "bn3",
        "relu3",
        "fc2",
    )
    usual = nn.Sequential(OrderedDict((name, _layer(model, name)) for name in names))
    x = torch.randn(16, 1, 28, 28).round(decimals=1)  # ties, too
    y = torch.arange(16) % 10
    results = []
    for network in (model, usual):
        loss = nn.functional.cross_entropy(network(x), y)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _layer(model, name):
    made = {"relu": nn.ReLU(), "pool": nn.MaxPool2d(2), "flat": nn.Flatten()}
    return made.get(name[:4]) or getattr(model, name)


def test_parameters_of_resnet20():
    """Sums by hand for the layout of the paper; the paper's own table says 0.27 million."""
    convolutions = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    normalization = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert parameters(build("resnet20")) == convolutions + normalization + 650 == 269_722


def test_resnet20_shortcuts_carry_the_input_without_parameters():
    """With the last BN of a block at zero, only the shortcut is left."""
    model = build("resnet20").eval()
    block = model.layer2[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 10, 10)
    y = block(x)
    assert y.shape == (2, 32, 5, 5)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().sum() == y[:, 24:].abs().sum() == 0


def test_initialization():
    torch.manual_seed(0)
    mlp, resnet = build("mlp", 1, (28, 28)), build("resnet20")
    assert mlp.fc1.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(mlp.fc1.weight.mean().item()) < 0.002
    conv = resnet.layer3[2].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "torchvision/resnet18"])
def test_the_global_seed_decides_the_weights(name):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in build(name).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", MODELS)
def test_eps(name):
    layers = [m for m in build(name, eps=1e-3).modules() if isinstance(m, _BatchNorm)]
    assert {layer.eps for layer in layers} == {1e-3}


# --------------------------------------------------------------------------------- torchvision


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvisions_networks_are_torchvisions_with_our_layers(name):
    torch.manual_seed(3)
    ours = build(f"torchvision/{name}", num_classes=5).eval()
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(name, num_classes=5).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    layers = [m for m in ours.modules() if isinstance(m, _BatchNorm)]
    assert layers and all(type(layer) is BatchNorm2d for layer in layers)
    assert ours.train().training and all(m.training for m in ours.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "squeezenet1_1", "vit_b_32"])
@pytest.mark.parametrize("channels", [1, 4])
def test_channels_are_adapted(name, channels):
    model = build(f"torchvision/{name}", channels, (32, 32), 6)
    logits = model(torch.randn(2, channels, 32, 32))
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 6)


def test_building_leaves_modules_in_training_mode():
    assert all(m.training for m in build("torchvision/resnet18").modules())


def test_torchvisions_eps_stays_unless_another_is_asked_for():
    def eps(**keys):
        model = build("torchvision/mobilenet_v3_small", **keys)
        return {m.eps for m in model.modules() if isinstance(m, _BatchNorm)}

    assert eps() == {0.001}
    assert eps(eps=0.01) == {0.01}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,size",
    [
        ("inception_v3", (32, 32)),
        ("vgg11_bn", (16, 16)),
        ("vit_b_16", (20, 20)),
        ("maxvit_t", (32, 32)),
        ("vit_b_16", (16, 32)),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(name, size):
    with pytest.raises(UserError, match=rf"torchvision/{name} can't take images of {size[1]}x"):
        build(f"torchvision/{name}", image_size=size)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "wrong,near",
    [
        ("small_cnn", "small-cnn"),
        ("resnet-20", "resnet20"),
        ("resnet18", "torchvision/resnet18"),
        ("torchvision/mobilenetv2", "torchvision/mobilenet_v2"),
        ("torchvision/resnet20", "resnet20"),
    ],
)
def test_wrong_names_meet_the_nearest_real_ones(wrong, near):
    with pytest.raises(UserError, match=rf"no model is called '{wrong}'; did you mean {near}\b"):
        build(wrong)


def test_a_name_like_no_other_meets_the_list():
    with pytest.raises(UserError, match=r"there are mlp, small-cnn, resnet20 and torchvision/"):
        build("zzzzzzz")


def test_norm_none_is_for_ours():
    with pytest.raises(UserError, match=r"norm: none is for mlp, small-cnn, resnet20"):
        build("torchvision/resnet18", norm="none")


def test_images_too_small_for_the_small_cnn():
    with pytest.raises(UserError, match=r"at least 4x4 pixels, not 9x3"):
        build("small-cnn", image_size=(3, 9))


def test_our_networks_need_no_torchvision():
    program = (
        "import sys; from bnexp.networks import build_model;"
        "build_model('resnet20', channels=3, image_size=(8, 8), num_classes=2);"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
