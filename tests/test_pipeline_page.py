"""The workflows of docs/pipeline.md, run step by step as a runner would, on what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from audited import Net, train
from conftest import ROOT

from bnexp.config import load_config

BLOCKS = {
    match[1]: match[2]
    for match in re.finditer(
        r"^```yaml\n# (\S+)\n(.*?)^```", (ROOT / "docs" / "pipeline.md").read_text(), re.M | re.S
    )
}
PRODUCT = """
import audited

build, training_batches, validation_batches = audited.Net, audited.POPULATION, audited.TEST
"""


def workflow(name):
    (job,) = yaml.safe_load(BLOCKS[f".github/workflows/{name}.yaml"])["jobs"].values()
    assert job["runs-on"] and job["timeout-minutes"]
    return job


@pytest.fixture
def runner(tmp_path):
    """Runs the steps of a job in `tmp_path`; their exit codes, and the summary they wrote."""
    for name, text in BLOCKS.items():
        if "/" not in name:
            (tmp_path / name).write_text(text)
    (tmp_path / "product.py").write_text(PRODUCT)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "bnexp").write_text(f'#!/bin/sh\nexec {sys.executable} -m bnexp "$@"\n')
    (programs / "bnexp").chmod(0o755)
    summary = tmp_path / "summary.md"

    def run(job):
        env = {
            **os.environ,
            **job["env"],
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "GITHUB_STEP_SUMMARY": str(summary),
        }
        codes = []
        for step in job["steps"]:
            if "bnexp " not in step.get("run", ""):
                assert step.get("uses") or step["run"] == 'pip install "$BNEXP"'
                continue
            if any(codes) and "if" not in step:
                continue
            shell = ["bash", "-e", "-o", "pipefail", "-c", step["run"]]
            done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, timeout=300)
            codes.append(done.returncode)
        return codes, summary.read_text()

    return run


@pytest.mark.slow
def test_a_training_is_gated_and_its_table_is_in_the_summary(runner, tmp_path):
    job = workflow("batch-normalization")
    codes, summary = runner(job)
    assert codes == [0, 0, 0]
    assert "| recomputed |" in summary and "| :--- | ---: |" in summary
    assert (tmp_path / "records" / "gate-1" / "comparison.json").exists()
    strict = (tmp_path / "gate.yaml").read_text().replace("test_accuracy: 0.9", "test_accuracy: 1")
    (tmp_path / "gate.yaml").write_text(strict)
    codes, again = runner(job)
    assert codes == [0, 3, 0]
    assert "gate-2" in again


@pytest.mark.slow
def test_a_checkpoint_is_gated(runner, tmp_path):
    job = workflow("audit")
    torch.save(train(Net()).state_dict(), tmp_path / "checkpoint.pt")
    codes, summary = runner(job)
    assert codes == [0]
    assert "| running |" in summary
    torch.save(train(Net(momentum=0.001)).state_dict(), tmp_path / "checkpoint.pt")
    codes, again = runner(job)
    assert codes == [3]
    assert "initial\\-share" in again or "initial-share" in again.removeprefix(summary)


def test_the_expectations_are_those_of_the_config(tmp_path):
    (tmp_path / "gate.yaml").write_text(BLOCKS["gate.yaml"])
    expect = load_config(tmp_path / "gate.yaml").expect
    assert (expect.test_accuracy, expect.cost, expect.worst_cost) == (0.9, 0.005, 0.2)
    page = (ROOT / "docs" / "pipeline.md").read_text()
    assert all(f"`{name}: " in page for name in type(expect).model_fields)
