"""Each private name of torch that bnexp uses is still there and does what it is used for."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bnexp import torch_internals as internals
from bnexp.torch_internals import (
    BatchNormBase,
    has_hooks,
    in_backward,
    in_transform,
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


class Counting:
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_function_modes_are_taken_off_and_put_on():
    class Mode(Counting, TorchFunctionMode):
        pass

    with Mode() as outer, Mode() as mode:
        assert internals.function_modes() == (outer, mode)
        torch.zeros(1)
        assert (outer.calls, mode.calls) == (1, 1)
        internals.set_function_modes((outer,))
        torch.zeros(1)
        assert (outer.calls, mode.calls, internals.function_modes()) == (2, 1, (outer,))
        internals.set_function_modes((outer, mode))
        torch.zeros(1)
        assert (outer.calls, mode.calls) == (3, 2)
    assert internals.function_modes() == ()


def test_without_function_modes_none_is_asked():
    class Mode(Counting, TorchFunctionMode):
        pass

    with Mode() as mode, internals.without_function_modes():
        torch.zeros(1).data_ptr()
    assert mode.calls == 0


def test_the_default_device_is_put_back():
    before = internals.default_device()
    assert before == (None, None)
    torch.set_default_device("meta")
    modes, found = internals.function_modes(), internals.default_device()
    assert modes == (found[0],)
    internals.set_function_modes(())
    internals.put_back_default_device(before)
    assert torch.zeros(1).device == torch.get_default_device() == torch.device("cpu")
    internals.set_function_modes(modes)
    internals.put_back_default_device(found)
    assert torch.zeros(1).is_meta and torch.get_default_device().type == "meta"
    torch.set_default_device(None)
    assert (internals.function_modes(), internals.default_device()) == ((), (None, None))


def test_dispatch_modes_are_taken_off_and_put_on():
    class Mode(Counting, TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls):
            return False

    with Mode() as mode:
        assert internals.dispatch_modes() == 1
        torch.zeros(1)
        before = mode.calls
        assert before
        assert internals.pop_dispatch_mode() is mode
        torch.zeros(1)
        assert (mode.calls, internals.dispatch_modes()) == (before, 0)
        internals.push_dispatch_mode(mode)
        torch.zeros(1)
        assert mode.calls > before
    assert internals.dispatch_modes() == 0


def test_saved_tensor_hooks_are_taken_off_and_put_on():
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    def square():
        return torch.ones(2, requires_grad=True).exp()

    assert internals.saved_tensor_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hooks = internals.saved_tensor_hooks()
        assert hooks is not None and hooks[0] is pack
        internals.pop_saved_tensor_hooks()
        assert internals.saved_tensor_hooks() is None
        square()
        assert not saved
        internals.push_saved_tensor_hooks(hooks)
        square()
        assert len(saved) == 1
    assert internals.saved_tensor_hooks() is None


def test_storages_are_told_apart():
    x, y = torch.zeros(4), torch.zeros(4)
    assert internals.storage_key(x[1:].untyped_storage()) == internals.storage_key(
        x.untyped_storage()
    )
    assert internals.storage_key(x.untyped_storage()) != internals.storage_key(y.untyped_storage())


def test_the_order_of_attention_kernels():
    order = internals.attention_order()
    internals.set_attention_order(order[::-1])
    assert internals.attention_order() == order[::-1]
    internals.set_attention_order(order)
    assert internals.attention_order() == order


def test_in_transform():
    seen = []

    def forward(x):
        seen.append(in_transform(x))
        return x.sum()

    x = torch.ones(2, 3)
    forward(x)
    torch.vmap(forward)(x)
    torch.func.grad(forward)(x)
    assert seen == [False, True, True]


def test_the_timeout_of_a_process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=37),
    )
    try:
        group = torch.distributed.group.WORLD
        assert internals.timeout_of(group) == timedelta(seconds=37)
    finally:
        torch.distributed.destroy_process_group()
