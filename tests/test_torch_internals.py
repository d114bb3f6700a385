"""Each private name of torch that bnexp uses is still there and does what it is used for."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnexp.torch_internals import (
    BatchNormBase,
    has_hooks,
    in_backward,
    is_lazy,
    original_module,
    outside_of_graphs,
    version,
)


def test_the_base_of_all_batch_normalization_and_of_nothing_else():
    for kind in (nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LazyBatchNorm2d):
        assert issubclass(kind, BatchNormBase)
    for kind in (nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm):
        assert not issubclass(kind, BatchNormBase)
    assert BatchNormBase.forward is nn.BatchNorm1d.forward is nn.BatchNorm2d.forward


def test_original_module():
    model = nn.Sequential(nn.Linear(2, 2))
    assert original_module(torch.compile(model, backend="eager")) is model
    assert original_module(model) is model


def test_in_backward_is_true_in_repeated_forward_passes_alone():
    seen = []

    def forward(x):
        seen.append(in_backward())
        return x.sin()

    for reentrant in (True, False):
        x = torch.ones(2, requires_grad=True)
        checkpoint(forward, x, use_reentrant=reentrant).sum().backward()
    assert seen == [False, True, False, True]
    assert not in_backward()


def test_outside_of_graphs():
    traced = []

    @outside_of_graphs
    def outside():
        traced.append(torch.compiler.is_compiling())

    def step(x):
        traced.append(torch.compiler.is_compiling())
        outside()
        return x + 1

    assert torch.equal(torch.compile(step, backend="eager")(torch.ones(2)), torch.full((2,), 2.0))
    assert False in traced


def test_version_counts_writes_through_views_but_not_through_data():
    tensor = torch.zeros(4)
    view, apart = tensor[:2], tensor.data
    before = version(tensor), version(apart)
    view.add_(1)
    assert version(tensor) > before[0] and version(apart) == before[1]
    apart.add_(1)
    assert version(apart) > before[1]


def test_has_hooks():
    layer = nn.Linear(2, 2)
    assert not has_hooks(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert has_hooks(layer)
        handle.remove()
        assert not has_hooks(layer)


def test_is_lazy():
    lazy = nn.LazyBatchNorm1d()
    assert is_lazy(lazy.weight) and is_lazy(lazy.running_mean)
    lazy(torch.ones(3, 2))
    assert not is_lazy(lazy.weight) and not is_lazy(lazy.running_mean)


def test_what_layers_override_is_called_by_torch():
    called = []

    class Layer(nn.BatchNorm1d):
        def _check_input_dim(self, input):
            called.append("_check_input_dim")

        def _apply(self, fn, recurse=True):
            called.append("_apply")
            return super()._apply(fn, recurse)

        def _load_from_state_dict(self, *args):
            called.append("_load_from_state_dict")
            super()._load_from_state_dict(*args)

        def _save_to_state_dict(self, *args):
            called.append("_save_to_state_dict")
            super()._save_to_state_dict(*args)

    layer = Layer(2)
    layer(torch.ones(3, 2))
    layer.double().load_state_dict(layer.state_dict())
    assert called == [
        "_check_input_dim",
        "_apply",
        "_save_to_state_dict",
        "_load_from_state_dict",
    ]
    assert set(layer._buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    assert set(layer._parameters) == {"weight", "bias"}
