"""Where and how a run was made, for environment.json."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
import uuid
from importlib import metadata
from typing import Any

from bnexp.printable import printable

# How many threads compute, and how they wait for one another (`bnexp.performance`).
_OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def describe_environment(
    seed: int, device: str, threads: int, processes: int = 1
) -> dict[str, Any]:
    """The content of a new run's environment.json.

    `threads` are torch's on a CPU, in each of the `processes`; both decide the last digits of
    sums. `id` tells the run's checkpoints from those of others.
    """
    return {
        "id": uuid.uuid4().hex,
        "created": _now(),
        "command": _command(),
        "seed": seed,
        "device": device,
        "processes": processes,
        "threads": threads,
        "openmp": {name: os.environ[name] for name in _OPENMP if name in os.environ},
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {
            package: _version(package)
            for package in ("bnexp", "torch", "torchvision", "numpy", "greenlet", "scipy")
        },
        "resumes": [],
    }


def describe_resume(
    step: int, threads: int, changes: dict[str, Any], processes: int = 1
) -> dict[str, Any]:
    """An entry of `resumes` in environment.json: when, from which step, with what changed."""
    return {
        "time": _now(),
        "step": step,
        "command": _command(),
        "processes": processes,
        "threads": threads,
        "openmp": {name: os.environ[name] for name in _OPENMP if name in os.environ},
        "changes": changes,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def _command() -> str:
    return printable(shlex.join(["bnexp", *sys.argv[1:]]))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
