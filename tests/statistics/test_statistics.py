from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch import nn

import bnexp
from bnexp.errors import UserError
from bnexp.nn.find import batchnorm_layers
from bnexp.statistics import (
    Statistics,
    recompute_statistics,
    running_statistics,
)


def model_with(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, **options),
        nn.Flatten(),
        nn.Linear(16, 5),
        bnexp.BatchNorm1d(5, **options),
    )


def some(seed: int = 1, dtype=torch.float64) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"1": 4, "4": 5}
    return Statistics(
        {n: torch.randn(c, generator=generator, dtype=dtype) for n, c in sizes.items()},
        {n: torch.rand(c, generator=generator, dtype=dtype) for n, c in sizes.items()},
        {"1": 7, "4": 8},
    )


def buffers(model: nn.Module) -> dict:
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_layers_of_torch_and_ours_shared_ones_once():
    shared = nn.BatchNorm1d(2)
    model = nn.ModuleDict(
        {
            "a": shared,
            "b": nn.Sequential(bnexp.BatchNorm3d(3), shared),
            "c": nn.InstanceNorm1d(2),
            "d": nn.SyncBatchNorm(2),
        }
    )
    assert list(batchnorm_layers(model)) == ["a", "b.0", "d"]


def test_lazy_and_scripted_layers_are_refused():
    with pytest.raises(UserError, match="'0' is lazy"):
        batchnorm_layers(nn.Sequential(nn.LazyBatchNorm1d()))
    with pytest.raises(UserError, match="TorchScript"):
        batchnorm_layers(torch.jit.script(nn.Sequential(nn.BatchNorm1d(2))))


def test_names_do_not_depend_on_compiling():
    model = model_with()
    assert list(batchnorm_layers(torch.compile(model))) == ["1", "4"]


def test_running_statistics_are_copies_and_round_trip_exactly():
    model = model_with().train()
    model(torch.randn(6, 3, 4, 4))
    before = buffers(model)
    found = running_statistics(model)
    assert found.count == {"1": 1, "4": 1}
    assert torch.equal(found.mean["1"], model[1].running_mean)
    found.mean["1"].add_(1)
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    found.mean["1"].copy_(before["1.running_mean"])
    some().copy_to(model)
    found.copy_to(model)
    for name, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_copy_to_writes_in_place_and_leaves_the_counter():
    model = model_with()
    view = model[1].running_mean
    some().copy_to(model)
    assert model[1].running_mean is view
    assert torch.equal(view, some().mean["1"].float())
    assert torch.equal(model[4].running_var, some().var["4"].float())
    assert model[1].num_batches_tracked == 0


def test_copy_to_serves_some_of_the_layers():
    model = model_with()
    part = Statistics({"4": some().mean["4"]}, {"4": some().var["4"]}, {"4": 1})
    part.copy_to(model)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert torch.equal(model[4].running_mean, some().mean["4"].float())


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [("9", 4, "no BN layer '9'"), ("4", 6, "'4' has 5 channels, its statistics have 6")],
)
def test_nothing_is_written_if_anything_does_not_fit(name, channels, message):
    model = model_with()
    before = buffers(model)
    statistics = some()
    for values in (statistics.mean, statistics.var):
        values[name] = torch.ones(channels)
    statistics.count[name] = 1
    with pytest.raises(UserError, match=message):
        statistics.copy_to(model)
    with pytest.raises(UserError, match=message), statistics.applied_to(model):
        pass
    for key, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[key])


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_applied_to_restores_bit_for_bit(error):
    model = model_with().eval()
    model[1].running_mean.fill_(float("nan"))
    model[1].running_var[0] = 1e-42
    before, view = buffers(model), model[1].running_mean
    x = torch.randn(2, 3, 4, 4)
    try:
        with some().applied_to(model) as applied:
            assert applied is model
            inside = model[1](model[0](x))
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error
    statistics = some()
    expected = torch.nn.functional.batch_norm(
        model[0](x),
        statistics.mean["1"].float(),
        statistics.var["1"].float(),
        model[1].weight,
        model[1].bias,
        False,
        0.0,
        1e-5,
    )
    assert torch.equal(inside, expected)
    assert model[1].running_mean is view
    for name, tensor in before.items():
        now = model.state_dict()[name]
        assert torch.equal(
            tensor.view(torch.uint8) if tensor.dim() else tensor,
            now.view(torch.uint8) if now.dim() else now,
        ), name


def test_layers_without_running_statistics():
    model = model_with(track_running_stats=False).eval()
    assert len(running_statistics(model)) == 0
    with pytest.raises(UserError, match="track_running_stats=False"):
        some().copy_to(model)
    x = torch.randn(2, 3, 4, 4)
    with some().applied_to(model):
        inside = model[1](x.new_ones(1, 4, 2, 2))
    expected = (1 - some().mean["1"]) / (some().var["1"] + 1e-5).sqrt()
    assert torch.allclose(inside[0, :, 0, 0].double(), expected, rtol=1e-5)
    assert model[1].running_mean is None
    assert "1.running_mean" not in model.state_dict()


def test_a_tracker_is_up_to_date_before_buffers_are_read_or_lent():
    model = bnexp.convert_batchnorm(model_with()).train()
    plain = model_with().train()
    tracker = bnexp.StatisticsTracker(model, {"ema": bnexp.Ema(0.9)})
    x = torch.randn(6, 3, 4, 4)
    model(x)
    plain(x)
    with some().applied_to(model):
        model.eval()(x)
        assert torch.equal(model[1].running_mean, some().mean["1"].float())
    assert torch.allclose(model[1].running_mean, plain[1].running_mean)
    assert torch.allclose(running_statistics(model).var["4"], plain[4].running_var)
    tracker.close()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.ones(4, dtype=torch.int64), "torch.int64"),
        (torch.ones(4, dtype=torch.complex64), "torch.complex64"),
        ([1.0] * 4, "list"),
    ],
)
def test_means_and_variances_are_floating_tensors(value, kind):
    for mean, var in ((value, torch.ones(4)), (torch.ones(4), value)):
        with pytest.raises(UserError, match=f"'1': mean and var must be floating .*not {kind}"):
            Statistics({"1": mean}, {"1": var}, {"1": 1})


