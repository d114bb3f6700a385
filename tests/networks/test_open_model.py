"""The user's model by name."""

import pytest
import torch
from torch import nn

from bnexp.errors import UserError
from bnexp.networks.open import open_model


def test_torchvision_and_timm_models_come_in_evaluation_mode():
    model = open_model("torchvision/resnet18", {"num_classes": 5})
    assert model.fc.out_features == 5 and not model.training
    assert open_model("timm/resnet10t", {"num_classes": 3}).get_classifier().out_features == 3


def test_a_segmentation_model_downloads_no_backbone(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    model = open_model("torchvision/fcn_resnet50", {"num_classes": 4})
    assert model.classifier[-1].out_channels == 4


def test_what_the_users_own_code_builds(tmp_path, monkeypatch):
    (tmp_path / "her_project").mkdir()
    (tmp_path / "her_project" / "model.py").write_text(
        "from torch import nn\n"
        "def build(width=4):\n    return nn.Sequential(nn.Conv2d(3, width, 3))\n"
        "ready = nn.Linear(2, 2)\n"
        "class Zoo:\n    small = staticmethod(build)\n"
        "def odd():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert open_model("her_project.model:build", {"width": 7})[0].out_channels == 7
    assert isinstance(open_model("her_project.model:ready"), nn.Linear)
    assert open_model("her_project.model:Zoo.small")[0].out_channels == 4
    for name, arguments, said in [
        ("her_project.model:biuld", {}, "did you mean build"),
        ("her_project.model:odd", {}, "gave a int, not a torch.nn.Module"),
        ("her_project.model:build", {"wdth": 1}, "unexpected keyword argument 'wdth'"),
        ("her_project.model:ready", {"x": 1}, "is a module already"),
        ("her_project.modle:build", {}, "there is no module her_project.modle"),
        ("nowhere:build", {}, "there is no module nowhere"),
        ("torchvision/resnet81", {}, "did you mean resnet18"),
        ("torchvision/resnet18", {"num_class": 2}, "num_class"),
        ("timm/resnet_81", {}, "timm has no model"),
        ("resnet18", {}, "names no model"),
    ]:
        with pytest.raises(UserError, match="(?s)" + said) as caught:
            open_model(name, arguments)
        assert "\n" not in str(caught.value)


def test_a_module_that_its_own_imports_fail_says_which(tmp_path, monkeypatch):
    (tmp_path / "needy_model.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs the module not_there_at_all"):
        open_model("needy_model:build")
