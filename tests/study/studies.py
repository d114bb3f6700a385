"""Small studies for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bnexp.config.yaml_text import parse_yaml
from bnexp.records.study import StudyRecord
from bnexp.study.file import Study, make_study
from bnexp.study.run import Plan, plan_study

ROOT = Path(__file__).parents[2]

SMALL = """
name: small
base:
  data: {name: digits, limit: {train: 200}}
  model: {name: mlp}
  training: {steps: 6, batch_size: 20, optimizer: {name: sgd, lr: 0.1}}
  test: {every: 3, statistics: [running, recomputed]}
  statistics: {recompute: {samples: 100}}
"""

DECAYS = """
vary:
  statistics.decay: [0.5, 0.9, 0.99]
  training.batch_size: [10, 20]
seeds: 2
"""


def study_of(text: str, *overrides: str) -> Study:
    return make_study(parse_yaml(text, "a study"), overrides, "a study")


def plan_of(text: str, *overrides: str, fold: bool = True) -> Plan:
    return plan_study(study_of(text, *overrides), fold)


def start(cwd: Path, *arguments: object, **environment: str) -> subprocess.Popen:
    """`bnexp study` in a process group of its own, its output in files beside it."""
    with open(cwd / "stdout", "w") as out, open(cwd / "stderr", "w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "bnexp", "study", *map(str, arguments)],
            cwd=cwd,
            stdout=out,
            stderr=err,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        )


def run(cwd: Path, *arguments: object, seconds: float = 300, **environment: str) -> int:
    return start(cwd, *arguments, **environment).wait(seconds)


def rows_of(record: StudyRecord) -> list[dict[str, str]]:
    """The rows of results.csv without the identity of the training that answered."""
    return [
        {key: value for key, value in row.items() if key != "experiment"}
        for row in record.results()[1]
    ]
