"""References for these tests: nothing in here uses bnexp."""

from __future__ import annotations

import copy
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def take_moments(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """float64 mean and biased variance per channel by numpy, and values per channel."""
    rows = np.moveaxis(x.detach().cpu().double().numpy(), 1, -1).reshape(-1, x.shape[1])
    return rows.mean(0), rows.var(0), len(rows)


@torch.no_grad()
def single_batch(model: nn.Module, run) -> dict[str, list]:
    """One float64 pass with BN in training mode, the rest in inference mode.

    `run(model)` feeds the whole population as a single batch. Returns, per BN layer, the moments
    of each of its calls.
    """
    model = copy.deepcopy(model).double().eval()
    calls: dict[str, list] = {}
    names = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.train()
            names[layer.running_mean.data_ptr()] = name
    batch_norm = nn.functional.batch_norm

    def recording(x, running_mean, *args, **kwargs):
        calls.setdefault(names[running_mean.data_ptr()], []).append(take_moments(x))
        with torch._C.DisableTorchFunction():  # a function mode would call `recording` once more
            return batch_norm(x, running_mean, *args, **kwargs)

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(nn.functional, "batch_norm", recording):
            run(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return calls


def worst_error(found, mean: np.ndarray, var: np.ndarray, name: str) -> float:
    """Largest error of a layer: means in standard deviations, variances relative."""
    scale = var + 1e-8 * var.max() + 1e-12
    mean_error = np.abs(found.mean[name].numpy() - mean) / np.sqrt(scale)
    var_error = np.abs(found.var[name].numpy() - var) / scale
    return float(max(mean_error.max(), var_error.max()))


def snapshot(model: nn.Module) -> dict:
    """All that recomputing must leave alone, to be compared before and after."""
    return {
        "state": {
            name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())
        },
        "training": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "rng": torch.random.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.mha.get_fastpath_enabled(),
            torch.overrides._len_torch_function_stack(),
        ),
    }


def assert_same(before: dict, after: dict) -> None:
    assert before["state"].keys() == after["state"].keys()
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    assert torch.equal(before["rng"], after["rng"])
    assert np.array_equal(before["numpy"], after["numpy"])
    for key in ("training", "attributes", "hooks", "modes"):
        assert before[key] == after[key], key
