"""bnexp report, runs and compare as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from example import make_run
from typer.testing import CliRunner

from bnexp.cli import app
from bnexp.cli.study import _print_markdown
from bnexp.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    for seed in range(3):
        make_run(folder / "runs", f"example-{seed + 1}", steps=300, seed=seed, cost=0.03)
    make_run(folder / "runs", "half-1", steps=300, seed=5, finished=False)
    make_run(folder / "runs", "new-1", steps=0, evaluations=0, seed=6, finished=False)
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def bnexp(*arguments):
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def refused(*arguments):
    with pytest.raises(UserError) as error:
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return str(error.value)


def test_runs_lists_the_newest_first(folder):
    lines = bnexp("runs").splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == ["new-1", "half-1", "example-3", "example-2", "example-1"]
    rows = json.loads(bnexp("runs", "--json"))
    assert [row["name"] for row in rows] == names
    assert rows[0]["test_accuracy"] is None
    assert rows[-1]["state"] == "finished"
    accuracy = json.loads((folder / "runs/example-1/comparison.json").read_text())
    assert rows[-1]["test_accuracy"] == accuracy["kinds"][0]["accuracy"]
    assert f"{rows[-1]['test_accuracy']:.2%}" in lines[-1]
    assert "interrupted" in lines[2]


def test_runs_says_what_was_done_to_the_images(tmp_path):
    path = make_run(tmp_path, steps=300).path / "config.yaml"
    config = yaml.safe_load(path.read_text())

    def row_with(section):
        path.write_text(yaml.safe_dump({**config, "data": {"name": "digits", **section}}))
        return json.loads(bnexp("runs", "--folder", str(tmp_path), "--json"))[0]

    assert row_with({"binary": True})["data"] == "binary digits"
    assert "binary digits" in bnexp("runs", "--folder", str(tmp_path))
    fog = {"name": "fog", "severity": 3}
    assert row_with({"corruption": fog})["data"] == "digits with fog 3 in testing"
    assert row_with({"corruption": "fog"})["state"] == "damaged"


def test_runs_where_there_are_none(tmp_path):
    assert "no runs" in bnexp("runs", "--folder", str(tmp_path))
    assert json.loads(bnexp("runs", "--folder", str(tmp_path), "--json")) == []


@pytest.mark.slow
def test_report_of_one_run_several_runs_and_the_newest(folder, tmp_path):
    assert bnexp("report", "example-1").strip() == "runs/example-1/report.html"
    assert "<h1>example-1</h1>" in (folder / "runs/example-1/report.html").read_text()
    assert bnexp("report").strip() == "runs/example-3/report.html"
    assert bnexp("report", "example-1", "runs/half-1").strip() == "runs/report.html"
    assert "<h1>2 runs</h1>" in (folder / "runs/report.html").read_text()
    target = tmp_path / "deep" / "page.html"
    assert bnexp("report", "example-1", "-o", str(target)).strip() == str(target)
    assert target.is_file()


def test_report_writes_figures(folder, tmp_path):
    paths = bnexp("report", "example-1", "--format", "svg").split()
    assert "runs/example-1/figures/accuracy.svg" in paths
    assert all((folder / path).stat().st_size > 1000 for path in paths)
    paths = bnexp("report", "example-1", "half-1", "--format", "png", "-o", str(tmp_path)).split()
    assert str(tmp_path / "half-1" / "accuracy.png") in paths


def test_compare_sets_runs_side_by_side():
    text = bnexp("compare", "example-1", "example-2", "half-1")
    for words in ("where the configs differ", "seed", "test accuracy by step", "at the end"):
        assert words in text
    assert "2 seeds (0, 1) of one config: small-cnn on fashion-mnist, 300 steps" in text
    tree = json.loads(bnexp("compare", "example-1", "example-2", "example-3", "--json"))
    assert [run["name"] for run in tree["runs"]] == ["example-1", "example-2", "example-3"]
    assert tree["config_differences"] == {"seed": {"example-1": 0, "example-2": 1, "example-3": 2}}
    (group,) = tree["seeds"]
    assert group["seeds"] == [0, 1, 2]
    accuracies = [run["comparison"]["kinds"][0]["accuracy"] for run in tree["runs"]]
    assert group["summary"][0]["mean"] == pytest.approx(sum(accuracies) / 3)


def test_compare_says_whose_weights_are_not_those_of_the_last_step(tmp_path):
    paths = []
    for name, weights in (("a-1", "last"), ("b-1", "best")):
        run = make_run(tmp_path, name, steps=300, evaluations=2)
        comparison = json.loads((run.path / "comparison.json").read_text())
        run.write_json("comparison.json", comparison | {"weights": weights})
        paths.append(str(run.path))
    text = " ".join(bnexp("compare", *paths).split())
    assert "not the weights of the last step: b-1 (best weights)" in text
    assert "of the last step" not in bnexp("compare", "example-1", "example-2")


def test_compare_in_markdown_is_tables_with_all_that_the_terminal_shows():
    text = bnexp("compare", "example-1", "example-2", "half-1", "--markdown")
    tables = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for head, rule, *rows in tables:
        assert set(rule) <= set("|:- ") and rows
        assert {row.count("|") for row in rows} == {head.count("|")}
    assert "| seed | 0: example-1<br>1: example-2<br>5: half-1 |" in text
    assert "**at the end, %, with the difference to the baseline in points**" in text
    assert "\x1b" not in text
    assert "--json or --markdown" in refused("compare", "a", "b", "--json", "--markdown")


def test_claims_in_markdown(capsys):
    judged = SimpleNamespace(
        says="a|b *wins*", verdict="supported", first="running", second="recomputed",
        measure="accuracy", text="+1.2 points", p=0.01,
    )  # fmt: skip
    record = SimpleNamespace(path=Path("runs/grid-1"))
    _print_markdown(SimpleNamespace(record=record, judged=[judged], states={"finished": 6}))
    text = capsys.readouterr().out
    row = r"| a\|b \*wins\* | supported | recomputed against running, accuracy | +1.2 points |"
    assert row in text and "experiments: 6 finished" in text


def test_what_cannot_be_done_is_said(tmp_path):
    assert "two runs or more" in refused("compare", "example-1")
    assert "named twice" in refused("compare", "example-1", "runs/example-1")
    assert "named twice" in refused("report", "example-1", "example-1")
    assert "allowed are html, png, svg" in refused("report", "--format", "pdf")
    assert "no run nothing" in refused("report", "nothing")
    assert "is a folder" in refused("report", "example-1", "-o", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused("report", "example-1", "-o", str(tmp_path / "file" / "a.html"))


def test_compare_writes_json_of_runs_that_diverged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a-1", "b-1"):
        run = make_run(tmp_path / "runs", name, steps=30, evaluations=2, finished=False)
        with open(run.path / "evals.csv", "a") as log:
            log.write("30,test,running,0.1,nan,2000,0.5\n")
    tree = json.loads(bnexp("compare", "a-1", "b-1", "--json"))
    assert tree["runs"][0]["evals"][-1]["loss"] is None


def test_a_report_replaces_links_in_the_record_and_touches_nothing_outside(tmp_path):
    run = make_run(tmp_path / "runs", "linked-1", steps=50)
    outside = tmp_path / "precious.html"
    outside.write_text("precious")
    page, folder = run.path / "report.html", tmp_path / "precious"
    page.symlink_to(outside)
    folder.mkdir()
    (run.path / "figures").symlink_to(folder)
    bnexp("report", str(run.path))
    assert outside.read_text() == "precious"
    assert page.is_file() and not page.is_symlink()
    assert "--output" in refused("report", str(run.path), "--format", "svg")
    assert list(folder.iterdir()) == []
    page.unlink()
    page.symlink_to(outside)
    bnexp("report", str(run.path), "--output", str(page))  # named, and so meant
    assert "<html" in outside.read_text()
