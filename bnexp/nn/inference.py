"""Inference that leaves no trace: every module in inference mode, all of it put back at the end."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import random
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from bnexp.torch_internals import BatchNormBase, without_function_modes
from bnexp.torch_internals import version as version_of


@contextlib.contextmanager
def inference(model: nn.Module, parameters: bool = False) -> Iterator[ModelState]:
    """Inference mode for all modules of `model`, without gradients.

    Gives what the modules hold then. On exit, also after an exception, that, the training flags
    and the states of the random generators are as before. Training flags are set directly: a
    module whose `train()` does more than that doesn't see it called. `parameters` as in
    `ModelState`: for passes that are cut short, and can't put back what they have set.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_states_kept(model))
        # The fused encoder layer takes any norm1 and norm2 for LayerNorm.
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        training = {module: module.training for module in model.modules()}
        stack.callback(_set_training, training)
        _set_training(dict.fromkeys(training, False))
        given = ModelState(model, parameters)
        stack.callback(given.restore)
        stack.enter_context(torch.no_grad())
        yield given


def _set_training(flags: dict[nn.Module, bool]) -> None:
    for module, flag in flags.items():
        module.training = flag


def eagerly() -> contextlib.AbstractContextManager:
    """Compiled code does not run: it has the BN layers' own forward built in."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@contextlib.contextmanager
def random_states_kept(model: nn.Module) -> Iterator[None]:
    """The random generators of torch (on the model's devices too), numpy and Python."""
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type != "cpu"}
    with contextlib.ExitStack() as stack:
        for kind in sorted({d.type for d in devices} & {"cuda", "xpu"}):
            indices = [d.index or 0 for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.callback(random.setstate, random.getstate())
        if (numpy_random := sys.modules.get("numpy.random")) is not None:
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        yield


def readers_of_random_states(model: nn.Module) -> list[Callable[[], object]]:
    """For each of these generators a function that gives its state, to be compared."""

    def read_numpy() -> object:
        state: Any = np.random.get_state()
        kind, keys, *rest = state
        return kind, keys.tobytes(), *rest

    def read_torch(state: Callable[[], Tensor]) -> object:
        return state().numpy().tobytes()

    readers: list[Callable[[], object]] = [
        functools.partial(read_torch, torch.get_rng_state),
        random.getstate,
        read_numpy,
    ]
    for device in {t.device for t in (*model.parameters(), *model.buffers())}:
        if device.type in ("cuda", "xpu"):
            read = functools.partial(getattr(torch, device.type).get_rng_state, device)
            readers.append(functools.partial(read_torch, read))
    return readers


# What every module has: training flag, parameters, buffers, submodules, hooks.
_OF_ALL_MODULES = vars(nn.Module()).keys()
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class ModelState:
    """What the modules of a model hold: their attributes, and what is in dicts, lists and sets
    among these (parameters, buffers, submodules, hooks); of buffers the values, too, and with
    `parameters` of these. And the attributes of their classes, and torch's functions.

    Not what other objects hold. Of BN layers, whose statistics belong to whoever exchanges them,
    only what all modules have, without buffers.
    """

    def __init__(self, model: nn.Module, parameters: bool = False) -> None:
        self._held: list[_Held] = []
        # Most are empty (hooks), and are dealt with together.
        self._empty: list[Any] = []
        self._names_of_empty: list[str] = []
        self._seen: set[int] = set()
        self._tensors: list[_HeldTensor] = []
        for name, hooks in vars(torch_module).items():
            if name.startswith("_global_"):
                self._hold(hooks, f"{name!r} of torch.nn")
        self._held.append(_Held(vars(F), "of torch.nn.functional"))
        classes = {base for module in model.modules() for base in type(module).__mro__}
        for base in classes:
            if base is not object and not base.__module__.startswith("torch."):
                self._held.append(_Held(vars(base), f"of class {base.__name__}", owner=base))
        for name, module in model.named_modules():
            of = f"{type(module).__name__} {name!r}" if name else "the model"
            attributes = vars(module)
            keys = None
            if isinstance(module, BatchNormBase):
                keys = [key for key in attributes if key in _OF_ALL_MODULES and key != "_buffers"]
            self._held.append(_Held(attributes, f"of {of}", keys))
            for key in attributes if keys is None else keys:
                self._hold(attributes[key], f"in {key!r} of {of}")
            for key, tensor in module._parameters.items():
                self._watch(tensor, f"values of {key!r} of {of}", copy=parameters)
            for key, tensor in module._buffers.items() if keys is None else ():
                self._watch(tensor, f"values of {key!r} of {of}", copy=True)
        self._glance = _Glance(self._held, self._tensors)

    def _hold(self, value: Any, where: str, depth: int = 2) -> None:
        """`value` and the containers inside it, if it is a container."""
        if type(value) not in _CONTAINERS or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if not value:
            self._empty.append(value)
            self._names_of_empty.append(where)
            return
        self._held.append(_Held(value, where))
        for item in (value.values() if isinstance(value, dict) else value) if depth else ():
            self._hold(item, where, depth - 1)

    def _watch(self, tensor: Tensor | None, where: str, copy: bool) -> None:
        if tensor is not None and not tensor.is_inference():
            self._tensors.append(_HeldTensor(tensor, where, copy))

    def change(self) -> str | None:
        """The first difference found from the time this was made; None where there is none."""
        if any(self._empty):
            return f"items {self._names_of_empty[[*map(bool, self._empty)].index(True)]}"
        with without_function_modes():  # they would be asked about each tensor
            if self._glance.is_untouched():
                return None
            for held in self._held:
                if (key := held.difference()) is not None:
                    return f"{key} {held.where}"
            return next((held.where for held in self._tensors if held.is_changed()), None)

    def restore(self, unseen: bool = True) -> None:
        """Put back what differs. Without `unseen`, not what was written past the tensors' versions
        (through `.data`): each value would have to be looked at."""
        for held in self._held:
            held.restore()
        for container in self._empty:
            container.clear()
        for tensor in self._tensors:
            if unseen or tensor.is_changed():
                tensor.restore()


class _HeldTensor:
    """A tensor and what its values were, if they are kept; `.data` may be exchanged or written,
    which its version doesn't tell."""

    __slots__ = ("_data", "_value", "memory", "tensor", "version", "where")

    def __init__(self, tensor: Tensor, where: str, copy: bool) -> None:
        self.where = where
        self.tensor, self.version, self.memory = tensor, version_of(tensor), _memory_of(tensor)
        self._value = tensor.detach().clone() if copy else None
        self._data = tensor.data

    def is_changed(self) -> bool:
        tensor = self.tensor
        return version_of(tensor) != self.version or _memory_of(tensor) != self.memory

    def restore(self) -> None:
        if self._value is None or self._data is None:
            return
        if _memory_of(self.tensor) != self.memory:
            self.tensor.data = self._data
        unseen = self.memory and not torch.equal(self.tensor, self._value)
        if unseen or version_of(self.tensor) != self.version:
            with torch.no_grad():
                self.tensor.copy_(self._value)


class _Glance:
    """Whether all of what is held is untouched, without a Python call for each: a model has some
    thousand attributes, and each BN layer asks."""

    def __init__(self, held: list[_Held], tensors: list[_HeldTensor]) -> None:
        dicts = [h for h in held if isinstance(h.now, dict)]
        self._others = [h for h in held if not isinstance(h.now, dict)]
        self._whole = [h.now for h in dicts if h.whole]
        self._lengths = [len(h.then) for h in dicts if h.whole]
        items = [(h.now, key, value) for h in dicts for key, value in h.then.items()]
        self._of = [of for of, _, _ in items]
        self._keys = [key for _, key, _ in items]
        self._values = [value for _, _, value in items]
        plain = [t for t in tensors if t.memory]
        self._plain, self._memory = [t.tensor for t in plain], [t.memory for t in plain]
        self._without = [t for t in tensors if not t.memory]
        self._all, self._versions = [t.tensor for t in tensors], [t.version for t in tensors]

    def is_untouched(self) -> bool:
        items = self._of, self._keys, itertools.repeat(_MISSING)
        return (
            [*map(len, self._whole)] == self._lengths
            and all(map(operator.is_, map(dict.get, *items), self._values))
            and [*map(version_of, self._all)] == self._versions
            and [t.data_ptr() for t in self._plain] == self._memory
            and not any(t.is_changed() for t in self._without)
            and all(h.untouched() for h in self._others)
        )


def _memory_of(tensor: Tensor) -> int:
    """Where a tensor's values are; 0 where it has none, or is of a kind that may not tell."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.data_ptr() if plain else 0


class _Held:
    """A dict, list or set and what was in it; of a dict, only `keys` where they are given. Of a
    class, its `owner`, the dict can be read only."""

    __slots__ = ("_owner", "now", "then", "where", "whole")

    def __init__(
        self, container: Any, where: str, keys: list | None = None, owner: type | None = None
    ) -> None:
        self.where = where
        self._owner = owner
        self.now = container
        self.then = container.copy() if keys is None else {key: container[key] for key in keys}
        self.whole = keys is None

    def untouched(self) -> bool:
        now, then = self.now, self.then
        if isinstance(then, set):
            return now == then
        if self.whole and len(now) != len(then):
            return False
        if isinstance(then, list):
            return all(map(operator.is_, now, then))
        found = map(now.get, then, itertools.repeat(_MISSING))
        return all(map(operator.is_, found, then.values()))

    def difference(self) -> str | None:
        """What differs: a key of a dict, "items" of a list or set."""
        if self.untouched():
            return None
        now, then = self.now, self.then
        if isinstance(then, dict):
            for key in {**then, **now} if self.whole else then:
                if key not in now or key not in then or not _same(now[key], then[key]):
                    return repr(key)
            return None
        if isinstance(then, list) and len(now) == len(then) and all(map(_same, now, then)):
            return None
        return "items"

    def restore(self) -> None:
        if self.untouched():
            return
        if isinstance(self.then, list):
            self.now[:] = self.then
            return
        if self._owner is not None:
            for key in [key for key in self.now if key not in self.then]:
                delattr(self._owner, key)
            for key, value in self.then.items():
                if self.now.get(key) is not value:
                    setattr(self._owner, key, value)
            return
        if self.whole:
            self.now.clear()
        self.now.update(self.then)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one object, or equal plain values or tensors (no parameters)."""
    if a is b or type(a) is not type(b):
        return a is b
    if type(a) is Tensor:
        alike = (a.shape, a.dtype, a.device, a.layout) == (b.shape, b.dtype, b.device, b.layout)
        return alike and torch.equal(a, b)
    if type(a) is tuple:
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) in _PLAIN and a == b
