"""torch's private names still do what bnexp takes them for."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bnexp import torch_internals as internals


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

    with Mode() as mode:
        assert internals.function_modes() == 1
        torch.zeros(1)
        assert mode.calls == 1
        assert internals.pop_function_mode() is mode
        torch.zeros(1)
        assert (mode.calls, internals.function_modes()) == (1, 0)
        internals.push_function_mode(mode)
        torch.zeros(1)
        assert mode.calls == 2
    assert internals.function_modes() == 0


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
