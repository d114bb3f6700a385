"""The page of a study: from its record alone, whatever is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bnexp.errors import UserError
from bnexp.records.study import StudyRecord, all_studies, create_study, find_study, to_csv
from bnexp.report.study_page import render_study

COLUMNS = ["experiment", "training.batch_size", "norm", "seed", "state", "step", "condition",
           "accuracy", "loss", "samples", "ema_accuracy", "train_accuracy"]  # fmt: skip
CLAIM = {
    "says": "Recomputed is better", "source": "Somebody 2021", "where": "training.batch_size 8",
    "first": "running", "second": "recomputed", "measure": "accuracy", "expect": "second is better",
    "verdict": "supported",
    "text": "second less first: +1.00 points (95 % interval +0.50 to +1.50, 3 seeds)",
    "unit": "points", "difference": 0.01, "interval": [0.005, 0.015], "p": 0.01,
    "seeds": [0, 1, 2], "first_values": [0.9, 0.91, None], "second_values": [0.91, 0.92, 0.93],
    "cells": 1,
}  # fmt: skip


def record_of(folder: Path, rows=None, claims=(CLAIM,)) -> StudyRecord:
    state = {
        "state": "finished", "created": "2026-01-01T00:00:00", "grid": "", "experiments": 24,
        "trainings": 12, "done": 12, "failed": {},
    }  # fmt: skip
    record = create_study("some", "base: digits\n", state, folder)
    if rows is None:
        rows = [
            [f"{b}{n}{s}", b, n, s, "finished", 60, c, 0.9 + 0.01 * s + 0.001 * (b == 32) + x, 0.1,
             500, 0.8, ""]
            for b in (8, 32, 128)
            for n in ("with", "without")
            for s in range(3)
            for c, x in (("running", 0.0), ("recomputed", 0.004 + 0.001 * s))
        ]  # fmt: skip
        rows.append(["diverged1", 8, "with", 3, "diverged", 2, "", "", "", "", "", ""])
    record.write("results.csv", to_csv(COLUMNS, [[str(v) for v in row] for row in rows]))
    record.write_json("claims.json", {"claims": list(claims)})
    return record


def test_claims_come_first_with_a_word_and_a_mark(tmp_path):
    page = render_study(record_of(tmp_path))
    assert page.index("Recomputed is better") < page.index("Factors") < page.index("Experiments")
    assert re.search(r"✓ supported", page)
    assert "Somebody 2021" in page and "+1.00 points" in page
    assert page.count('href="experiments/') == 3 * 2 * 3 + 1
    assert "diverged" in page
    assert "corrected by Holm" in page


def test_experiments_without_an_accuracy_are_said_to_be_in_no_mean(tmp_path):
    page = render_study(record_of(tmp_path))
    said = "Without a final accuracy, and so in no mean: 1 of 19 experiments (1 diverged)"
    assert said in page


def test_the_page_needs_nothing_else(tmp_path):
    page = render_study(record_of(tmp_path))
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org", ""
    )


def test_it_opens_before_there_are_results(tmp_path):
    record = record_of(tmp_path)
    (record.path / "results.csv").unlink()
    (record.path / "claims.json").unlink()
    page = render_study(record)
    assert "0 experiments" in page


def test_hostile_text_stays_text(tmp_path):
    text = "<script>alert(1)</script>\u202e\x1b[31m{{ 7*7 }}"
    rows = [[text, 8, text, 0, text, 1, text, 0.5, 0.1, 5, 0.5, ""]]
    claim = {**CLAIM, "says": text, "source": text, "text": text}
    page = render_study(record_of(tmp_path, rows, [claim]))
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert 'href="experiments/<' not in page and 'href="experiments/&lt;' not in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.csv", "a,b\n1\n"),
        ("results.csv", "a,b\n1,2\n"),
        ("results.csv", ",".join(COLUMNS) + "\n" + ",".join(["x"] * len(COLUMNS)) + "\n"),
        ("results.csv", ",".join(COLUMNS) + "\nk,8,w,0,finished,6,running,1.5,0,5,,\n"),
        ("results.csv", ",".join(COLUMNS) + "\nk,8,w,0,finished,6,running,nan,0,5,,\n"),
        ("claims.json", "[]"),
        ("claims.json", '{"claims": 3}'),
        ("claims.json", '{"claims": [{"says": 3}]}'),
        ("claims.json", json.dumps({"claims": [{**CLAIM, "verdict": "wonderful"}]})),
        ("state.json", "{}"),
        ("state.json", '{"state": "finished", "done": -1}'),
        ("state.json", '{"state": "finished", "failed": [1]}'),
        ("study.yaml", b"\xff"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content):
    record = record_of(tmp_path)
    data = content if isinstance(content, bytes) else content.encode()
    (record.path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        render_study(record)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_studies_are_listed_newest_first(tmp_path):
    first, second = record_of(tmp_path), record_of(tmp_path)
    second.write_json("state.json", {**second.state, "created": "2026-02-01T00:00:00"})
    assert all_studies(tmp_path) == [second, first]
    assert find_study("some-1", tmp_path) == first
    assert find_study("nothing", tmp_path) is None
    assert find_study("x" * 5000, tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser, tmp_path, width):
    page = tmp_path / "report.html"
    page.write_text(render_study(record_of(tmp_path)))
    tab = browser.new_page(viewport={"width": width, "height": 800})
    problems = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.goto(page.as_uri())
    assert problems == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("#claim-1 .word").inner_text().lower() == "✓ supported"
    pictures = tab.locator("#study-grid svg")
    (picture,) = [pictures.nth(i) for i in range(2) if pictures.nth(i).is_visible()]
    assert picture.bounding_box()["width"] > 0.85 * min(width, 760)
    tab.close()
