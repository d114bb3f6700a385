import pytest

from bnexp.config.yaml_text import parse_yaml
from bnexp.errors import UserError
from bnexp.study.file import make_study, read_study
from bnexp.study.grid import points_of, trainings_of
from tests.study.studies import DECAYS, SMALL, plan_of, study_of


def levels(text, name="training.batch_size"):
    study = study_of(SMALL + text)
    return [level.value for level in next(a for a in study.axes if a.name == name).levels]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[8, 32]", [8, 32]),
        ("16", [16]),
        ("{from: 8, to: 128, factor: 4}", [8, 32, 128]),
        ("{from: 8, to: 100, factor: 4}", [8, 32]),
        ("{from: 10, to: 30, step: 10}", [10, 20, 30]),
        ("{from: 64, to: 16, factor: 0.5}", [64, 32, 16]),
    ],
)
def test_levels_are_lists_or_ranges(given, expected):
    assert levels(f"vary: {{training.batch_size: {given}}}") == expected


def test_a_range_of_fractions_has_the_numbers_that_one_would_write():
    given = "vary: {statistics.decay: {from: 0.1, to: 0.9, step: 0.2}}"
    assert levels(given, "statistics.decay") == [0.1, 0.3, 0.5, 0.7, 0.9]


def test_named_levels_change_several_keys():
    points = points_of(
        study_of(
            SMALL + "vary: {size: {small: {training.batch_size: 5, training.epochs: 1}, same: {}}}"
        )
    )
    small, same = points[0].config.training, points[3].config.training
    assert (small.batch_size, small.epochs, small.steps) == (5, 1, None)
    assert (same.batch_size, same.epochs, same.steps) == (20, None, 6)
    assert points[0].levels == {"size": "small"}


def test_values_are_read_as_the_config_reads_them():
    points = points_of(study_of(SMALL + "vary: {data.root: [010, /tmp]}"))
    assert str(points[0].config.data.root).endswith("/010")


def test_only_and_exclude_choose_experiments():
    text = SMALL + DECAYS
    whole = {(p.levels["statistics.decay"], p.levels["training.batch_size"]) for p in grid(text)}
    assert len(whole) == 6
    only = grid(text + "only: [{statistics.decay: 0.90}, {training.batch_size: [10]}]")
    assert {tuple(p.levels.values()) for p in only} == {
        (0.9, 10), (0.9, 20), (0.5, 10), (0.99, 10)
    }  # fmt: skip
    left = grid(text + "exclude: [{statistics.decay: [0.5, 0.9], training.batch_size: 10}]")
    assert {tuple(p.levels.values()) for p in left} == whole - {(0.5, 10), (0.9, 10)}


def grid(text):
    return points_of(study_of(text))


def test_overrides_make_axes_choose_levels_and_fix_keys():
    text = SMALL + "vary: {norm: {with: {}, without: {model.norm: none}}, statistics.decay: [0.5]}"
    plan = plan_of(text, "training.steps=2,4", "norm=without", "seeds=7,9", "statistics.decay=0.8")
    assert {axis.name for axis in plan.study.axes} == {"norm", "training.steps"}
    assert {p.config.model.norm for p in plan.points} == {"none"}
    assert {p.config.statistics.decay for p in plan.points} == {0.8}
    assert {p.seed for p in plan.points} == {7, 9} == {p.config.seed for p in plan.points}


def test_a_study_written_down_is_the_same_study():
    text = SMALL + DECAYS + "only: [{training.batch_size: 10}]"
    study = study_of(text, "training.optimizer.lr=0.2", "seeds=3", "data.root=010")
    again = make_study(parse_yaml(study.to_yaml(), "again"), [], "again")
    assert again.to_yaml() == study.to_yaml()
    assert [t.key for t in trainings_of(points_of(again))] == [
        t.key for t in trainings_of(points_of(study))
    ]


