"""Weights in whatever shape people save them: found, loaded, and written again."""

import argparse

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnexp.errors import UserError
from bnexp.networks.weights import (
    load_weights,
    match,
    number_of_classes,
    read_checkpoint,
    write_mended,
)
from bnexp.statistics import Statistics, running_statistics


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(1)
    model = Net()
    model(torch.randn(8, 3, 6, 6))
    return model.eval()


def renamed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def lightning(state):
    return {"state_dict": renamed(state, "model.") | {"loss.weight": torch.ones(3)}, "epoch": 3}


SHAPES = {
    "bare": lambda s, net: s,
    "state_dict": lambda s, net: {"epoch": torch.tensor(3), "state_dict": s},
    "model": lambda s, net: {"model": s, "optimizer": {"state": {0: {"m": torch.ones(4)}}}},
    "nested": lambda s, net: {"checkpoint": {"net": s, "step": 3}},
    "DataParallel": lambda s, net: {"state_dict": nn.DataParallel(net).state_dict()},
    "compiled": lambda s, net: renamed(s, "_orig_mod."),
    "compiled under DDP": lambda s, net: renamed(s, "module._orig_mod."),
    "compiled inside": lambda s, net: {
        n.replace("head.", "head._orig_mod."): v for n, v in s.items()
    },
    "Lightning": lambda s, net: lightning(s),
    "AveragedModel": lambda s, net: AveragedModel(net).state_dict(),
    "namespace": lambda s, net: {
        "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "state_dict": s
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_people_save_is_loaded_and_mended(net, tmp_path, shape):
    path, out = tmp_path / "her.ckpt", tmp_path / "mended.ckpt"
    content = SHAPES[shape](net.state_dict(), net)
    torch.save(content, path)
    fresh = Net()
    checkpoint = read_checkpoint(path)
    found = match(checkpoint, fresh)
    load_weights(checkpoint, fresh, found)
    for name, value in net.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name

    other = running_statistics(net)
    other = Statistics(
        {n: m.double() + 1 for n, m in other.mean.items()},
        {n: 2 * v.double() for n, v in other.var.items()},
        other.count,
    )
    before = path.read_bytes()
    write_mended(checkpoint, found, other, out)
    assert path.read_bytes() == before
    mended = torch.load(out, weights_only=False)
    written = Net()
    load_weights(read_checkpoint(out), written, match(read_checkpoint(out), written))
    expected = {**net.state_dict()}
    for layer in other.names:
        expected[f"{layer}.running_mean"] = other.mean[layer].float()
        expected[f"{layer}.running_var"] = other.var[layer].float()
    for name, value in expected.items():
        assert torch.equal(written.state_dict()[name], value), name
    assert_same_but_buffers(torch.load(path, weights_only=False), mended)
    with pytest.raises(UserError, match="exists"):
        write_mended(checkpoint, found, other, out)


def assert_same_but_buffers(a, b, name=""):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            assert_same_but_buffers(a[key], b[key], str(key))
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b) != name.endswith(("running_mean", "running_var"))
    else:
        assert a == b


class Tied(nn.Module):
    """One BN layer in two places, and so under two names in a state_dict."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(2)
        self.second = self.first


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_layer_in_two_places_is_mended_in_both(tmp_path, suffix):
    path, out = tmp_path / f"x.{suffix}", tmp_path / f"out.{suffix}"
    state = Tied().state_dict()
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file({n: v.clone() for n, v in state.items()}, path)
    checkpoint, model = read_checkpoint(path), Tied()
    new = Statistics({"first": torch.ones(2)}, {"first": torch.full((2,), 3.0)}, {"first": 1})
    write_mended(checkpoint, match(checkpoint, model), new, out)
    again = read_checkpoint(out)
    load_weights(again, model, match(again, model))
    assert model.first.running_mean.tolist() == [1, 1], "and the old ones don't come back"
    assert torch.equal(again.content["first.running_var"], again.content["second.running_var"])


def test_what_shared_memory_shares_it_again(net, tmp_path):
    path, out = tmp_path / "x.pt", tmp_path / "out.pt"
    state = net.state_dict()
    other = {n: v + 1 for n, v in state.items()}
    for name in ("bn.running_mean", "bn.running_var"):
        other[name] = state[name]  # averaged weights whose buffers were not copied
    torch.save({"model": state, "best": state, "ema": other}, path)
    checkpoint = read_checkpoint(path)
    new = running_statistics(net)
    new = Statistics({n: v + 5 for n, v in new.mean.items()}, new.var, new.count)
    write_mended(checkpoint, match(checkpoint, Net()), new, out)
    a, b = torch.load(path), torch.load(out)
    assert b["model"] is b["best"] and a["model"] is a["best"]
    assert torch.equal(b["best"]["bn.running_mean"], a["model"]["bn.running_mean"] + 5)
    assert torch.equal(b["ema"]["bn.running_mean"], a["ema"]["bn.running_mean"])


def test_statistics_that_the_dtype_of_the_file_cannot_hold_are_not_written(net, tmp_path):
    path, out = tmp_path / "x.pt", tmp_path / "out.pt"
    torch.save(net.half().state_dict(), path)
    checkpoint, statistics = read_checkpoint(path), running_statistics(net)
    for huge, message in (
        (1e6, r"running_var of BN layer 'bn' is 1e\+06, beyond 65504"),
        (float("inf"), "bn.running_var would not be finite"),
    ):
        var = {n: v.double() * 0 + huge for n, v in statistics.var.items()}
        wrong = Statistics(statistics.mean, var, statistics.count)
        with pytest.raises(UserError, match=message):
            write_mended(checkpoint, match(checkpoint, Net()), wrong, out)
    assert not out.exists()


def test_safetensors_keep_their_metadata(net, tmp_path):
    path, out = tmp_path / "her.safetensors", tmp_path / "mended.safetensors"
    save_file(net.half().state_dict(), path, metadata={"format": "pt", "note": "hers"})
    fresh = Net().half()
    checkpoint = read_checkpoint(path)
    found = match(checkpoint, fresh)
    load_weights(checkpoint, fresh, found)
    assert torch.equal(fresh.conv.weight, net.conv.weight)
    write_mended(checkpoint, found, running_statistics(net), out)
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "hers"}
        assert file.get_tensor("bn.running_var").dtype == torch.float16


def test_the_trained_weights_are_taken_before_averages_and_key_decides(net, tmp_path):
    path = tmp_path / "timm.pth.tar"
    ema = {n: v + 1 if v.is_floating_point() else v for n, v in net.state_dict().items()}
    torch.save({"state_dict_ema": ema, "state_dict": net.state_dict(), "arch": "net"}, path)
    checkpoint, fresh = read_checkpoint(path), Net()
    found = match(checkpoint, fresh)
    assert found.key == "state_dict" and found.others == ("state_dict_ema",)
    assert "'state_dict'" in str(found) and "state_dict_ema" in str(found)
    load_weights(checkpoint, fresh, match(checkpoint, fresh, "state_dict_ema"))
    assert torch.equal(fresh.conv.weight, ema["conv.weight"])
    with pytest.raises(UserError, match="no tensors under 'ema'; there: 'state_dict_ema', "):
        match(checkpoint, fresh, "ema")


def test_the_mapping_that_fits_is_taken_whatever_it_is_called(net, tmp_path):
    torch.save({"model": nn.Linear(2, 2).state_dict(), "gen": net.state_dict()}, tmp_path / "x.pt")
    assert match(read_checkpoint(tmp_path / "x.pt"), Net()).key == "gen"


def test_missing_unexpected_and_misshapen_names_are_listed(net, tmp_path):
    path = tmp_path / "x.pt"
    state = net.state_dict()
    state["extra.weight"] = state.pop("conv.weight")
    torch.save(state, path)
    checkpoint, model = read_checkpoint(path), Net()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(UserError, match=r"lack conv.weight; the file has extra.weight"):
        load_weights(checkpoint, model, match(checkpoint, model))
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    torch.save(net.state_dict(), path)
    model = Net(classes=7)
    checkpoint = read_checkpoint(path)
    found = match(checkpoint, model)
    assert number_of_classes(found) == 3
    with pytest.raises(UserError, match=r"head.2.weight \(3, 5\) for \(7, 5\), head.2.bias"):
        load_weights(checkpoint, model, found)


def test_8_bit_floating_point_weights(net, tmp_path):
    """Which torch can't compare with 0 as they are."""
    state = {n: t.to(torch.float8_e4m3fn) if t.ndim else t for n, t in net.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    checkpoint, model = read_checkpoint(tmp_path / "w.pt"), Net()
    load_weights(checkpoint, model, match(checkpoint, model))
    assert torch.equal(model.bn.running_var, state["bn.running_var"].float())


@pytest.mark.parametrize(
    "name,change,said",
    [
        ("conv.weight", lambda t: (100 * t).to(torch.int8), "conv.weight int8; save them as plain"),
        ("conv.weight", lambda t: t.to_sparse(), "conv.weight float32; save them as plain"),
        ("bn.running_var", lambda t: t - 100, "have negative variances: bn.running_var"),
    ],
)
def test_tensors_that_are_not_what_the_model_computes_with(net, tmp_path, name, change, said):
    state = net.state_dict()
    torch.save({**state, name: change(state[name])}, tmp_path / "w.pt")
    checkpoint, model = read_checkpoint(tmp_path / "w.pt"), Net()
    before = model.conv.weight.clone()
    with pytest.raises(UserError, match=said):
        load_weights(checkpoint, model, match(checkpoint, model))
    assert torch.equal(model.conv.weight, before)


def test_buffers_that_the_file_lacks_are_named_and_can_be_written(net, tmp_path):
    path, out = tmp_path / "x.pt", tmp_path / "out.pt"
    bare = {n: v for n, v in nn.DataParallel(net).state_dict().items() if "running" not in n}
    torch.save(bare, path)
    checkpoint, model = read_checkpoint(path), Net()
    found = match(checkpoint, model)
    assert found.missing == () and found.missing_buffers == ("bn", "head.1")
    load_weights(checkpoint, model, found)
    write_mended(checkpoint, found, running_statistics(net), out)
    written = torch.load(out)
    assert torch.equal(written["module.head.1.running_var"], net.head[1].running_var)


def test_a_flipped_bit_in_a_file_of_weights_is_noticed(net, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(net.state_dict(), path)
    whole = path.read_bytes()
    values = net.conv.weight.detach().numpy().tobytes()
    path.write_bytes(whole.replace(values, bytes([values[0] ^ 64]) + values[1:]))
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)
    old = read_checkpoint(path).content  # a format without checksums
    assert torch.equal(old["conv.weight"], net.conv.weight)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_nothing_finite_becomes_infinite_in_the_buffers_of_a_mended_file(net, tmp_path, suffix):
    path, out = tmp_path / f"x.{suffix}", tmp_path / f"out.{suffix}"
    state = net.half().state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    checkpoint = read_checkpoint(path)
    statistics = running_statistics(Net())
    statistics.var["bn"][1] = 70_000
    with pytest.raises(UserError, match=r"running_var of BN layer 'bn' is 7e\+04, beyond 65504"):
        write_mended(checkpoint, match(checkpoint, Net()), statistics, out)
    assert not out.exists()


def test_files_that_need_code_are_refused_with_what_to_do(net, tmp_path):
    torch.save(net, tmp_path / "whole.pt")
    with pytest.raises(UserError, match=r"hold more than tensors \(.*Net\).*state_dict") as caught:
        read_checkpoint(tmp_path / "whole.pt")
    assert "\n" not in str(caught.value)
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="can't be read"):
        read_checkpoint(tmp_path / "x.pt")
    with pytest.raises(UserError, match="no file"):
        read_checkpoint(tmp_path / "y.pt")
    torch.save({"lr": 0.1}, tmp_path / "z.pt")
    with pytest.raises(UserError, match="no mapping of names to tensors"):
        match(read_checkpoint(tmp_path / "z.pt"), net)
