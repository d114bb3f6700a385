"""One epoch of Fashion-MNIST with Lightning. Run it by itself or by end_to_end.py.

python lightning_script.py DATA [--steps N] [--workers N]

DATA is a torchvision root, holding FashionMNIST/raw. Prints a line of JSON at the end. Trainer's
defaults but for the device, the logger (CSV) and the progress bar (off, as without a terminal).
"""

from __future__ import annotations

import argparse
import json
import tempfile

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from network import SmallCnn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = SmallCnn()

    def training_step(self, batch, _):
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.log("train_loss", loss)
        self.log("train_accuracy", (logits.argmax(1) == labels).float().mean())
        return loss

    def validation_step(self, batch, _):
        images, labels = batch
        logits = self.model(images)
        self.log("test_loss", F.cross_entropy(logits, labels))
        self.log("test_accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    lightning.seed_everything(0)
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.2860,), (0.3530,))]
    )
    train_set = datasets.FashionMNIST(arguments.data, train=True, transform=transform)
    test_set = datasets.FashionMNIST(arguments.data, train=False, transform=transform)
    train_loader = DataLoader(
        train_set, batch_size=128, shuffle=True, drop_last=True, num_workers=arguments.workers
    )
    test_loader = DataLoader(test_set, batch_size=250, num_workers=arguments.workers)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            max_steps=arguments.steps,
            val_check_interval=100,
            logger=CSVLogger(folder),
            enable_progress_bar=False,
        )
        classifier = Classifier()
        trainer.fit(classifier, train_loader, test_loader)
        steps = trainer.global_step
        (final,) = trainer.validate(classifier, test_loader, verbose=False)
    print(json.dumps({"steps": steps, "test_accuracy": final["test_accuracy"]}))


if __name__ == "__main__":
    main()
