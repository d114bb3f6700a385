"""Among real-valued scores the smallest shift is certain, and says nothing against a model."""

import numpy as np

from bnexp.analysis.findings import Facts, Halves, find, in_words
from bnexp.analysis.sample_curve import CurvePoint, enough
from bnexp.analysis.scores import close_scores, gain

RNG = np.random.default_rng(0)
IOU = RNG.uniform(0.3, 0.7, 1000)
SHIFTED = IOU + RNG.uniform(0, 2e-4, 1000)


def facts(second, close):
    found = gain(IOU, second, close)
    halves = Halves(500, (0.5, 0.5), found, 1000, 1000, "bn", 0.01)
    return Facts(layers=(), batch_size=64, population_samples=1000, recomputed=found,
                 other_eps=None, halves=halves, points=False)  # fmt: skip


def test_a_certain_difference_that_does_not_matter_is_no_finding():
    close = close_scores([IOU, SHIFTED])
    assert close == 0.01
    assert gain(IOU, SHIFTED).p < 1e-6 and gain(IOU, SHIFTED).better
    small = facts(SHIFTED, close)
    assert find(small) == ()
    assert in_words(small, ()).startswith("Nothing is wrong with your statistics")
    assert "too-few-samples" in [f.code for f in find(facts(IOU + 0.02, close))]
    worse = facts(IOU - 0.02, close)
    assert "recomputing-hurts" in [f.code for f in find(worse)]


def test_scores_of_any_scale_are_close_by_how_much_samples_differ():
    assert close_scores([100 * IOU, 100 * SHIFTED]) == 0.01 * (100 * IOU).std()


def test_from_how_many_samples_on_it_is_enough():
    def point(samples, part, difference, close=0.0):
        return CurvePoint(samples, part, 0.5, gain(IOU, IOU + difference, close), 0, 1000)

    whole = point(400, "all", 0.0)
    assert enough([point(100, "nested", 0.1), point(200, "nested", 0.0), whole]) == (
        "From 200 samples on the score can't be told from that with all 400 (on 1,000 test "
        "samples)."
    )
    assert enough([point(200, "nested", 0.0), point(200, "other half", 0.1), whole]).startswith(
        "Half of the population still scores otherwise than all 400 samples"
    )
    assert enough([point(200, "nested", 0.001, close=0.01), whole]).startswith("From 200")
