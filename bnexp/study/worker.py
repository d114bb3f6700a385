"""What runs one training of a study, in the process that it is given."""

from __future__ import annotations

import time

import torch

from bnexp.config import resolve
from bnexp.config.yaml_text import parse_yaml
from bnexp.errors import Diverged, Interrupted, RunFailed, UserError, disk_failure
from bnexp.experiment import run_experiment
from bnexp.performance import prepare_process
from bnexp.records import Run
from bnexp.records.experiment import is_run
from bnexp.study.jobs import Ended, Job

LOCK_SECONDS = 120.0


def run_job(job: Job, handle_signals: bool = True) -> Ended:
    """Train, or go on training, in this process. Signals end it with a checkpoint."""
    try:
        torch.set_num_threads(job.threads)
        config = resolve(parse_yaml(job.config, job.key), [], job.key)
        prepare_process(config.performance.allocator, config.performance.tf32)
        run = Run(job.folder) if is_run(job.folder) else None
        if run is not None:
            _wait_for(run)
            state = run.state
            if state["state"] == "finished":
                return Ended("finished")
            if state["diverged"]:
                return Ended("diverged", state["message"])
        run_experiment(config, job.folder, resume=run, handle_signals=handle_signals)
    except Interrupted:
        return Ended("interrupted")
    except KeyboardInterrupt:
        return Ended("interrupted")
    except Diverged as error:
        return Ended("diverged", str(error))
    except (UserError, RunFailed) as error:
        return Ended("failed", str(error))
    except Exception as error:
        failure = disk_failure(error) or f"{type(error).__name__}: {error}"
        return Ended("failed", str(failure))
    return Ended("finished")


def _wait_for(run: Run) -> None:
    """A process of a study that was killed writes its checkpoint and ends by itself."""
    end = time.monotonic() + LOCK_SECONDS
    while run.is_locked() and time.monotonic() < end:
        time.sleep(0.1)
