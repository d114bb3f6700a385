"""The code in the pages of docs/ does what it is said to do."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "statistics.md"


def test_code_blocks_of_the_statistics_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    assert len(blocks) >= 5
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    printed = capsys.readouterr().out
    promised = re.search(r"^# (6 batches, .*)$", PAGE.read_text(), flags=re.M)[1]
    assert promised in printed
    assert "Statistics(2 layers, 24 channels)" in printed

    # The tables on cancellation and on batches that differ.
    offset, apart = names["offset"], names["apart"]
    assert offset["exact"] == pytest.approx(offset["truth"], rel=1e-6)
    assert offset["truth"] == pytest.approx(0.0098657, abs=1e-6)
    assert apart["pooled"] == pytest.approx(apart["truth"], rel=1e-6)
    assert apart["update_bn"] == pytest.approx(0.98, abs=0.01)
    if "fvcore" in offset:
        assert abs(offset["fvcore"] - offset["truth"]) > 0.5 * offset["truth"]


def test_code_blocks_of_the_audit_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "audit.md").read_text(), re.M | re.S)
    names: dict = {}
    for number, block in enumerate(blocks):
        if needed := re.match(r"# needs (\w+)", block):
            pytest.importorskip(needed[1])
        exec(compile(block, f"audit.md, block {number}", "exec"), names)
    assert "initial-share" in capsys.readouterr().out
    assert (tmp_path / "audit.html").exists()
    assert [finding.code for finding in names["audit"].findings] == ["initial-share"]


def test_the_audit_page_names_every_finding():
    source = (DOCS.parent / "bnexp" / "analysis" / "findings.py").read_text()
    codes = set(re.findall(r'Finding\(\n        "([a-z-]+)"', source))
    assert len(codes) >= 18
    page = (DOCS / "audit.md").read_text()
    assert not [code for code in codes if f"`{code}`" not in page]


def test_links_of_the_statistics_page_lead_somewhere():
    text = PAGE.read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, flags=re.M)
    }
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (PAGE.parent / target).exists(), target


def test_tables_of_the_statistics_page_are_the_measured_ones(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "figures")
    import layer_errors

    found = json.loads((DOCS / "figures" / "layer-errors.json").read_text())
    for table in layer_errors.tables(found):
        assert table in PAGE.read_text()


@pytest.mark.parametrize("name", ["layer-errors.png", "batch-size-errors.png"])
def test_figures_of_the_statistics_page_are_pictures_of_reasonable_size(name):
    data = (DOCS / "figures" / name).read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 150_000
    width, _ = struct.unpack(">II", data[16:24])
    assert width >= 1000


ROOT = DOCS.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
    ROOT / "benchmarks" / "RESULTS.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_to_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_code_of_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), flags=re.M | re.S)
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["average"].count == {"1": 20}
        assert names["exact"].count == {"1": 20 * 32 * 36}


def test_the_config_of_the_readme_is_one(tmp_path):
    from bnexp.config import load_config

    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGES[0].read_text(), flags=re.M | re.S)
    (text,) = [block for block in blocks if not block.startswith("base:")]
    path = tmp_path / "readme.yaml"
    path.write_text(text)
    assert load_config(path).training.epochs == 3


def test_commands_and_options_of_the_readme_exist():
    import typer

    from bnexp.cli import app

    commands = typer.main.get_command(app).commands
    rows = re.findall(r"^\| `bnexp (\w+)(.*)$", PAGES[0].read_text(), flags=re.M)
    assert {name for name, _ in rows} == set(commands)
    for name, rest in rows:
        known = {option for p in commands[name].params for option in p.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known


def test_the_map_names_every_module_and_nothing_else():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text.partition("## To add")[0], flags=re.M)
    named = {
        name.strip("/").removesuffix(".py")
        for row in rows
        for name in re.findall(r"`([^`]+)`", row)
    }
    there = {path.stem for path in (ROOT / "bnexp").iterdir() if not path.name.startswith("__")}
    assert named == there - {"py"}
    for path in re.findall(r"`((?:statistics|config|training|data|networks|cli)/\w+\.py)`", text):
        assert (ROOT / "bnexp" / path).is_file(), path


def test_the_config_reference_is_current(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from config_reference import reference

    assert (DOCS / "config.md").read_text() == reference(), "run: python docs/config_reference.py"


@pytest.mark.parametrize("page", ["README.md", "docs/studies.md"])
def test_the_study_of_the_pages_is_one(page):
    from bnexp.config.yaml_text import parse_yaml
    from bnexp.study.file import make_study
    from bnexp.study.run import plan_study

    text = (ROOT / page).read_text()
    (block,) = re.findall(r"^```yaml\n(base:.*?)^```", text, flags=re.M | re.S)
    plan = plan_study(make_study(parse_yaml(block, page), [], page))
    assert len(plan.points) == 27 and len(plan.trainings) == 9 and len(plan.claims) == 1
