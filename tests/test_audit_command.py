"""`bnexp audit` as its users meet it: their project, their checkpoint, their data."""

import json
import shutil

import numpy as np
import pytest
import torch
from audited import Net, samples, train
from PIL import Image
from torch import nn

from bnexp.analysis.comparison import Comparison
from bnexp.records.audit import AuditRecord
from bnexp.report.audit_page import render_record
from bnexp.statistics import Statistics

PROJECT = {
    "her_project/__init__.py": "",
    "her_project/model.py": """
from torch import nn

class Net(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8, momentum=momentum)
        self.conv2 = nn.Conv2d(8, 16, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(16, momentum=momentum)
        self.fc1 = nn.Linear(16, 12, bias=False)
        self.bn3 = nn.BatchNorm1d(12, momentum=momentum)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu().mean((2, 3))
        return self.fc2(self.bn3(self.fc1(x)).relu())

def build(**arguments):
    return Net(**arguments)

class Segmenter(nn.Module):
    "Foreground where a pixel is bright."
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(1)

    def forward(self, image):
        return {"out": self.bn(image)}
""",
    "her_project/data.py": """
import torch
from torch.utils.data import TensorDataset

def dataset(part):
    return TensorDataset(*torch.load(f"{part}.pt"))

def masks(seed):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(8):
        image = 3 + 2 * torch.randn(16, 1, 8, 8, generator=generator)
        batches.append({"image": image, "mask": image > 3})
    return batches

def forward(model, batch):
    return model(batch["image"])["out"]

def iou(output, batch):
    found, mask = output > 0, batch["mask"]
    both = (found & mask).flatten(1).sum(1).double()
    return both / (found | mask).flatten(1).sum(1)
""",
}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return train(Net(momentum=0.002))


@pytest.fixture
def project(bnexp, trained):
    """Her folder: code, data, and a checkpoint from DataParallel with decay 0.998."""
    for name, text in PROJECT.items():
        path = bnexp.cwd / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for part, seed in (("train", 1), ("val", 2)):
        torch.save(samples(600, seed), bnexp.cwd / f"{part}.pt")
    state = nn.DataParallel(trained).state_dict()
    torch.save({"epoch": 3, "model_state_dict": state}, bnexp.cwd / "her.ckpt")
    return bnexp


AUDIT = (
    "audit", "her_project.model:build", "--weights", "her.ckpt",
    "--population", "her_project.data:dataset", "--test", "her_project.data:dataset",
    "data.population_arguments.part=train", "data.test_arguments.part=val",
)  # fmt: skip


def test_from_symptom_to_mended_checkpoint(project):
    done = project(*AUDIT, "--mend", "mended.ckpt", "--name", "mine")
    assert done.code == 0, done.stderr
    assert "her.ckpt: " in done.stderr and "under 'model_state_dict'" in done.stderr
    assert done.stdout.startswith("1 finding to look into: initial-share")
    assert "mended: mended.ckpt" in done.stderr
    before, after = (torch.load(project.cwd / n) for n in ("her.ckpt", "mended.ckpt"))
    assert list(before) == list(after) and after["epoch"] == 3
    name = "module.bn1.running_var"
    assert not torch.equal(before["model_state_dict"][name], after["model_state_dict"][name])

    again = project(*AUDIT[:2], "--weights", "mended.ckpt", *AUDIT[4:], "--json", "expect.cost=0")
    assert again.code == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["comparison"]["outcome"] in ("identical", "agree")
    assert found["findings"] == [] and found["record"] == "runs/audit-1"

    record = AuditRecord(project.cwd / "runs" / "mine-1")
    comparison = Comparison.from_dict(record.comparison)
    assert comparison.verdict.outcome == "baseline-worse"
    recomputed = Statistics.load(record.path / "statistics" / "recomputed.pt")
    written = after["model_state_dict"]["module.bn2.running_mean"]
    assert torch.equal(recomputed.mean["bn2"].float(), written)
    assert json.loads((record.path / "state.json").read_text())["state"] == "finished"
    page = (record.path / "report.html").read_text()
    assert page == render_record(record)
    assert (
        "initial-share" in page
        and "http" not in page.replace("http-equiv", "")
        and "<script" not in page
    )
    (record.path / "report.html").unlink()
    assert project("report", "mine-1").code == 0
    assert (record.path / "report.html").read_text() == page
    same = project("audit", "runs/mine-1/config.yaml", "--json")
    assert json.loads(same.stdout)["comparison"] == record.comparison


def test_a_gate_for_ci_speaks_by_the_interval(project):
    done = project(*AUDIT, "--json")
    paired = json.loads(done.stdout)["comparison"]["kinds"][1]["versus_baseline"]
    low = paired["difference_interval"][0]
    assert low < paired["difference"] - 0.002
    assert project(*AUDIT, f"expect.cost={low + 0.001}").code == 0
    unmet = project(*AUDIT, f"expect.cost={low - 0.001}")
    assert unmet.code == 3
    assert "expect.cost: running was to cost" in unmet.stderr


