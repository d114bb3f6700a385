"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bnexp.analysis.comparison import Comparison
from bnexp.errors import Diverged, Interrupted
from bnexp.records import Run
from bnexp.training.build import Training, autocast, freeze_when_due
from bnexp.training.checkpoints import BEST, restore_best, save_checkpoint
from bnexp.training.display import Display
from bnexp.training.evaluations import Evaluations
from bnexp.training.logs import Logs
from bnexp.training.schedule import CheckpointClock
from bnexp.training.signals import Interruption


@dataclass(frozen=True)
class Result:
    """What a training ends with: the comparison, the weights it is about (`last` or `best`), and
    why the training stopped before its time, if it did."""

    comparison: Comparison
    weights: str
    message: str | None


def train(run: Run, training: Training, display: Display, interruption: Interruption) -> Result:
    """Train to the end, logging into `run`, and compare the model's statistics there.

    Goes on from `training.state`. Raises Diverged when the loss is not finite or the accuracy
    collapses, and Interrupted after a first signal, with a checkpoint written.
    """
    with Logs(run, training, display) as logs, interruption:
        evaluations = Evaluations(training, logs, display)
        if training.state.step < training.total_steps and not training.state.stopped:
            train_steps(run, training, display, logs, evaluations, interruption)
        interruption.at_once()
        return finish(run, training, logs, evaluations)


def train_steps(
    run: Run,
    training: Training,
    display: Display,
    logs: Logs,
    evaluations: Evaluations,
    interruption: Interruption,
) -> None:
    """The steps that are left, with looks at the numbers, evaluations and checkpoints between."""
    config, state, total = training.config, training.state, training.total_steps
    batch_size, check_every = config.training.batch_size, config.training.check_every
    model = torch.compile(state.model) if config.performance.compile else state.model
    batches = training.data.train.training_batches(batch_size, start_step=state.step)
    checkpoints = CheckpointClock(config.checkpoints)

    state.model.train()
    while state.step < total and not state.stopped:
        if state.step == config.statistics.freeze_from_step:
            freeze_when_due(training)
        lr = training.learning_rate
        loss, correct = train_step(training, model, batches, lr)
        state.step = step = state.step + 1
        logs.step(step, lr, loss, correct)
        for average in state.averages.values():
            average.update(step)

        if display.step(step, batch_size):
            logs.flush()
            display.numbers(logs.last)
        if step % check_every == 0:
            logs.flush()
            check(training, logs, display)
        if config.test.every and step % config.test.every == 0 and step < total:
            logs.flush()
            metric = evaluations.evaluate()
            state.model.train()
            if state.best.observe(step, metric):
                save(run, training, logs, best=training.best_file)
            else:
                state.stopped = state.best.reason_to_stop(step) or state.stopped
        if checkpoints.is_due(step) or step == total or state.stopped or interruption:
            logs.flush()
            save(run, training, logs)
        if interruption and step < total and not state.stopped:
            raise Interrupted(f"interrupted after step {step}; the checkpoint is written")


def train_step(
    training: Training,
    model: Callable[[Tensor], Tensor],
    batches: Iterator[tuple[Tensor, Tensor]],
    lr: float,
) -> tuple[Tensor, Tensor]:
    """One update of the weights and the estimators: its loss and how many answers were right.

    Nothing here waits for the device.
    """
    state, smoothing = training.state, training.config.training.label_smoothing
    x, y = next(batches)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with autocast(training.config, training.device):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.tracker:
        state.tracker.update()
    return loss.detach(), (logits.detach().argmax(dim=1) == y).sum()


def check(training: Training, logs: Logs, display: Display) -> None:
    """Fail on a collapse; lower the learning rate or stop on a plateau."""
    state = training.state
    step, ema = state.step, state.ema_accuracy.value
    state.collapse.observe(step, logs.lr, ema)
    if not state.plateau.observe(step, ema):
        return
    if state.plateau.is_last:
        state.stopped = (
            f"stopped at step {step}: the EMA training accuracy ({ema:.2%}) stopped improving"
        )
    else:
        display.line(
            f"step {step}: EMA training accuracy {ema:.2%} stopped improving; "
            f"learning rate now {training.learning_rate:.3g}"
        )


def save(run: Run, training: Training, logs: Logs, best: str | None = None) -> None:
    """A checkpoint of this step, also by the name `best`. Diverged if there is something in it
    that is not finite."""
    state, config = training.state, training.config
    if not state.is_finite:
        raise Diverged(
            f"diverged: the weights or the running statistics are no longer finite at step "
            f"{state.step} with learning rate {logs.lr:.3g}; lower "
            "training.optimizer.lr"
        )
    logs.sync()
    content = {"run": run.id, "config": config.to_yaml(), **state.state_dict()}
    save_checkpoint(run.checkpoints, content, config.checkpoints.keep, best)
    state.saved_step = state.step
    run.write_state("running", state.step, training.total_steps)


def finish(run: Run, training: Training, logs: Logs, evaluations: Evaluations) -> Result:
    """Evaluate the trained model under every kind of statistics and write comparison.json."""
    state = training.state
    logs.drop_evaluations_from(state.step)
    if state.best.improve(state.step, evaluations.evaluate(final=True)):
        save(run, training, logs, best=training.best_file)
    evaluations.evaluate_averages()
    weights, step, message = "last", state.step, state.stopped
    stopping, best = training.config.training.early_stopping, state.best.step
    if stopping and stopping.restore_best and best < state.step:
        if restore_best(run.checkpoints, BEST, best, state.step):
            weights, step = "best", best
            evaluations.evaluate_best(run.checkpoints / BEST)
        else:
            lost = f"the best weights, of step {best}, are lost: these are the last ones"
            message = f"{message}; {lost}" if message else lost
    comparison = evaluations.compare().along_the_run(run.test_accuracies())
    run.write_json("comparison.json", {"step": step, "weights": weights, **comparison.to_dict()})
    return Result(comparison, weights, message)
