"""The studies of published claims that come with bnexp, and the page about them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bnexp.config.shipped import shipped_studies
from bnexp.study.claims import claims_of
from bnexp.study.file import read_study
from bnexp.study.grid import points_of

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "claims.md").read_text()
FOUND = json.loads((DOCS / "figures" / "claims.json").read_text())
OFFLINE = ("digits", "mnist", "fashion-mnist")
CLAIMS = [name for name in shipped_studies() if name[0].isdigit()]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_shipped_study_can_be_run_and_judged(name):
    study = read_study(shipped_studies()[name])
    points = points_of(study)
    claims = claims_of(study, points)
    assert claims and len(study.config.all_seeds) >= 3
    assert all(claim.config.source for claim in claims)
    assert {point.config.data.name for point in points} <= set(OFFLINE)
    assert f"`bnexp study {name}`" in PAGE and f"<!-- table {name} -->" in PAGE


@pytest.mark.parametrize("name", FOUND)
def test_what_the_page_shows_is_of_the_study_as_it_is(name):
    study = read_study(shipped_studies()[name])
    claims = claims_of(study, points_of(study))
    shown = [(claim["says"], claim["expect"]) for claim in FOUND[name]["claims"]]
    assert shown == [(claim.config.says, claim.config.expect) for claim in claims]
    for claim in FOUND[name]["claims"]:
        assert claim["seeds"] == study.config.all_seeds


def test_the_page_s_tables_are_the_measured_ones(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "figures")
    import claims

    assert claims.page(PAGE, FOUND) == PAGE
    assert list(FOUND) == re.findall(r"<!-- table ([a-z0-9-]+) -->", PAGE)
