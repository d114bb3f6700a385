"""What a config may say, and the line that answers what it may not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from bnexp.cli.lists import run_init
from bnexp.config import Config, load_config, resolve
from bnexp.config.shipped import find_config, find_study_file, shipped_studies
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
    "override, key, value",
    [
        ("seed=010", "seed", 10),
        ("seed=008", "seed", 8),
        ("seed=1_000", "seed", 1000),
        ("training.optimizer.lr=1e-2", "training.optimizer.lr", 0.01),
        ("training.optimizer.lr=1", "training.optimizer.lr", 1.0),
        ("training.optimizer.lr=.5", "training.optimizer.lr", 0.5),
        ("data.augment.flip=yes", "data.augment.flip", True),
        ("name=010", "name", "010"),
        ("name=1e3", "name", "1e3"),
        ("name=2024-01-01", "name", "2024-01-01"),
        ("name=no", "name", "no"),
        ("name=null", "name", "null"),
        ("name='quoted'", "name", "quoted"),
        ("device=cuda:1", "device", "cuda:1"),
        ("model.name=#1: [x", "model.name", "#1: [x"),
        ("data.root=/data/a #1", "data.root", Path("/data/a #1")),
        ("data.root=/data/{a}: b", "data.root", Path("/data/{a}: b")),
        ("data.root=/data/\udcff", "data.root", Path("/data/\udcff")),
        ("data.root=", "data.root", None),
        ("data.root=null", "data.root", None),
        ("data.root=~", "data.root", Path.home()),
        ("data.root='/data/#2'", "data.root", Path("/data/#2")),
        ("statistics.recompute.memory=50%", "statistics.recompute.memory", "50%"),
    ],
)
def test_an_override_means_what_was_typed(config_file, override, key, value):
    found = load_config(config_file, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["010", "1e3", "0x10", "2024-01-01", "1.50", "on", "y"])
def test_texts_stay_what_they_are_in_files_too_and_when_written_and_read_again(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(f"{SMALL}\nstatistics: {{estimators: {{{text}: {{rule: cumulative}}}}}}")
    config = load_config(path, [f"data.root=/{text}", f"model.name={text}"])
    assert [*config.statistics.estimators, config.model.name] == [text, text]
    path.write_text(config.to_yaml())
    assert load_config(path) == config


@pytest.mark.parametrize(
    "override, said",
    [
        ("training.steps=1e3", "training.steps is '1e3'; write 1000"),
        ("training.steps=1.0e+3", "write 1000"),
        ("training.steps='1e3'", "write 1000"),
        ("training.batch_size=64.0", "write 64"),
        ("training.steps=1:30", "'1:30'"),
        ("training.steps=0x10", "'0x10'"),
        ("training.steps=0o10", "'0o10'"),
        ("training.steps=0b11", "'0b11'"),
        ("training.steps=1.5", "integer"),
        ("training.steps=no", "'no'; true, false and YAML's yes"),
        ("training.optimizer.lr=.inf", "finite"),
        ("training.optimizer.lr=.nan", "finite"),
        ("training.optimizer.lr=1e999", "finite"),
        ("training.optimizer={name: adamw, betas: [no, 0.9]}", "betas.0 is 'no'"),
        ("training.steps=!!int 5", "tag '!!int'"),
        ("training.steps=*a", "*a has no anchor"),
        ("training.steps=1\n--- 2", "second document"),
        ("training.=5", "unknown key training."),
        ("data.root=\0", "NUL"),
        ("data.root='a\\0'", ""),
    ],
)
def test_what_could_be_misread_is_refused(config_file, override, said):
    if not said:
        assert load_config(config_file, [override]).data.root.name == "a\\0"
        return
    with pytest.raises(UserError) as caught:
        load_config(config_file, [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_override_changes_the_one_place_it_names(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"{SMALL}\nstatistics: {{estimators: {{a: &e {{rule: ema, decay: 0.9}}, b: *e, c: *e}}}}"
    )
    found = load_config(path, ["statistics.estimators.b.decay=0.5"]).statistics.estimators
    assert [found[name].decay for name in "abc"] == [0.9, 0.5, 0.9]


def test_an_override_leaves_the_tree_it_is_given_alone():
    tree = yaml.safe_load(SMALL)
    assert resolve(tree, ["training.steps=11"], "test").training.steps == 11
    assert tree == yaml.safe_load(SMALL)


@pytest.mark.parametrize("value", [True, 11.0])
def test_plain_data_are_read_as_strictly_as_a_file(value):
    tree = {**yaml.safe_load(SMALL), "training": {"steps": value}}
    with pytest.raises(UserError, match=f"test: training.steps is {value}; "):
        resolve(tree, [], "test")


def test_overrides_name_estimators_that_have_dots(config_file):
    overrides = [
        "statistics.estimators.ema-0.5={rule: ema, decay: 0.5}",
        "statistics.estimators.ema-0.5.debias=true",
        "statistics.estimators.v1.2.rule=cumulative",
    ]
    found = load_config(config_file, overrides).statistics.estimators
    assert list(found) == ["ema-0.5", "v1.2"]
    assert (found["ema-0.5"].decay, found["ema-0.5"].debias) == (0.5, True)


LONG = "x" * 60_000


@pytest.mark.parametrize(
    "override",
    [
        ".".join(["a"] * 4000) + "=1",
        f"{LONG}=1",
        f"{LONG}",
        f"name={LONG}",
        f"device={LONG}",
        f"training.steps={LONG}",
        f"training.steps={'9' * 6000}",
        f"training.optimizer.lr={'9' * 6000}",
        f"training.steps=1{':59' * 3000}",
        f"training.optimizer.name={LONG}",
        f"training.optimizer={{{LONG}: 1}}",
        f"training.optimizer=!{LONG} 1",
        f"training.optimizer=*{LONG}",
        f"test.statistics=[{'batch, ' * 3000}]",
        f"training.optimizer={'[' * 30_000}{']' * 30_000}",
        f"training.optimizer={'{a: ' * 30_000}",
        f"training.optimizer={'- ' * 30_000}",
        f"statistics.estimators={{{LONG}: {{rule: cumulative}}, ' ': {{rule: cumulative}}}}",
        f"statistics.recompute.memory={'9' * 4000}GiB",
        f"statistics.recompute.memory={LONG}",
        f"statistics.recompute.memory={'9' * 60_000}x",
    ],
    ids=range(21),
)
def test_long_deep_and_entangled_input_ends_in_a_line_of_bounded_length(config_file, override):
    if override.endswith("9GiB"):
        load_config(config_file, [override])
        return
    with pytest.raises(UserError) as caught:
        load_config(config_file, [override])
    assert len(str(caught.value)) < 1200 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text, said",
    [
        ("data: {name: digits\nmodel: x", "line 2"),
        ("data: {name: digits}\ndata: {name: mnist}", "given twice"),
        ("- a list", "a mapping"),
        ("data: {name: digits}\nmodel: {name: mlp}", "training is missing"),
        (f"{SMALL}\nseed: !!bool z", "tag '!!bool'"),
        (f"{SMALL}\nname: !!timestamp foo", "tag '!!timestamp'"),
        (f"{SMALL}\nseed: 1\0", "not valid YAML"),
        (f"{SMALL}\nname:\t- a\n\t- b", "not valid YAML"),
        (f"{SMALL}\n? [a, b]\n: 1", "a key must be a word"),
        ('name: "\\UFFFFFFFF"', "not valid YAML"),
        (f"%YAML {'1' * 5000}.1\n---\n{SMALL}", "not valid YAML"),
        (f"{SMALL}\nseed: &a [*a]", "*a has no anchor"),
        (f"{SMALL}\n<<: 5", "<< takes a mapping"),
        ("x: y\n" * 60_000, "are no config"),
        ("- x\n" * 20_000, "are no config"),
        ("!!python/object/apply:os.system ['false']", "tag '!!python"),
    ],
)
def test_bad_files_are_answered_in_one_line(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_answered_in_one_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(SMALL.encode("utf-16"))
    with pytest.raises(UserError, match="no text in UTF-8: byte 0"):
        load_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_config(path).training.steps == 10
    with pytest.raises(UserError, match="more than 262,144 bytes"):
        load_config(Path("/dev/zero"))


def test_an_alias_bomb_ends_in_one_line(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 10,000 values are no config"):
        load_config(path)


def test_of_merged_mappings_the_earlier_wins_and_the_own_keys_before_all(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(
        """
