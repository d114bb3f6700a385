"""One epoch of Fashion-MNIST as most PyTorch scripts do it. Run it by itself or by end_to_end.py.

python usual_script.py DATA [--steps N] [--workers N]

DATA is a torchvision root, holding FashionMNIST/raw. Prints a line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from network import SmallCnn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def test(model, loader) -> tuple[float, float]:
    model.eval()
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loader:
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
    return loss / count, correct / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.2860,), (0.3530,))]
    )
    train_set = datasets.FashionMNIST(arguments.data, train=True, transform=transform)
    test_set = datasets.FashionMNIST(arguments.data, train=False, transform=transform)
    train_loader = DataLoader(
        train_set, batch_size=128, shuffle=True, drop_last=True, num_workers=arguments.workers
    )
    test_loader = DataLoader(test_set, batch_size=250, num_workers=arguments.workers)

    model = SmallCnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for step, (images, labels) in enumerate(train_loader, start=1):
        model.train()
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss_value = loss.item()
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        if step % 100 == 0:
            test_loss, test_accuracy = test(model, test_loader)
            print(
                f"step {step}: loss {loss_value:.4f}, accuracy {accuracy:.4f}, "
                f"test loss {test_loss:.4f}, test accuracy {test_accuracy:.4f}",
                flush=True,
            )
        if step == arguments.steps:
            break
    _, test_accuracy = test(model, test_loader)
    print(json.dumps({"steps": step, "test_accuracy": test_accuracy}))


if __name__ == "__main__":
    main()
