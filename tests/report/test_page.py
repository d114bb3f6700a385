"""The page as a browser and as a reader of its HTML gets it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from example import CLASSES, make_run

from bnexp.errors import UserError
from bnexp.records import Run
from bnexp.records.audit import write_audit
from bnexp.report.audit_page import render_record
from bnexp.report.page import _loss_cell, render, write_report
from bnexp.report.run_data import RunData
from bnexp.report.several import config_differences, seed_groups

FIGURES = ("accuracy", "statistics", "estimators", "comparison", "layers", "rate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder):
    made = [make_run(folder, f"example-{s + 1}", seed=s, cost=0.03) for s in range(3)]
    other = make_run(
        folder, "slow-1", seed=0, model={"name": "resnet20", "norm": "batch", "eps": 1e-5}
    )
    unfinished = make_run(folder, "half-1", seed=7, finished=False)
    return [*made, other, unfinished]


@pytest.fixture(scope="module")
def page(runs):
    return render([RunData.read(runs[0])])


@pytest.fixture(scope="module")
def page_of_several(runs):
    return render([RunData.read(run) for run in runs])


class Reader(HTMLParser):
    """Collects what the tests ask about and checks that tags close."""

    VOID = frozenset(("meta", "link", "br", "path", "use", "rect", "img"))

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.labels, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if attrs.get("role") == "img":
            self.labels.append(attrs["aria-label"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def plain(text):
    return " ".join(text.replace("\u00a0", " ").split())


def test_the_verdict_comes_first_and_everything_is_there(runs, page):
    reader = read(page)
    text = plain(" ".join(reader.text))
    comparison = runs[0].comparison()
    verdict = plain(comparison["verdict"])
    assert verdict.startswith("Trained weights with running averages (decay 0.9) cost")
    assert text.index(verdict) < text.index("Comparison on 2,000 test images")
    for remark in comparison["remarks"]:
        assert plain(remark) in text
    for kind in comparison["kinds"]:
        assert f"{100 * kind['accuracy']:.2f} %" in text
    for name in CLASSES:
        assert name in text
    assert "git checkout 0123456789abcdef" in text
    assert "ema_accuracy_decay: 0.98" in text
    assert "torch 2.11.0" in text
    assert len(reader.labels) == len(FIGURES)
    assert all(len(label) > 30 for label in reader.labels)
    assert len(reader.ids) == len(set(reader.ids))


def test_the_data_of_every_figure_are_in_the_page(runs, page):
    text = plain(" ".join(read(page).text))
    for row in runs[0].evals():
        if row["split"] == "train" or row["statistics"] in ("running", "recomputed", "ema-0.99"):
            assert f"{100 * row['accuracy']:.2f} %" in text
    for row in runs[0].comparison()["layers"]["recomputed"]:
        assert f"{row['worst_log_var_drift']:.4f} (#{row['worst_var_channel']})" in text


def test_the_page_needs_nothing_else(page):
    assert not re.search(r"(src|href)=\"(?!#|data:)", page.replace('xlink:href="#', ""))
    assert "<script" not in page
    assert "url(http" not in page
    assert "@import" not in page


@pytest.mark.slow
def test_size_of_a_long_run(folder):
    run = make_run(folder, "long-1", steps=50_000, evaluations=250)
    page = render([RunData.read(run)])
    assert len(page.encode()) < 2_000_000
    read(page)


HOSTILE = (
    "<b>&amp;</b><script>alert(1)</script>",
    "a\nb\x1b[31m\x00\u202e",
    "½²" * 300,
    "$x^{$ \\",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_anywhere_in_a_record_stays_text(folder, text):
    run = make_run(folder, f"odd-{HOSTILE.index(text)}", steps=20, evaluations=2, costs=True)
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    config["model"]["name"] = config["data"]["name"] = text
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("environment.json", "comparison.json"):
        tree = json.loads((run.path / name).read_text())
        (run.path / name).write_text(json.dumps(_everywhere(tree, text)))
    evals = (run.path / "evals.csv").read_text()
    quoted = text.replace("\n", " ").replace("\x00", "").replace(",", "")
    (run.path / "evals.csv").write_text(evals.replace("ema-0.99", quoted))
    other = make_run(folder, f"{run.name}-2", steps=20)
    try:
        page = render([RunData.read(run), RunData.read(other)])
    except UserError as error:  # refused is as good
        assert "\n" not in str(error)
        return
    read(page)
    assert text not in page or text.isprintable()
    assert "<script" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg.replace("xlink:", ""))


def _everywhere(tree, text):
    """`text` in place of every text but the conditions' names and the record's own words."""
    if isinstance(tree, dict):
        kept = ("baseline", "weights", "created", "outcome")
        return {
            key: value if key in kept or _is_condition(tree, key) else _everywhere(value, text)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [_everywhere(value, text) for value in tree]
    return text if isinstance(tree, str) else tree


def _is_condition(tree, key):
    return key == "name" and "accuracy" in tree


def test_lone_halves_of_characters_are_replaced(folder):
    run = make_run(folder, "half-a-character-1", steps=20, evaluations=2)
    path = run.path / "comparison.json"
    path.write_text(path.read_text().replace("Trouser", "Trou\\ud800ser"))
    try:
        page = render([RunData.read(run)])
    except UserError as error:
        assert "comparison.json is damaged" in str(error)
    else:
        assert "Trou\\ud800ser" in page
        page.encode()


DAMAGE = {
    "config.yaml": ("statistics: {}", "data: {name: digits}", "- 1", "a: [", "\x00"),
    "comparison.json": (
        "{}", "[]", "{", '{"kinds": []}',
        '{"kinds": [{"accuracy": 0.5}], "baseline": "running", "samples": 3, "classes": [], '
        '"verdict": 3, "layers": {}}',
    ),
    "evals.csv": ("step\n1,test,running,x,1,1,1\n", "a\n1,2\n"),
    "steps.csv": ("step\n1,2\n", "a\nx,y,z,1,2,3\n"),
    "environment.json": ("[]", '{"created": 3}'),
    "state.json": ("[]", '{"state": 1, "step": "a"}'),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"), [(name, one) for name, contents in DAMAGE.items() for one in contents]
)
def test_a_damaged_file_is_one_line_that_names_it(folder, tmp_path, name, content):
    if not (folder / "whole-1").exists():
        make_run(folder, "whole-1", steps=20, evaluations=2)
    run = Run(shutil.copytree(folder / "whole-1", tmp_path / "damaged-1"))
    (run.path / name).write_text(content)
    with pytest.raises(UserError) as error:
        RunData.read(run)
    assert name in str(error.value) or str(run.path) in str(error.value)
    assert "\n" not in str(error.value)


FINDINGS = {
    "summary": "1 finding to look into: lagging",
    "findings": [
        {"code": "lagging", "layers": ["bn"], "evidence": "", "effect": "", "remedy": ""}
    ],
    "population_samples": 100,
    "attribution": {
        "difference": 0.1, "explained": 0.1, "samples": 9, "layers": {"bn": 0.1},
        "channels": {"bn": [0.1, -0.2]},
    },
    "halves": None,
    "seconds": {"recomputed": 1.0},
}  # fmt: skip


def test_findings_that_hold_something_else_are_named(folder, tmp_path):
    if not (folder / "whole-1").exists():
        make_run(folder, "whole-1", steps=20, evaluations=2)
    comparison = json.loads((folder / "whole-1" / "comparison.json").read_text())
    record = write_audit(tmp_path / "a", comparison=comparison, findings=FINDINGS, statistics={})
    page = render_record(record)
    assert "lagging" in page
    for path, value in [
        (["summary"], 3), (["findings"], {}), (["findings", 0], None), (["halves"], {"samples": 1}),
        (["findings", 0, "layers"], "bn"), (["population_samples"], "many"),
        (["attribution", "channels", "bn"], []), (["attribution", "layers", "bn"], "0.1"),
        (["attribution", "samples"], [1]), (["seconds"], None), (["findings", 0, "code"], ["a"]),
    ]:  # fmt: skip
        findings = json.loads(json.dumps(FINDINGS))
        place = findings
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (tmp_path / "a" / "findings.json").write_text(json.dumps(findings))
        with pytest.raises(UserError, match=r"findings.json is damaged: \S"):
            render_record(record)
    (tmp_path / "a" / "findings.json").write_text(
        json.dumps({**FINDINGS, "summary": "<script>\ud800\x1b"})
    )
    with pytest.raises(UserError, match=r"findings.json is damaged"):
        render_record(record)
    (tmp_path / "a" / "findings.json").write_text(
        json.dumps({**FINDINGS, "summary": "<script>\x1b"})
    )
    assert "&lt;script&gt;\\x1b" in render_record(record)


@pytest.mark.slow
def test_several_runs_are_set_side_by_side(runs, page_of_several):
    reader = read(page_of_several)
    text = plain(" ".join(reader.text))
    assert "3 seeds of one config" in text
    assert "Where the configs differ" in text
    assert "model.name" in text
    assert "This run is interrupted at step 1,000 and has no final comparison yet." in text
    assert len(reader.ids) == len(set(reader.ids))
    for i in range(1, 6):
        assert f"run-{i}" in reader.ids
    with pytest.raises(UserError, match="twice"):
        render([RunData.read(runs[0])] * 2)
    with pytest.raises(UserError, match="no run"):
        render([])


def test_a_run_without_a_comparison_has_its_state_below_its_steps(page_of_several):
    row = page_of_several.partition("<b>half-1</b>")[2].partition("</tr>")[0]
    cells = [re.sub("<[^>]+>", " ", cell).split() for cell in row.split("</td>")]
    assert cells[2] == ["1,000", "interrupted"] and cells[3:7] == [["–"]] * 4


@pytest.mark.parametrize(
    ("difference", "shown"),
    [(-0.00001, "0.0000"), (0.0, "0.0000"), (-0.012, "−0.0120"), (0.012, "+0.0120")],
)
def test_a_difference_of_losses_that_rounds_to_zero_has_no_sign(runs, difference, shown):
    result = RunData.read(runs[0]).comparison.results[1]
    paired = replace(result.versus_baseline, loss_difference=difference)
    assert _loss_cell(replace(result, versus_baseline=paired)).small == shown


def test_seeds_of_one_config_are_recognised(runs, folder):
    data = [RunData.read(run) for run in runs]
    (group,) = seed_groups(data)
    assert [run.name for run in group.runs] == ["example-1", "example-2", "example-3"]
    assert group.seeds == [0, 1, 2]
    assert group.repeated == []
    assert [str(row.condition) for row in group.summary] == [
        "running", "ema-0.99", "recomputed", "batch"
    ]  # fmt: skip
    again = RunData.read(make_run(folder, "example-9", seed=1, cost=0.03))
    (group,) = seed_groups([*data, again])
    assert group.repeated == ["example-9"]
    assert len(group.runs) == 3


def test_differences_of_configs(runs):
    differences = dict(config_differences([RunData.read(run) for run in runs[2:4]]))
    assert differences == {
        "seed": [2, 0],
        "model.name": ["small-cnn", "resnet20"],
    }


# ------------------------------------------------------------------------ a real browser


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, runs, page, page_of_several, tmp_path, several, width, scheme):
    path = tmp_path / "report.html"
    path.write_text(page_of_several if several else page)
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("requestfailed", lambda request: problems.append(request.url))
    tab.on(
        "request",
        lambda request: request.url.startswith(("file:", "data:")) or problems.append(request.url),
    )
    tab.goto(path.as_uri())
    assert problems == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width

    verdict = tab.locator(".verdict").first
    assert verdict.is_visible()
    assert plain(verdict.inner_text()) == plain(runs[0].comparison()["verdict"])
    for key in FIGURES:
        pictures = tab.locator(f"#run-1-{key} svg")
        visible = [pictures.nth(i) for i in range(2) if pictures.nth(i).is_visible()]
        (picture,) = visible
        box = picture.bounding_box()
        assert box["width"] > 0.85 * min(width, 760)
        assert box["height"] > 60
        size = picture.evaluate(
            "svg => { const t = svg.querySelector('text');"
            " return t.getBoundingClientRect().height }"
        )
        assert size > 9  # still readable
    ink = tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 384) == (scheme == "dark")
    tab.close()


@pytest.mark.slow
def test_printed_in_dark_mode_it_is_dark_on_white(browser, runs, tmp_path):
    path = tmp_path / "report.html"
    write_report(runs[:1], path)
    page = browser.new_page(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(path.as_uri())
    paper, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("backgroundColor", "color")
    )
    assert paper == "rgb(255, 255, 255)"
    assert sum(map(int, re.findall(r"\d+", ink))) < 200
    assert page.locator("#run-1-accuracy .wide svg").is_visible()
    assert not page.locator("#run-1-accuracy .narrow svg").is_visible()
    page.close()