data: {name: digits}
model: {name: mlp}
training: {steps: 20}
statistics:
  estimators:
    fast: &fast {rule: ema, decay: 0.5}
    slow: &slow {rule: ema, decay: 0.99, debias: true}
    both: {<<: [*fast, *slow]}
    other: {decay: 0.7, <<: *slow}
    again: {<<: *slow, decay: 0.7}
"""
    )
    found = load_config(path).statistics.estimators
    assert (found["both"].decay, found["both"].debias) == (0.5, True)
    assert found["other"] == found["again"]
    assert (found["other"].decay, found["other"].debias) == (0.7, True)


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


def test_a_file_of_a_shipped_configs_name_that_is_another_must_be_named(tmp_path, monkeypatch):
    """Who has edited what `bnexp init digits` wrote means that one, or may."""
    monkeypatch.chdir(tmp_path)
    shipped = find_config("digits")
    (tmp_path / "digits").mkdir()
    own = tmp_path / "digits.yaml"
    own.write_bytes(shipped.read_bytes())
    assert find_config("digits") == shipped
    own.write_text("data: {name: digits}\nmodel: {name: mlp}\n")
    with pytest.raises(UserError, match=r"digits\.yaml here is not the config digits that comes"):
        find_config("digits")
    assert find_config("digits.yaml") == Path("digits.yaml")


def test_a_written_config_does_not_stand_in_the_way_of_the_study_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "smoke.yaml"
    own.write_bytes(find_config("smoke").read_bytes())
    assert find_study_file("smoke") == shipped_studies()["smoke"]
    own.write_text("base: digits\nseeds: 2\n")
    with pytest.raises(UserError, match=r"smoke\.yaml here is not the study smoke"):
        find_study_file("smoke")


def test_the_path_that_a_shipped_config_has_in_a_clone_leads_to_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("configs/digits.yaml", "digits.yaml"):
        with pytest.raises(UserError, match=f"no config at {given}; .* is called digits"):
            find_config(given)
    assert find_config("configs/mine.yaml") == Path("configs/mine.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_the_commands_in_a_shipped_config_work_in_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in re.findall(r"bnexp train ([^\s=]+)", path.read_text()):
        assert find_config(given).exists()


def test_shipped_configs_are_listed_by_whole_sentences(capsys):
    run_init(None, None)
    listed = capsys.readouterr().out
    assert "Fashion-MNIST (Xiao et al. 2017): 60,000 training" in listed
    assert listed.count("(") == listed.count(")")
