"""Statistics of two domains, as Schneider et al. 2020 blend them."""

import math

import pytest
import torch

from bnexp.errors import UserError
from bnexp.statistics import Statistics
from bnexp.statistics.blend import blend


def statistics(mean, var, count=490):
    return Statistics({"bn": torch.tensor(mean)}, {"bn": torch.tensor(var)}, {"bn": count})


SOURCE, TARGET = statistics([0.0, 2.0], [1.0, 4.0]), statistics([3.0, 2.0], [7.0, 1.0])


def test_equations_1_and_2():
    found = blend(SOURCE, TARGET, prior=16, samples=8)  # shares 2/3 and 1/3
    assert torch.allclose(found.mean["bn"], torch.tensor([1.0, 2.0]).double())
    assert torch.allclose(found.var["bn"], torch.tensor([3.0, 3.0]).double())
    assert found.count == {"bn": 490}


def test_the_ends_are_adabn_and_the_source():
    assert torch.equal(blend(SOURCE, TARGET, 0).mean["bn"].float(), TARGET.mean["bn"])
    assert torch.equal(blend(SOURCE, TARGET, math.inf).var["bn"].float(), SOURCE.var["bn"])


def test_what_cannot_be_blended():
    with pytest.raises(UserError, match="from 0 upwards"):
        blend(SOURCE, TARGET, -1)
    with pytest.raises(UserError, match="samples="):
        blend(SOURCE, TARGET, 16)
    with pytest.raises(UserError, match="different models"):
        blend(statistics([0.0], [1.0]), TARGET, 16, samples=8)
