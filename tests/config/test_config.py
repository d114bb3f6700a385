"""What a config may say, and the line that answers what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bnexp.config import Config, load_config
from bnexp.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = """
data: {name: digits}
model: {name: mlp}
training: {steps: 10}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads_and_its_resolved_form_is_retrainable(path, tmp_path):
    config = load_config(path)
    again = tmp_path / path.name
    again.write_text(config.to_yaml())
    assert load_config(again) == config


def test_there_are_the_configs_the_readme_promises():
    assert {p.stem for p in CONFIGS} >= {
        "digits",
        "smoke",
        "fashion-mnist",
        "mnist-paper",
        "cifar10-resnet20",
    }


def test_the_name_defaults_to_the_file(config_file):
    assert load_config(config_file).name == "small"


def test_overrides_are_dotted_and_typed_by_yaml(config_file):
    config = load_config(
        config_file,
        ["training.optimizer.lr=1e-2", "test.statistics=[running, batch]", "statistics.decay=0.99"],
    )
    assert config.training.optimizer.lr == 0.01
    assert config.test.statistics == ["running", "batch"]
    assert config.statistics.decay == 0.99


def test_epochs_given_by_override_replace_steps(config_file):
    training = load_config(config_file, ["training.epochs=2"]).training
    assert (training.epochs, training.steps) == (2, None)


@pytest.mark.parametrize(
    "override, said",
    [
        ("training.stpes=5", ["unknown key training.stpes", "did you mean steps?"]),
        ("trainin.steps=5", ["unknown key trainin", "did you mean training?"]),
        ("training.optimizer.lrr=5", ["training.optimizer.lrr", "did you mean lr?"]),
        ("training.batch_size=many", ["training.batch_size", "'many'", "integer"]),
        ("training.batch_size=0", ["training.batch_size", "greater than or equal to 1"]),
        ("training.optimizer.name=adam", ["training.optimizer.name", "'sgd', 'adamw'"]),
        ("training.schedule.name=exp", ["training.schedule.name", "'cosine'"]),
        ("training.schedule={name: step}", ["training.schedule.milestones is missing"]),
        ("statistics.decay=1.0", ["statistics.decay", "less than 1"]),
        ("statistics.momentum=0.1", ["statistics.momentum", "decay: 0.9", "PyTorch"]),
        ("model.momentum=0.01", ["model.momentum", "decay: 0.99"]),
        (
            "statistics.estimators.slow={rule: ema, momentum: 0.1}",
            ["statistics.estimators.slow.momentum", "decay: 0.9"],
        ),
        ("statistics.estimators.batch={rule: cumulative}", ["'batch' can't name an estimator"]),
        ("training.early_stopping={metric: test_accuracy}", ["tune the run", "val_fraction"]),
        ("training.early_stopping={}", ["test.every"]),
        ("test.statistics=[batch]", ["running"]),
        ("device=gpu", ["'gpu' is no device", "cuda"]),
        *(
            (f"statistics.recompute.memory={text}", ["statistics.recompute.memory", "2GiB"])
            for text in ("0GiB", "1.2.3GiB", "2iB", "'.'", "200%", "much")
        ),
        ("seed=-1", ["seed", "greater than or equal to 0"]),
        ("training.steps", ["is no override", "key=value"]),
        ("data.name.x=1", ["data.name is 'digits', not a section"]),
        ("training.optimizer={", ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(config_file, override, said):
    with pytest.raises(UserError) as caught:
        load_config(config_file, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    "text, said",
    [
        ("data: {name: digits\nmodel: x", "line 2"),
        ("data: {name: digits}\ndata: {name: mnist}", "given twice"),
        ("- a list", "a mapping"),
        ("data: {name: digits}\nmodel: {name: mlp}", "training is missing"),
        ("!!python/object/apply:os.system ['false']", "not valid YAML"),
    ],
)
def test_bad_files_are_answered_in_one_line(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_config_names_its_neighbour(config_file):
    with pytest.raises(UserError, match=r"no config at .*smal\.yaml; that folder has small\.yaml"):
        load_config(config_file.with_name("smal.yaml"))


def test_the_schema_describes_every_key():
    schema = Config.model_json_schema()
    decay = schema["$defs"]["StatisticsConfig"]["properties"]["decay"]
    assert "momentum is 1 - decay" in decay["description"]
    assert schema["$defs"]["StatisticsConfig"]["additionalProperties"] is False


def test_the_resolved_yaml_is_plain(config_file):
    assert yaml.safe_load(load_config(config_file).to_yaml())["training"]["steps"] == 10
