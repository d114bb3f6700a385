"""Another domain: trained on clean Fashion-MNIST, tested on corrupted images."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as F

from bnexp.auditing import audit

FOLDER = Path("/usr/share/datasets/fashion-mnist")
needs_data = pytest.mark.skipif(
    not (FOLDER / "t10k-images-idx3-ubyte.gz").exists(), reason=f"needs Fashion-MNIST in {FOLDER}"
)


def read(part, count):
    def unpacked(name, offset):
        packed = (FOLDER / f"{part}-{name}-ubyte.gz").read_bytes()
        return np.frombuffer(gzip.decompress(packed), np.uint8, offset=offset)

    images, labels = unpacked("images-idx3", 16), unpacked("labels-idx1", 8)
    x = torch.from_numpy(images.reshape(-1, 1, 28, 28)[:count].copy())
    return x.float() / 255, torch.from_numpy(labels[:count].copy()).long()


def corrupted(x):
    """In fog, and out of focus."""
    return F.gaussian_blur(F.adjust_contrast(x, 0.4), [5, 5], [1.0, 1.0]) * 0.6 + 0.4


def normalized(x):
    return (x - 0.286) / 0.353


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    x, y = read("train", 12_800)
    x = normalized(x)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 36, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        chosen = slice(128 * (step % 100), 128 * (step % 100 + 1))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def test_images():
    x, y = read("t10k", 1000)
    x = normalized(corrupted(x))
    return list(zip(x[:500].split(250), y[:500].split(250), strict=True)), x[500:]


def accuracies(result):
    return {str(r.condition): r.accuracy for r in result.comparison.results}


@needs_data
@pytest.mark.slow
def test_unlabelled_images_of_another_domain_recover_accuracy(trained, test_images):
    test, unlabelled = test_images
    result = audit(trained, list(unlabelled.split(250)), test)
    found = accuracies(result)
    clean = audit(trained, list(unlabelled.split(250)),
                  [(normalized(x), y) for x, y in [read("t10k", 500)]])  # fmt: skip
    lost = accuracies(clean)["running"] - found["running"]
    assert lost > 0.2
    assert found["recomputed"] - found["running"] > 0.5 * lost
    (differ,) = [f for f in result.findings if f.code == "inputs-differ"]
    assert differ.recomputing_helps
    hurts = [f.code for f in clean.findings]
    assert "recomputing-hurts" in hurts, "clean images need clean statistics"


@needs_data
@pytest.mark.slow
def test_of_few_images_a_prior_makes_more(trained):
    x, y = read("t10k", 600)
    dark = normalized(F.adjust_brightness(x, 0.4))
    test = [(dark[:300], y[:300])]
    pairs = dark[500:512].split(2)
    found = [accuracies(audit(trained, [pair], test, prior=16)) for pair in pairs]
    blended, alone = (np.mean([f[name] for f in found]) for name in ("blended", "recomputed"))
    assert blended > alone + 0.1, "prior=16 does better than prior=0"
    assert blended > found[0]["running"] - 0.02
