"""Downsampled curves keep what an eye could see, checked against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnexp.report.curves import envelope, thin

CURVES = st.lists(
    st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf, -np.inf]), min_size=0, max_size=400
).map(np.array)


@given(CURVES, st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_thin_keeps_extremes_ends_and_order(y, bins):
    y = y.astype(float)
    x = np.arange(len(y), dtype=float)
    tx, ty = thin(x, y, bins)
    finite = y[np.isfinite(y)]
    assert len(tx) == len(ty) <= max(4 * bins, 0)
    assert (np.diff(tx) > 0).all()
    assert np.array_equal(ty, y[tx.astype(int)])  # only points that exist
    if len(finite):
        assert ty.min() == finite.min()
        assert ty.max() == finite.max()
        assert ty[0] == finite[0]
        assert ty[-1] == finite[-1]
    if len(finite) <= 4 * bins:
        assert np.array_equal(ty, finite)


@given(CURVES, st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_envelope_is_the_least_mean_and_greatest_of_each_bin(y, bins):
    y = y.astype(float)
    x = np.arange(len(y), dtype=float)
    start, end, mean, low, high = envelope(x, y, bins)
    finite = np.isfinite(y)
    assert len(start) <= bins
    covered = 0
    for a, b, m, lo, hi in zip(start, end, mean, low, high, strict=True):
        inside = y[finite & (x >= a) & (x <= b)]
        covered += len(inside)
        assert (lo, hi) == (inside.min(), inside.max())
        assert m == pytest.approx(inside.mean(), rel=1e-9, abs=1e-6)
    assert covered == finite.sum()


def test_a_single_spike_in_a_long_run_survives():
    y = np.zeros(50_000)
    y[31_415] = 7.0
    x = np.arange(50_000.0)
    tx, ty = thin(x, y, 300)
    assert ty[tx == 31_415] == 7.0
    assert envelope(x, y, 300)[4].max() == 7.0
