"""The estimate that an out-of-memory message gives, against memory that a step really takes."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bnexp.device import estimate_step_bytes, resolve_device
from bnexp.errors import UserError, is_out_of_memory
from bnexp.networks import build_model


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage):
        if storage in self._known:
            return
        self._known.add(storage)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size):
        self.held -= size


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shape",
    [
        ("small-cnn", (1, 28, 28)),
        ("resnet20", (3, 32, 32)),
        ("torchvision/resnet18", (3, 64, 64)),
        ("torchvision/mobilenet_v2", (3, 64, 64)),
    ],
)
def test_the_estimate_is_within_a_factor_of_two_of_a_real_step(name, shape):
    channels, *image_size = shape
    model = build_model(name, channels=channels, image_size=tuple(image_size), num_classes=10)
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with PeakMemory() as memory:
        for _ in range(2):
            loss = F.cross_entropy(model(torch.randn(64, *shape)), torch.randint(10, (64,)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    estimate = estimate_step_bytes(model, channels, tuple(image_size), 64)
    measured = weights + memory.peak
    assert measured / 2 < estimate < 2 * measured


def test_the_estimate_allocates_nothing_and_leaves_the_model_alone():
    model = build_model("small-cnn", channels=1, image_size=(28, 28), num_classes=10).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    huge = estimate_step_bytes(model, 1, (28, 28), 10_000_000)
    assert huge > 100 * 2**30
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of range"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    assert resolve_device("auto").type in ("cpu", "mps")
    with pytest.raises(UserError, match="no CUDA device is usable here"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["foo", "meta", "cuda:99999999999999999999", "xpu"])
def test_other_names_are_no_devices(name):
    with pytest.raises(UserError, match=f"'{name}' is no device"):
        resolve_device(name)