def test_a_base_is_a_file_beside_the_study_or_a_shipped_config(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "data: {name: digits}\nmodel: {name: mlp}\ntraining: {steps: 3}\nexpect: {test_accuracy: 1}"
    )
    (tmp_path / "s.yaml").write_text("base: mine.yaml")
    config = points_of(read_study(tmp_path / "s.yaml"))[0].config
    assert config.training.steps == 3 and config.name == "s"
    assert config.expect.test_accuracy is None
    (tmp_path / "s.yaml").write_text("base: digits")
    assert points_of(read_study(tmp_path / "s.yaml"))[0].config.training.epochs == 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x", "base is missing"),
        ("base: nowhere-to-be-found", "no config file"),
        ("base: [1]", "base is"),
        (SMALL + "vary: [1, 2]", "vary must be a section"),
        (SMALL + "vary: {training.batch_size: []}", "no levels"),
        (SMALL + "vary: {training.batch_size: [8, 8]}", "has 8 twice"),
        (SMALL + "vary: {training.batch_size: [8, 8.0]}", "twice"),
        (SMALL + "vary: {training.batch_size: [8, '8']}", "has 8 twice"),
        (SMALL + "vary: {training.optimizer.lr: [0.1, 0.1000000000000001]}", "has 0.1 twice"),
        (SMALL + "vary: {training.batch_sise: [8, 9]}", "training.batch_sise"),
        (SMALL + "vary: {training: [{steps: 3}]}", "a whole section"),
        (SMALL + "vary: {sizes: [8, 9]}", "named levels"),
        (SMALL + "vary: {seed: [8, 9]}", "columns of the results"),
        (SMALL + "vary: {s: {a: {seed: 3}}}", "say seeds"),
        (SMALL + "vary: {s: {a: 3}}", "must be a section"),
        (SMALL + "vary: {accuracy: {a: {}}}", "columns of the results"),
        (SMALL + "vary: {'a b': {a: {}}}", "can't be the name of an axis"),
        (SMALL + "vary: {training.steps: {from: 1, to: 9}}", "a factor or a step"),
        (SMALL + "vary: {training.steps: {from: 1, to: 9, step: 0}}", "doesn't go to"),
        (SMALL + "vary: {training.steps: {from: 1, to: 9, step: -1}}", "doesn't go to"),
        (SMALL + "vary: {training.steps: {from: 9, to: 1, factor: 2}}", "doesn't go to"),
        (SMALL + "vary: {training.steps: {from: 1, to: 1e12, step: 1}}", "more than 1,000 levels"),
        (SMALL + "vary: {training.steps: {from: 1, to: .inf, step: 1}}", "finite"),
        (SMALL + "vary: {s: {a: {training.steps: 1}}, training.steps: [2]}", "both change"),
        (
            SMALL + "vary: {training.optimizer: [{name: sgd}], training.optimizer.lr: [1]}",
            "both change",
        ),
        (SMALL + "seeds: []", "one at least"),
        (SMALL + "seeds: [1, 1]", "each seed once"),
        (SMALL + "seeds: 0", "seeds: 0 is neither how many, from 1 to 1000, nor a list"),
        (SMALL + "seeds: -1", "seeds: -1 is neither"),
        (SMALL + "seeds: [1, -1]", "seeds: [1, -1] is neither"),
        (SMALL + "seeds: many", "seeds: 'many' is neither"),
        (SMALL + "only: [{nothing: 3}]", "no axis is called"),
        (SMALL + DECAYS + "exclude: [{statistics.decay: 0.7}]", "has no level 0.7"),
        (SMALL + DECAYS + "only: [{statistics.decay: 0.5}]\nexclude: [{statistics.decay: 0.5}]",
         "leave no experiment"),
        (SMALL + "resources: {cpus: 0}", "resources.cpus"),
        (SMALL + "resources: {gpus: .nan}", "resources.gpus"),
        (SMALL + "what: 3", "unknown key what"),
        ("base: digits\nname: ../x", "can't name a folder"),
        (SMALL + "vary: !!python/object:os.system {a: 1}", "tag"),
        (SMALL + "expect: {claims: maybe}", "expect.claims"),
        (SMALL + "claims: [3]", "claims.0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(text, said):
    with pytest.raises(UserError) as error:
        points_of(study_of(text))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_grid_that_is_too_large_is_refused_at_once():
    axes = ", ".join(f"a{i}: {{x: {{}}, y: {{}}, z: {{}}}}" for i in range(60))
    with pytest.raises(UserError, match="combinations"):
        study_of(SMALL + f"vary: {{{axes}}}")
    with pytest.raises(UserError, match="experiments"):
        points_of(
            study_of(SMALL + "vary: {training.steps: {from: 1, to: 400, step: 1}}\nseeds: 99")
        )


@pytest.mark.parametrize("override", ["claims=3", "vary.x=3", "nothing", "only=1,2", "seed=3,4"])
def test_overrides_that_are_none_are_refused(override):
    with pytest.raises(UserError):
        points_of(study_of(SMALL, override))
