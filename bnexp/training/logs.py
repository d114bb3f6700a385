"""What a training writes down: rows of steps.csv and evals.csv, and TensorBoard's events."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from bnexp.evaluation.evaluate import Evaluation
from bnexp.records import EVAL_COLUMNS, STEP_COLUMNS, CsvLog, Run
from bnexp.records.csv_log import Nowhere, RowLog
from bnexp.training.build import Training
from bnexp.training.display import Display
from bnexp.training.metrics import StepLog
from bnexp.training.tensorboard import Events


class Logs:
    """The logs of a run, continued after the training's step. A context manager."""

    def __init__(self, run: Run, training: Training, display: Display) -> None:
        config, state = training.config, training.state
        self._run = run
        self._display = display
        self._writes = training.processes.writes
        self._steps_csv: RowLog = Nowhere()
        self._evals_csv: RowLog = Nowhere()
        if self._writes:
            self._steps_csv = CsvLog(run.path / "steps.csv", STEP_COLUMNS, last_step=state.step)
            self._evals_csv = CsvLog(run.path / "evals.csv", EVAL_COLUMNS, last_step=state.step)
        self._steps = StepLog(
            self._steps_csv,
            state.ema_accuracy,
            config.training.batch_size,
            training.steps_per_epoch,
            min(config.training.check_every, training.total_steps),
            training.device,
            training.processes,
        )
        self.lr = training.learning_rate
        """Of the last step."""
        self._events: Events | None = None
        if config.logging.tensorboard and self._writes:
            self._events = Events(run.path / "tensorboard", first_step=state.step)

    @property
    def last(self) -> tuple | None:
        """The row of steps.csv that was written last in this process."""
        return self._steps.last

    def step(self, step: int, lr: float, loss: Tensor, correct: Tensor) -> None:
        """Take the loss and the number of right answers (0-dim tensors) of update `step`."""
        self.lr = lr
        self._steps.record(step, lr, loss, correct)

    def flush(self) -> None:
        """Write the rows of all steps so far. Diverged if a loss is not finite."""
        rows = self._steps.flush()
        self._tell_events(lambda events: events.steps(rows))

    def evaluation(self, rows: Sequence[tuple], found: Evaluation, eps: float) -> None:
        self._evals_csv.append(rows)
        self._tell_events(lambda events: events.evaluation(rows, found, eps))

    def drop_evaluations_from(self, step: int) -> None:
        if self._writes:
            self._evals_csv.close()
            self._evals_csv = CsvLog(self._run.path / "evals.csv", EVAL_COLUMNS, last_step=step - 1)

    def sync(self) -> None:
        self._steps_csv.sync()
        self._evals_csv.sync()

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps_csv.close()
        self._evals_csv.close()
        self._tell_events(lambda events: events.close())

    def _tell_events(self, what: Callable[[Events], None]) -> None:
        """Events that can't be written are no reason to end a training."""
        if self._events is None:
            return
        try:
            what(self._events)
        except Exception as error:  # whatever TensorBoard's writer raises
            self._display.warn(f"no more TensorBoard events: {type(error).__name__}: {error}")
            self._events = None
