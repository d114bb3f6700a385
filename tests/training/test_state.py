"""A checkpoint's content is what this training would have written, or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from bnexp.config import resolve
from bnexp.errors import UserError
from bnexp.training.build import build_training, freeze_when_due
from bnexp.training.loop import train_step

TREE = {
    "data": {"name": "digits", "limit": {"train": 200, "test": 50}},
    "model": {"name": "mlp"},
    "statistics": {"estimators": {"window": {"rule": "pooled", "window": 4}}},
    "training": {
        "steps": 10,
        "batch_size": 16,
        "averages": {"ema": {"decay": 0.9}, "swa": {"start": 0.1}},
    },
}


def made(**training):
    tree = {**TREE, "training": {**TREE["training"], **training}}
    return build_training(resolve(tree, [], "test"), torch.device("cpu"))


def stepped(training, steps=3):
    state = training.state
    batches = training.data.train.training_batches(16, start_step=state.step)
    state.model.train()
    losses = []
    for _ in range(steps):
        freeze_when_due(training)
        loss, _ = train_step(training, state.model, batches, 0.1)
        state.step += 1
        for average in state.averages.values():
            average.update(state.step)
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def saved():
    training = made()
    stepped(training)
    return copy.deepcopy(training.state.state_dict())


def test_a_training_goes_on_bit_for_bit(saved):
    whole, resumed = made(), made()
    stepped(whole)
    resumed.state.load_state_dict(copy.deepcopy(saved))
    assert resumed.state.step == resumed.state.saved_step == 3
    assert stepped(whole) == stepped(resumed)
    for one, other in zip(
        whole.state.averages["ema"].average, resumed.state.averages["ema"].average, strict=True
    ):
        assert torch.equal(one, other)


def edit(state, path, value):
    *parents, last = path
    for parent in parents:
        state = state[parent]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value(state[last]) if callable(value) else value


MODEL = ("model", "bn1.running_var")


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("model", "fc1.weight"), lambda t: t.double(), "fc1.weight"),
        (("model", "fc1.weight"), lambda t: t[:-1], "fc1.weight"),
        (("model", "fc1.weight"), lambda t: t * float("nan"), "finite"),
        (("model", "fc1.weight"), [1.0], "fc1.weight"),
        (("model", "fc1.weight"), KeyError, "fc1.weight"),
        (MODEL, lambda t: -t, "negative"),
        (("model",), 5, "model"),
        (("tracker",), {}, "tracker"),
        (("tracker",), None, "estimates"),
        (("tracker", "estimators"), {"other": "Ema(decay=0.9)"}, "tracker"),
        (("optimizer",), [], "param_groups"),
        (("optimizer", "param_groups"), lambda g: g[:1], "groups"),
        (("optimizer", "param_groups", 0, "momentum"), 0.123, "momentum"),
        (("optimizer", "state", 0, "momentum_buffer"), lambda t: t[:1], "momentum_buffer"),
        (("optimizer", "state", 0, "momentum_buffer"), lambda t: t / 0, "momentum_buffer"),
        (("optimizer", "state", 0, "momentum_buffer"), "text", "momentum_buffer"),
        (("optimizer", "state"), {99: {}}, "other parameters"),
        (("scaler",), {"scale": 1.0}, "scaler"),
        (("averages",), {}, "ema"),
        (("averages", "ema", "average"), lambda a: a[:-1], "averaged weights"),
        (("averages", "ema", "count"), "three", "averaged weights"),
        (("ema_accuracy", "biased"), "text", "biased"),
        (("plateau", "best_step"), 1.5, "best_step"),
        (("best",), None, "Best"),
        (("best", "metric"), [0.5], "metric"),
        (("collapse", "checks_at_chance"), KeyError, "checks_at_chance"),
        (("rng",), {}, "cpu"),
        (("rng", "cpu"), lambda t: t[:100], "rng"),
        (("rng", "cpu"), lambda t: t.float(), "rng"),
        (("stopped",), 5, "stopped"),
    ],
)
def test_what_no_training_writes_is_refused(saved, path, value, said):
    state = copy.deepcopy(saved)
    edit(state, path, value)
    with pytest.raises(UserError, match=said) as refused:
        made().state.load_state_dict(state)
    assert "\n" not in str(refused.value)


def test_another_optimizer_is_refused(saved):
    with pytest.raises(UserError):
        made(optimizer={"name": "adamw"}).state.load_state_dict(copy.deepcopy(saved))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_moments_in_another_memory_format_are_the_same_moments(name):
    """A checkpoint of a run without channels_last; fused steps would take them as they lie."""
    tree = {**TREE, "model": {"name": "small-cnn"}}
    tree["training"] = {**TREE["training"], "optimizer": {"name": name, "lr": 0.1}}
    config = resolve(tree, [], "test")
    whole, resumed = (build_training(config, torch.device("cpu")) for _ in range(2))
    stepped(whole)
    state = copy.deepcopy(whole.state.state_dict())
    for entries in state["optimizer"]["state"].values():
        for key, value in entries.items():
            entries[key] = value.contiguous()
    resumed.state.load_state_dict(state)
    assert stepped(whole) == stepped(resumed)