def test_a_segmentation_model_with_its_own_score(project):
    done = project(
        "audit", "her_project.model:Segmenter", "forward=her_project.data:forward",
        "score=her_project.data:iou", "score_name=IoU", "--json",
        "--population", "her_project.data:masks", "--test", "her_project.data:masks",
        "data.population_arguments.seed=1", "data.test_arguments.seed=2",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["comparison"]["score"] == "IoU"
    assert "in IoU" in found["comparison"]["verdict"]
    assert found["findings"][0]["code"] == "as-constructed"
    assert found["comparison"]["kinds"][1]["accuracy"] > 0.9


def test_a_folder_per_class(bnexp):
    """A torchvision model whose number of classes is read from its weights."""
    from torchvision import models

    torch.manual_seed(0)
    state = models.resnet18(num_classes=2).state_dict()
    torch.save(nn.DataParallel(models.resnet18(num_classes=2)).state_dict(), bnexp.cwd / "her.pt")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = bnexp.cwd / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    done = bnexp(
        "audit", "torchvision/resnet18", "--weights", "her.pt", "--population", "data/train",
        "--test", "data/val", "data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]",
        "data.batch_size=8", "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["comparison"]["classes"] == ["cat", "dog"]
    assert found["findings"][0]["code"] == "as-constructed" and len(state) == 122


def test_timm_checkpoint_with_an_average(bnexp):
    timm = pytest.importorskip("timm")
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4, in_chans=1)
    average = ModelEmaV3(model, decay=0.5)
    model.train()
    with torch.no_grad():
        for seed in range(30):
            x = samples(32, seed)[0]
            model(x)
            model.fc.weight.add_(0.01)
            average.update(model)
    content = {"arch": "resnet10t", "state_dict": model.state_dict()}
    content["state_dict_ema"] = average.module.state_dict()
    torch.save(content, bnexp.cwd / "last.pth.tar")
    (bnexp.cwd / "d.py").write_text(
        "import torch\n"
        "def data():\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    return [(torch.randn(32, 1, 10, 10, generator=g), torch.arange(32) % 4)] * 2\n"
    )
    arguments = (
        "audit", "timm/resnet10t", "--weights", "last.pth.tar", "--population", "d:data",
        "--test", "d:data", "model.arguments.in_chans=1",
    )  # fmt: skip
    done = bnexp(*arguments)
    assert done.code == 0, done.stderr
    assert "timm/resnet10t with 4 classes, as in the weights" in done.stderr
    assert "also there: state_dict_ema; --key chooses" in done.stderr
    done = bnexp(*arguments, "--key", "state_dict_ema", "--json")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("audit",), "say what to audit"),
        (("audit", "her_project.model:build"), "--population with a folder per class"),
        (
            ("audit", "her_project.model:build", "--population", "x"),
            "say which images with labels, to test on: --test",
        ),
        (("audit", "torchvision/resnet18", "--population", "x", "--test", "y"), "random weights"),
        (
            ("audit", "her_project.model:build", "--population", "x", "--test", "y", "data.crop=4"),
            "as the config says: middle 4 px; values from 0 to 1, no mean or std",
        ),
        (("audit", "torchvision/resnet19", "--population", "x", "--test", "y"), "did you mean"),
        ((*AUDIT, "--mend", "her.ckpt"), "--mend her.ckpt exists"),
        ((*AUDIT, "--key", "ema"), "no tensors under 'ema'; there: 'model_state_dict'"),
        ((*AUDIT, "data.btch_size=3"), "did you mean batch_size"),
        ((*AUDIT, "data.test_arguments.part=vall"), "vall.pt"),
        ((*AUDIT, "score=her_project.data:nothing"), "has no nothing"),
        ((*AUDIT, "another.model:build"), "one config and one model"),
        (("audit", "none.yaml"), "no config at none.yaml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(project, arguments, said):
    done = project(*arguments)
    assert said in done.stderr
    if "vall" not in said:
        assert done.code == 2 and done.stderr.strip().splitlines()[-1].startswith("bnexp: ")
    assert not (project.cwd / "runs").exists()


def test_a_worker_that_dies_is_one_line(project):
    (project.cwd / "dying.py").write_text(
        "import os, torch\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 200\n"
        "    def __getitem__(self, index): os._exit(3)\n"
    )
    arguments = (*AUDIT[:4], "--population", "dying:Data", "--test", "dying:Data")
    done = project(*arguments, "data.workers=1")
    assert done.code == 1 and "Traceback" not in done.stderr
    assert "DataLoader worker" in done.stderr.splitlines()[-1]
    assert "data.workers=0" in done.stderr.splitlines()[-1]


def test_mending_is_refused_where_it_does_not_help(project, trained):
    x, y = samples(600, 1)
    torch.save((0.02 * x, y), project.cwd / "train.pt")
    shutil.copy(project.cwd / "her.ckpt", project.cwd / "good.ckpt")
    torch.manual_seed(0)
    torch.save(train(Net(0.1)).state_dict(), project.cwd / "good.ckpt")
    arguments = (*AUDIT[:3], "good.ckpt", *AUDIT[4:], "--mend", "mended.ckpt")
    done = project(*arguments)
    assert done.code == 2 and "recomputing-hurts" in done.stderr
    assert not (project.cwd / "mended.ckpt").exists()
    assert project(*arguments, "--force").code == 0
    assert (project.cwd / "mended.ckpt").exists()
