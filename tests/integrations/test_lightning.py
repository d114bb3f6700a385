"""The callback in a real Trainer."""

import logging

import pytest
import torch
from audited import Net, samples
from torch import nn

from bnexp.statistics import recompute_statistics, running_statistics

lightning = pytest.importorskip("lightning.pytorch")

from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from bnexp.integrations.lightning import RecomputeStatistics  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net(momentum=0.01)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def fit(tmp_path, callbacks):
    torch.manual_seed(0)
    module = Module()
    train = DataLoader(TensorDataset(*samples(512, 1)), batch_size=64)
    val = DataLoader(TensorDataset(*samples(256, 2)), batch_size=64)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, train, val)
    return module, trainer, train


@pytest.mark.filterwarnings("ignore")
def test_both_accuracies_are_logged_and_training_is_as_without(tmp_path):
    module, trainer, train = fit(tmp_path, [RecomputeStatistics(keep=False)])
    plain, other, _ = fit(tmp_path, [])
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    logged = trainer.callback_metrics
    assert float(logged["val_accuracy_running"]) == pytest.approx(
        float(other.callback_metrics["val_accuracy"])
    )
    recomputed = recompute_statistics(module, train)
    x, y = samples(256, 2)
    with torch.no_grad(), recomputed.applied_to(module.eval()):
        expected = (module(x).argmax(1) == y).float().mean()
    assert float(logged["val_accuracy_recomputed"]) == pytest.approx(float(expected))


@pytest.mark.filterwarnings("ignore")
def test_the_module_ends_with_recomputed_statistics(tmp_path):
    module, _, train = fit(tmp_path, [RecomputeStatistics()])
    held, recomputed = running_statistics(module), recompute_statistics(module, train)
    for name in held.names:
        assert torch.equal(held.var[name], recomputed.var[name].float())
