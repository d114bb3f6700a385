"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnexp.analysis.comparison import Comparison
from bnexp.errors import Diverged, Interrupted
from bnexp.records import Run
from bnexp.training.build import Training, autocast, freeze_when_due
from bnexp.training.checkpoints import BEST, load_checkpoint, restore_best, save_checkpoint
from bnexp.training.display import Display
from bnexp.training.evaluations import Evaluations
from bnexp.training.logs import Logs
from bnexp.training.processes import Wishes, by_rank_0
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
            with training.processes.stepping():
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
    processes = training.processes
    model = processes.parallel(state.model)
    if config.performance.compile:
        model = torch.compile(state.model)
    batches = training.data.train.training_batches(
        batch_size, start_step=state.step, share=processes.share
    )
    clock = CheckpointClock(config.checkpoints)
    wishes = Wishes(processes, display, clock, interruption, batch_size)

    state.model.train()
    while state.step < total and not state.stopped:
        if state.step == config.statistics.freeze_from_step:
            freeze_when_due(training)
        lr = training.learning_rate
        step = state.step + 1
        end_of_step = wishes.begin(step)
        loss, correct = train_step(training, model, batches, lr)
        state.step = step
        logs.step(step, lr, loss, correct)
        for average in state.averages.values():
            average.update(step)
        end_of_step()

        if wishes.show:
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
        if wishes.save or step == total or state.stopped or wishes.stop:
            logs.flush()
            save(run, training, logs)
        if wishes.stop and step < total and not state.stopped:
            raise Interrupted(f"interrupted after step {step}; the checkpoint is written")


def train_step(
    training: Training,
    model: Callable[[Tensor], Tensor],
    batches: Iterator[tuple[Tensor, Tensor]],
    lr: float,
) -> tuple[Tensor, Tensor]:
    """One update of the weights and the estimators: its loss and how many answers were right; of
    several processes, each one's part of both.

    Nothing here waits for the device, but where BN layers normalize over several processes.
    """
    state, processes, settings = training.state, training.processes, training.config.training
    x, y = next(batches)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with autocast(training.config, training.device), processes.drawing():
        logits = model(x)
    loss = processes.loss(logits.float(), y, settings.label_smoothing, settings.batch_size)
    state.scaler.scale(processes.for_backward(loss)).backward()
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
    that is not finite, or that not all processes have alike."""
    state, config, processes = training.state, training.config, training.processes
    state.merge()
    if not state.is_finite:
        raise Diverged(
            f"diverged: the weights or the running statistics are no longer finite at step "
            f"{state.step} with learning rate {logs.lr:.3g}; lower "
            "training.optimizer.lr"
        )
    processes.check_alike(state.model, state.step)
    logs.sync()
    content = state.state_dict()
    state.saved_step = state.step
    if processes.writes:
        content = {"run": run.id, "config": config.to_yaml(), **content}
        save_checkpoint(run.checkpoints, content, config.checkpoints.keep, best)
        run.write_state("running", state.step, training.total_steps)


def finish(run: Run, training: Training, logs: Logs, evaluations: Evaluations) -> Result:
    """Evaluate the trained model under every kind of statistics and write comparison.json."""
    state, ranks = training.state, training.processes.ranks
    logs.drop_evaluations_from(state.step)
    if state.best.improve(state.step, evaluations.evaluate(final=True)):
        save(run, training, logs, best=training.best_file)
    evaluations.evaluate_averages()
    weights, step, message = "last", state.step, state.stopped
    stopping, best = training.config.training.early_stopping, state.best.step
    if stopping and stopping.restore_best and best < state.step:
        kept = by_rank_0(ranks, "the best weights", lambda: _best(run, best, state.step))
        if kept is not None:
            weights, step = "best", best
            evaluations.evaluate_best(kept)
        else:
            lost = f"the best weights, of step {best}, are lost: these are the last ones"
            message = f"{message}; {lost}" if message else lost
    found = evaluations.compare()

    def write() -> Comparison:
        whole = found.along_the_run(run.test_accuracies())
        run.write_json("comparison.json", {"step": step, "weights": weights, **whole.to_dict()})
        return whole

    return Result(by_rank_0(ranks, "the comparison", write), weights, message)


def _best(run: Run, step: int, now: int) -> dict[str, Any] | None:
    """The state after `step`, the best one; None if it is lost."""
    if restore_best(run.checkpoints, BEST, step, now):
        return load_checkpoint(run.checkpoints / BEST)
    return None
