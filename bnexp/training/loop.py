"""The training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bnexp.analysis.comparison import Comparison
from bnexp.condition import Condition, Weights, made_by
from bnexp.config.schema import CheckpointsConfig
from bnexp.errors import Interrupted, NotFinite, RunFailed
from bnexp.evaluation.evaluate import Evaluation, Source, compare_evaluation, evaluate
from bnexp.records import EVAL_COLUMNS, STEP_COLUMNS, CsvLog, Run
from bnexp.training.checkpoints import load_checkpoint, save_checkpoint
from bnexp.training.display import Display
from bnexp.training.metrics import StepLog
from bnexp.training.optimization import learning_rate
from bnexp.training.session import Session
from bnexp.training.subject import run_sources, run_subject

# The EMA accuracy has collapsed when it once was this far above chance, and has now been
# this close to it for so many checks in a row.
LEARNED = 0.2
COLLAPSED = 0.05
COLLAPSED_CHECKS = 10


@dataclass(frozen=True)
class Outcome:
    """What a training ends with: the comparison, the weights it is about (`last` or `best`), and
    why the training stopped before its time, if it did."""

    comparison: Comparison
    weights: str
    message: str | None


def train(run: Run, session: Session, display: Display) -> Outcome:
    """Train `session` to its end, logging into `run`, and compare its statistics at the end.

    Continues from `session.step`. Raises RunFailed when the loss is not finite or the accuracy
    collapses, and Interrupted after a first SIGINT or SIGTERM, with a checkpoint written.
    """
    with Logs(run, session.step) as logs, _Interruption() as interruption:
        trainer = Trainer(run, session, display, logs)
        if session.step < session.total_steps and not session.stopped:
            trainer.train(interruption)
        interruption.at_once()
        return trainer.finish()


class _Interruption:
    """True once SIGINT or SIGTERM has come; the second one raises KeyboardInterrupt at once."""

    def __enter__(self) -> _Interruption:
        self.requested = False
        self._wait_for_step = True
        self._former = {}
        with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._request)
        return self

    def _request(self, number, frame) -> None:
        if self.requested or not self._wait_for_step:
            raise KeyboardInterrupt
        self.requested = True

    def at_once(self) -> None:
        """From now on there is no step to finish: a signal interrupts at once."""
        self._wait_for_step = False
        if self.requested:
            raise KeyboardInterrupt

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.requested


class Logs:
    """The two CSV files of a run, continued after `step`."""

    def __init__(self, run: Run, step: int) -> None:
        self._run = run
        self.steps = CsvLog(run.path / "steps.csv", STEP_COLUMNS, last_step=step)
        self.evals = CsvLog(run.path / "evals.csv", EVAL_COLUMNS, last_step=step)

    def drop_evals_from(self, step: int) -> None:
        self.evals.close()
        self.evals = CsvLog(self._run.path / "evals.csv", EVAL_COLUMNS, last_step=step - 1)

    def __enter__(self) -> Logs:
        return self

    def sync(self) -> None:
        self.steps.sync()
        self.evals.sync()

    def __exit__(self, *_) -> None:
        self.steps.close()
        self.evals.close()


class Trainer:
    def __init__(self, run: Run, session: Session, display: Display, logs: Logs) -> None:
        self.run = run
        self.session = session
        self.config = session.config
        self.display = display
        self.logs = logs
        self.step_log = StepLog(
            logs.steps,
            session.ema_accuracy,
            self.config.training.batch_size,
            session.steps_per_epoch,
            min(self.config.training.check_every, session.total_steps),
            session.device,
        )
        self.events = None
        if self.config.logging.tensorboard:
            from bnexp.training.tensorboard import Events

            self.events = Events(run.path / "tensorboard", first_step=session.step)

    # ------------------------------------------------------------------------------- the loop

    def train(self, interruption: _Interruption) -> None:
        session, config = self.session, self.config
        training, test = config.training, config.test
        total, batch_size = session.total_steps, training.batch_size
        model = torch.compile(session.model) if config.performance.compile else session.model
        swa_start, swa_every = self._swa_steps()
        checkpoint_due = _CheckpointClock(config.checkpoints)
        batches = session.data.train.training_batches(batch_size, start_step=session.step)

        session.model.train()
        while session.step < total and not session.stopped:
            session.freeze_when_due()
            lr = self._learning_rate()
            x, y = next(batches)
            loss, correct = self._update(model, x, y, lr)
            session.step = step = session.step + 1
            self.step_log.record(step, lr, loss, correct)
            if "ema" in session.averages:
                session.averages["ema"].update()
            if "swa" in session.averages and step > swa_start and step % swa_every == 0:
                session.averages["swa"].update()

            if self.display.step(step, batch_size):
                self._flush()
                self.display.numbers(self.step_log.last)
            if step % training.check_every == 0:
                self._flush()
                self._check()
            if test.every and step % test.every == 0 and step < total:
                self._flush()
                self._evaluate()
                session.model.train()
            if checkpoint_due(step) or step == total or session.stopped or interruption:
                self._flush()
                self._save()
            if interruption and step < total and not session.stopped:
                raise Interrupted(f"interrupted after step {step}; the checkpoint is written")

    def _update(self, model, x, y, lr: float):
        """One step of the optimizer. Nothing here waits for the device."""
        session = self.session
        for group in session.optimizer.param_groups:
            group["lr"] = lr
        with session.autocast():
            logits = model(x)
        loss = F.cross_entropy(
            logits.float(), y, label_smoothing=self.config.training.label_smoothing
        )
        session.scaler.scale(loss).backward()
        session.scaler.step(session.optimizer)
        session.scaler.update()
        session.optimizer.zero_grad(set_to_none=True)
        if session.tracker:
            session.tracker.update()
        correct = (logits.detach().argmax(dim=1) == y).sum()
        return loss.detach(), correct

    def _learning_rate(self) -> float:
        training = self.config.training
        return learning_rate(
            training.schedule,
            training.optimizer.lr,
            self.session.step,
            self.session.total_steps,
            self.session.plateau.reductions,
        )

    def _swa_steps(self) -> tuple[int, int]:
        swa = self.config.training.averages.swa
        if swa is None:
            return 0, 1
        start = round(swa.start * self.session.total_steps)
        return start, swa.every or min(
            self.session.steps_per_epoch, max(1, self.session.total_steps - start)
        )

    # ------------------------------------------------------------------ looking at the numbers

    def _flush(self) -> None:
        rows = self.step_log.flush()
        if self.events:
            self.events.steps(rows)

    def _check(self) -> None:
        """Stop on a collapse; lower the learning rate or stop on a plateau."""
        session = self.session
        schedule = self.config.training.schedule
        step, _, lr, _, _, ema = self.step_log.last
        chance = 1 / len(session.data.info.classes)
        session.best_ema_accuracy = max(session.best_ema_accuracy, ema)
        learned = session.best_ema_accuracy > chance + LEARNED * (1 - chance)
        at_chance = ema < chance + COLLAPSED * (1 - chance)
        session.checks_at_chance = session.checks_at_chance + 1 if learned and at_chance else 0
        if session.checks_at_chance >= COLLAPSED_CHECKS:
            raise RunFailed(
                f"collapsed: by step {step} the EMA training accuracy has long been at chance "
                f"({ema:.1%}) after {session.best_ema_accuracy:.1%} (learning rate {lr:.3g}); "
                "lower training.optimizer.lr"
            )
        if schedule.name != "plateau" or not session.plateau.observe(schedule, step, ema):
            return
        if schedule.reductions is not None and session.plateau.reductions > schedule.reductions:
            session.stopped = (
                f"stopped at step {step}: the EMA training accuracy ({ema:.2%}) stopped improving"
            )
        else:
            self.display.line(
                f"step {step}: EMA training accuracy {ema:.2%} stopped improving; "
                f"learning rate now {self._learning_rate():.3g}"
            )

    def _assess(self, final: bool) -> tuple[Evaluation, float | None]:
        """Evaluate under all conditions, write the rows, and say by what the best is chosen."""
        session, config = self.session, self.config
        data, model = session.data, session.model
        with session.autocast(), self._diverged_if_not_finite():
            kinds = self._sources(final)
            baseline = next(iter(kinds))
            only_baseline = {baseline: kinds[baseline]}
            fold = config.performance.fold_batchnorm
            found = evaluate(run_subject(model, data, config), kinds, fold=fold)
            rows = found.rows(session.step, "test")
            metric = found.predictions[baseline].accuracy
            if config.test.train_accuracy:
                on_train = evaluate(
                    run_subject(model, data, config, data.train), only_baseline, fold=fold
                )
                rows += on_train.rows(session.step, "train")
            if data.val is not None:
                on_val = evaluate(
                    run_subject(model, data, config, data.val), only_baseline, fold=fold
                )
                rows += on_val.rows(session.step, "val")
                on_val = on_val.predictions[baseline]
                stopping = config.training.early_stopping
                by_loss = stopping and stopping.metric == "val_loss"
                metric = -on_val.mean_loss if by_loss else on_val.accuracy
        self.logs.evals.append(rows)
        self.display.test_accuracy(found.predictions[baseline].accuracy, session.step)
        if self.events:
            self.events.evaluation(rows, found, config.model.eps)
        return found, metric if math.isfinite(metric) else None

    @contextlib.contextmanager
    def _diverged_if_not_finite(self) -> Iterator[None]:
        try:
            yield
        except NotFinite as error:
            raise RunFailed(
                f"diverged: at {self._when()} the activations are no longer finite ({error}); "
                "lower training.optimizer.lr"
            ) from None

    def _when(self) -> str:
        lr = self.step_log.last[2] if self.step_log.last else self._learning_rate()
        return f"step {self.session.step} with learning rate {lr:.3g}"

    def _sources(self, final: bool, weights: Weights = "trained") -> dict[Condition, Source]:
        session, wanted = self.session, self.config.test.statistics
        return run_sources(
            run_subject(session.model, session.data, self.config),
            session.estimates(),
            self.config,
            recompute=final or "recomputed" in wanted,
            batch="batch" in wanted,
            weights=weights,
        )

    def _evaluate(self) -> None:
        session = self.session
        _, metric = self._assess(final=False)
        stopping = self.config.training.early_stopping
        min_delta = stopping.min_delta if stopping else 0.0
        if self._is_best(metric, min_delta):
            session.best_metric, session.best_step = metric, session.step
            session.evaluations_without_improvement = 0
            self._save(best=True)
            return
        session.evaluations_without_improvement += 1
        if stopping and session.evaluations_without_improvement >= stopping.patience:
            session.stopped = (
                f"stopped early at step {session.step}: {stopping.metric} has not improved since "
                f"step {session.best_step}"
            )

    def _is_best(self, metric: float | None, min_delta: float = 0.0) -> bool:
        best = self.session.best_metric
        return metric is not None and (best is None or metric > best + min_delta)

    def _save(self, best: bool = False) -> None:
        session = self.session
        if not _all_finite(session.model):
            raise RunFailed(
                f"diverged: the weights or the running statistics are no longer finite at "
                f"{self._when()}; lower training.optimizer.lr"
            )
        self.logs.sync()
        save_checkpoint(
            self.run.checkpoints, session.state_dict(), self.config.checkpoints.keep, best
        )
        self.run.write_state("running", session.step, session.total_steps)

    # --------------------------------------------------------------------------------- the end

    def finish(self) -> Outcome:
        """Evaluate the trained model under every kind of statistics and write comparison.json."""
        session, config = self.session, self.config
        self.logs.drop_evals_from(session.step)
        found, metric = self._assess(final=True)
        if self._is_best(metric):
            session.best_metric, session.best_step = metric, session.step
            self._save(best=True)
        averaged = Evaluation()
        for name, average in session.averages.items():
            if average.count:
                averaged |= self._assess_average(name)
            else:
                self.display.line(f"no {name} weights were averaged: the run ended too early")
        stopping = config.training.early_stopping
        weights, step = "last", session.step
        if stopping and stopping.restore_best and session.best_step < session.step:
            weights, step = "best", session.best_step
            best = load_checkpoint(self.run.checkpoints / "best.pt")
            session.load_weights(best)
            with session.autocast():
                found = evaluate(
                    run_subject(session.model, session.data, config),
                    self._sources(final=True, weights="best"),
                    fold=config.performance.fold_batchnorm,
                )
        with session.autocast():
            comparison = compare_evaluation(
                run_subject(session.model, session.data, config),
                found | averaged,
                made_by(config.model_dump(mode="json")),
            )
        self.run.write_json(
            "comparison.json", {"step": step, "weights": weights, **comparison.to_dict()}
        )
        if self.events:
            self.events.close()
        return Outcome(comparison, weights, session.stopped)

    def _assess_average(self, name: Weights) -> Evaluation:
        """Averaged weights with recomputed statistics and, to show why, the trained model's."""
        session = self.session
        subject = run_subject(session.averaged_model(name), session.data, self.config)
        with session.autocast(), self._diverged_if_not_finite():
            kinds = run_sources(
                subject, session.estimates(), self.config, recompute=True, weights=name
            )
            if session.has_batchnorm:
                shown = (Condition("recomputed", name), Condition("running", name))
                kinds = {condition: kinds[condition] for condition in shown}
            return evaluate(subject, kinds, fold=self.config.performance.fold_batchnorm)


class _CheckpointClock:
    """Says when the next checkpoint is due, by steps or by time."""

    def __init__(self, config: CheckpointsConfig) -> None:
        self._config = config
        self._last = time.monotonic()

    def __call__(self, step: int) -> bool:
        every_steps, every_seconds = self._config.every_steps, self._config.every_seconds
        by_steps = every_steps is not None and step % every_steps == 0
        by_time = every_seconds is not None and time.monotonic() - self._last >= every_seconds
        if by_steps or by_time:
            self._last = time.monotonic()
        return by_steps or by_time


def _all_finite(model: torch.nn.Module) -> bool:
    """Whether every parameter and running statistic is finite. Waits for the device once."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return bool(torch.stack([t.detach().isfinite().all() for t in tensors]).all())