def test_save_and_load(tmp_path):
    path = tmp_path / "a.pt"
    some().save(path)
    some(seed=2).save(path)
    loaded = Statistics.load(path)
    assert loaded.names == ("1", "4")
    assert loaded.count == {"1": 7, "4": 8}
    for name in loaded.names:
        assert torch.equal(loaded.mean[name], some(seed=2).mean[name])
        assert torch.equal(loaded.var[name], some(seed=2).var[name])
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_flipped_bit_in_a_file_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "a.pt"
    some().save(path)
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            found = Statistics.load(path)
        except UserError:
            refused += 1
            continue
        for name in some().names:
            assert torch.equal(found.mean[name], some().mean[name]), position
            assert torch.equal(found.var[name], some().var[name]), position
        assert found.count == some().count
    assert refused > len(whole) / 10


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.pt"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="no ordinary file"):
        Statistics.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    some().save(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        some(seed=2).save(path)
    assert torch.equal(Statistics.load(path).mean["1"], some().mean["1"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class Exploit:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BNEXP_TEST_EXPLOIT"],))


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "folder",
        "empty",
        "truncated",
        "flipped",
        "text",
        "foreign",
        "version",
        "shapes",
        "pickle",
        "exploit",
    ],
)
def test_load_refuses_what_is_not_statistics(tmp_path, monkeypatch, kind):
    path, trap = tmp_path / "a.pt", tmp_path / "trap"
    monkeypatch.setenv("BNEXP_TEST_EXPLOIT", str(trap))
    some().save(path)
    data = path.read_bytes()
    content = {"format": "bnexp.Statistics", "version": 1, "count": {"a": 1}}
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        path.write_bytes(data[:200] + bytes(b ^ 255 for b in data[200:300]) + data[300:])
    elif kind == "text":
        path.write_text("mean: 1")
    elif kind == "foreign":
        torch.save(model_with().state_dict(), path)
    elif kind == "version":
        torch.save({**content, "version": 99, "mean": {}, "var": {}}, path)
    elif kind == "shapes":
        torch.save({**content, "mean": {"a": torch.ones(2)}, "var": {"a": torch.ones(3)}}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Exploit()))
    elif kind == "exploit":
        torch.save({**content, "mean": Exploit(), "var": {}}, path)
    with pytest.raises(UserError, match="statistics file") as caught:
        Statistics.load(path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_inconsistent_statistics_cannot_be_made():
    with pytest.raises(UserError, match="different layers"):
        Statistics({"a": torch.ones(1)}, {}, {})
    with pytest.raises(UserError, match="shape"):
        Statistics({"a": torch.ones(1)}, {"a": torch.ones(2)}, {"a": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_without_weights_are_lent_buffers_of_the_models_dtype(dtype):
    torch.manual_seed(0)
    bare = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
    model, x = (
        nn.Sequential(nn.Linear(3, 4), bare).to(dtype).eval(),
        torch.randn(50, 3, dtype=dtype),
    )
    found = recompute_statistics(model, [x])
    with found.applied_to(model), torch.no_grad():
        y = model(x)
    assert y.dtype == dtype and bare.running_mean is None
    assert torch.allclose(y.mean(0), torch.zeros(4, dtype=dtype), atol=1e-5)
    assert torch.allclose(y.var(0, correction=0), torch.ones(4, dtype=dtype), atol=1e-3)


def test_nothing_finite_becomes_infinite_in_half_precision_buffers():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).half())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    wide = Statistics(
        {"0": torch.zeros(2).double(), "1": torch.zeros(2).double()},
        {"0": torch.tensor([1e5, 1.0]).double(), "1": torch.tensor([1.0, 98765.0]).double()},
        {"0": 1, "1": 1},
    )
    message = (
        "variance of BN layer '1' is 9.876e\\+04, beyond 65504.*float16 buffer: keep BN layers"
    )
    with pytest.raises(UserError, match=message):
        wide.copy_to(model)
    with pytest.raises(UserError, match=message), wide.applied_to(model):
        pass
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.float()
    wide.copy_to(model)
    assert model[1].running_var[1] == 98765
    wide.mean["0"][0] = 1e39
    message = "mean of BN layer '0' is 1e\\+39, .* its float32 buffer$"
    with pytest.raises(UserError, match=message):
        wide.copy_to(model)
    wide.mean["0"][0] = torch.inf  # is no more than it was
    wide.copy_to(model)


def test_variances_that_torch_has_left_infinite_in_half_precision_are_named():
    layer = nn.BatchNorm1d(1).half()
    layer((torch.tensor([[-40_000.0], [40_000.0]])).half())
    with pytest.warns(UserWarning, match="'' has variances that are not finite in its float16"):
        assert running_statistics(layer).var[""].isinf().all()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_prefixes_of_wrapped_models_are_named(wrap):
    model = model_with()
    with pytest.raises(UserError, match=r"it is wrapped .*use the model inside, `\.module`"):
        running_statistics(model).copy_to(wrap(model))
    with pytest.raises(UserError, match=r"of a wrapped model .*take them from the model inside"):
        running_statistics(wrap(model)).copy_to(model)
