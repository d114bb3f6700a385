from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnexp.statistics.moments import Moments, moments

SHAPES = [(17, 5), (20_000, 8), (128, 32, 28, 28), (6, 3, 50), (3, 4, 5, 6, 7), (2, 2048, 3, 3)]
LAYOUTS = ["contiguous", "channels_last", "strided"]


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x.contiguous()


def by_numpy(x: torch.Tensor):
    rows = np.moveaxis(x.double().numpy(), 1, -1).reshape(-1, x.shape[1])
    return rows.mean(0), rows.var(0), len(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("offset", "scale"), [(0, 1), (3, 1), (1000, 0.1), (-1e5, 3), (1e-6, 1e-8), (0, 1e12)]
)
def test_float32_keeps_six_digits_at_any_offset(shape, layout, offset, scale):
    torch.manual_seed(0)
    x = laid_out(torch.randn(shape) * scale + offset, layout)
    mean, var, count = by_numpy(x)
    found = moments(x)
    assert found.count == count
    assert found.mean.dtype == found.m2.dtype == torch.float64
    assert np.abs(found.var.numpy() / var - 1).max() < 4e-6
    assert (np.abs(found.mean.numpy() - mean) / np.sqrt(var)).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(40_000, 1030), (100, 512, 14, 14), (100, 64, 56, 56), (100, 8, 28, 28)], ids=str
)
def test_skewed_values_in_long_rows(shape, layout):
    """As behind a ReLU: no negative values, so that rounding errors of long sums add up."""
    torch.manual_seed(0)
    x = laid_out(torch.randn(shape).relu_(), layout)
    mean, var, _ = by_numpy(x)
    found = moments(x)
    assert np.abs(found.var.numpy() / var - 1).max() < 1e-6
    assert (np.abs(found.mean.numpy() - mean) / np.sqrt(var)).max() < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_whose_squares_overflow_float32(layout):
    torch.manual_seed(0)
    x = laid_out(torch.randn(200, 3, 4, 4) * 1e20, layout)
    mean, var, _ = by_numpy(x)
    found = moments(x)
    assert np.allclose(found.var.numpy(), var, rtol=1e-6, atol=0)
    assert np.allclose(found.mean.numpy(), mean, rtol=1e-5, atol=0)


def test_one_offset_channel_among_others():
    torch.manual_seed(0)
    x = torch.randn(64, 3, 20, 20)
    x[:, 1] = x[:, 1] * 0.01 + 500
    x[:, 2] = 7.25
    _, var, _ = by_numpy(x)
    found = moments(x.contiguous(memory_format=torch.channels_last))
    assert np.abs(found.var.numpy()[:2] / var[:2] - 1).max() < 2e-6
    assert found.var[2] == 0
    assert found.mean[2] == 7.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32_or_better(dtype):
    torch.manual_seed(0)
    x = (torch.randn(500, 4, 16, 16) + 20).to(dtype)
    mean, var, _ = by_numpy(x)
    found = moments(x)
    assert np.abs(found.var.numpy() / var - 1).max() < 1e-5
    assert np.abs(found.mean.numpy() / mean - 1).max() < 1e-6


def test_float64_stays_float64():
    x = torch.randn(50, 3, 4, dtype=torch.float64) + 1e6
    mean, var, _ = by_numpy(x)
    found = moments(x)
    assert np.allclose(found.mean.numpy(), mean, rtol=1e-14, atol=0)
    assert np.allclose(found.var.numpy(), var, rtol=1e-8, atol=0)


def test_no_values_and_one_value():
    assert moments(torch.empty(0, 3, 4)).count == 0
    one = moments(torch.tensor([[2.0, -3.0]]))
    assert one.count == 1
    assert one.mean.tolist() == [2, -3]
    assert one.var.tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_values_show(value, layout):
    x = torch.randn(300, 2, 5, 5)
    x[150, 1, 2, 2] = value
    found = moments(laid_out(x, layout))
    assert torch.isfinite(found.mean[0] + found.m2[0])
    assert not torch.isfinite(found.mean[1] + found.m2[1])


def test_unbiased_variance():
    x = torch.randn(12, 2)
    assert np.allclose(moments(x).unbiased_var.numpy(), x.double().numpy().var(0, ddof=1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 40), min_size=2, max_size=8),
    st.sampled_from([0.0, 1.0, 1e4, -1e7]),
    st.randoms(),
)
def test_merging_is_associative_and_order_free(seed, sizes, offset, rng):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator) + offset
    whole_mean, whole_var, count = by_numpy(x)
    parts = [moments(part) for part in x.split(sizes)]

    rng.shuffle(parts)
    tree = list(parts)
    while len(tree) > 1:
        pair = [tree.pop(rng.randrange(len(tree))) for _ in range(2)]
        tree.append(Moments.merge(pair))
    for merged in (Moments.merge(parts), tree[0]):
        assert merged.count == count
        assert np.allclose(merged.mean.numpy(), whole_mean, rtol=1e-13, atol=1e-13)
        assert np.allclose(merged.var.numpy(), whole_var, rtol=1e-8, atol=1e-12)
