"""A package that is optional and missing is said in a line, before anything is made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

import bnexp as library
from bnexp.errors import UserError
from bnexp.importing import require_extra

EXTRAS = ("tensorboard", "ray", "timm", "safetensors", "lightning")
STUDY = "base: {data: {name: digits}, model: {name: mlp}, training: {steps: 3}}\nseeds: 1\n"


@pytest.fixture
def without_extras(tmp_path):
    """A command line, in `tmp_path`, for which no extra is installed."""
    for name in EXTRAS:
        package = tmp_path / "missing" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "weights.safetensors").touch()
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'missing'}{os.pathsep}{ROOT}"}

    def run(*arguments):
        command = [sys.executable, "-m", "bnexp", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("train smoke logging.tensorboard=true", "pip install 'bnexp[tensorboard]'"),
        ("study study.yaml logging.tensorboard=true", "pip install 'bnexp[tensorboard]'"),
        ("study study.yaml --ray auto", "pip install 'bnexp[ray]'"),
        ("export nothing network.safetensors", "pip install 'bnexp[safetensors]'"),
        (
            "audit torchvision/resnet18 --weights weights.safetensors --population b --test c",
            "need safetensors: pip install",
        ),
    ],
)
def test_it_is_said_and_nothing_is_made(without_extras, arguments, said, tmp_path):
    done = without_extras(*arguments.split())
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_api_makes_no_folder_either(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = {
        "data": {"name": "digits"},
        "model": {"name": "mlp"},
        "training": {"steps": 1},
        "logging": {"tensorboard": True},
    }
    with pytest.raises(UserError, match="tensorboard"):
        library.run_experiment(config, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_every_extra_that_a_message_names_can_be_installed():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = "\n".join(path.read_text() for path in (ROOT / "bnexp").rglob("*.py"))
    named = set(re.findall(r"bnexp\[([a-z]+)\]", sources)) | {"tensorboard", "ray"}
    assert named <= declared["optional-dependencies"].keys()
    require_extra("json", "a test")
