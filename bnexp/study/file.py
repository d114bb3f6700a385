"""From a study file to a `Study`: its grid of axes on top of a base, not yet resolved."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bnexp.config.loading import override, read_tree, resolved, split_assignment
from bnexp.config.schema import Config
from bnexp.config.shipped import find_config
from bnexp.config.study import RangeConfig, StudyConfig
from bnexp.config.yaml_text import Scalar, parse_yaml, unshared
from bnexp.dotted import within
from bnexp.errors import UserError, shown

COLUMNS = (
    "experiment", "seed", "state", "step", "condition", "accuracy", "loss", "samples",
    "ema_accuracy", "train_accuracy",
)  # fmt: skip
"""Of results.csv, beside the axes."""
_NOT_VARIED = ("seed", "name", "expect", "checkpoints", "logging")
_AXIS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,99}")
MAX_LEVELS = 1000
MAX_POINTS = 10_000


@dataclass(frozen=True)
class Level:
    """A level of an axis: `value` as claims and results name it, `changes` the values, not yet
    typed, that it gives to keys of the config."""

    value: Any
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    name: str
    levels: tuple[Level, ...]

    def level(self, given: Any, said: str) -> Level:
        """The level that a user named by its value. UserError if there is none."""
        for level in self.levels:
            if same(level.value, given):
                return level
        known = ", ".join(text_of(level.value) for level in self.levels[:20])
        raise UserError(f"{said}: {self.name} has no level {shown(given)}; it has {known}")


@dataclass(frozen=True)
class Study:
    """A study as its file says it. `base` is a config's tree, not yet typed; `only` and `exclude`
    are conditions: axis -> the values of some of its levels."""

    config: StudyConfig
    base: dict[str, Any]
    axes: tuple[Axis, ...]
    only: tuple[Mapping[str, list[Any]], ...]
    exclude: tuple[Mapping[str, list[Any]], ...]
    tree: dict[str, Any]
    """All of it, not yet typed, with the base as the config itself."""

    def axis(self, name: str, said: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        known = ", ".join(axis.name for axis in self.axes) or "none"
        raise UserError(f"{said}: no axis is called {shown(name)}; there are {known}")

    def to_yaml(self) -> str:
        """A study file that says the same, on its own."""
        return yaml.serialize(_node(self.tree), Dumper=yaml.SafeDumper, allow_unicode=True)


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in the file at `path`. An override `key=a,b,c` makes an axis of the key, or names
    the levels that are left of an axis; `key=value` fixes a key of the base or of the study.

    Raises UserError (one line) for whatever is wrong with it.
    """
    tree = read_tree(path)
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")
    tree.setdefault("name", Scalar(words[:100] or "study", quoted=True))
    return make_study(tree, overrides, str(path), path.parent)


def make_study(
    tree: dict[str, Any], overrides: Sequence[str], source: str, folder: Path = Path()
) -> Study:
    """The study in an already parsed mapping; a base in a file is looked for in `folder`."""
    tree = dict(tree)
    if "base" not in tree:
        raise UserError(
            f"{source}: base is missing: a shipped config's name, a file, or a config itself"
        )
    tree["base"] = _base(tree["base"], folder)
    vary = tree.get("vary")
    if isinstance(vary, Scalar) and vary.value is None:
        vary = None
    if vary is not None and not isinstance(vary, dict):
        raise UserError(f"{source}: vary must be a section of axes, not {shown(_plain(vary))}")
    tree["vary"] = dict(vary or {})
    fixed: list[str] = []
    own = []
    for assignment in overrides:
        key, text = split_assignment(assignment)
        if within(key, StudyConfig.model_fields) and key != "base":
            own.append(_own(key, text, assignment))
        elif not _as_axis(tree, key, text):
            fixed.append(assignment)
    base = _fixed(tree["base"], fixed)
    tree["base"] = base
    config = resolved(tree, own, source, StudyConfig)
    for key in ("name", "seeds", "resources", "expect"):
        if any(within(a.partition("=")[0], [key]) for a in own):
            tree[key] = config.model_dump(mode="json")[key]
    axes = tuple(_axis(name, given, source) for name, given in tree["vary"].items())
    _refuse_conflicts(axes, source)
    study = Study(config, base, axes, (), (), tree)
    only, exclude = (
        tuple(_condition(study, given, f"{source}: {what}") for given in conditions)
        for what, conditions in (("only", config.only), ("exclude", config.exclude))
    )
    return Study(config, base, axes, only, exclude, tree)


def _own(key: str, text: str, assignment: str) -> str:
    """An override of the study itself; `seeds=0,5` is a list."""
    if key == "seeds" and "," in text and not text.startswith("["):
        return f"seeds=[{text}]"
    if key.partition(".")[0] in ("vary", "claims", "only", "exclude"):
        raise UserError(f"{shown(assignment)}: write that into the study file")
    return assignment


def _base(given: Any, folder: Path) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    if not isinstance(given, Scalar) or not given.text:
        raise UserError(f"base is {shown(_plain(given))}; name a config or write it there")
    beside = folder / given.text
    path = beside if len(Path(given.text).parts) and beside.is_file() else find_config(given.text)
    tree = read_tree(path)
    tree.pop("name", None)
    return tree


def _fixed(base: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    base = unshared(base)
    for assignment in assignments:
        override(base, assignment, Config)
    return base


def _as_axis(tree: dict[str, Any], key: str, text: str) -> bool:
    """Let an override change the axes: True where it does."""
    vary = tree["vary"]
    listed = parse_yaml(f"[{text}]", f"override {shown(f'{key}={text}')}")
    if key in vary and isinstance(vary[key], dict) and not _is_range(vary[key]):
        names = [_plain(item) for item in listed]
        for name in names:
            if str(name) not in vary[key]:
                raise UserError(f"{key} has no level {shown(name)}; it has {', '.join(vary[key])}")
        vary[key] = {str(name): vary[key][str(name)] for name in names}
        return True
    if len(listed) > 1:
        vary[key] = listed
        return True
    vary.pop(key, None)
    return False


def _axis(name: str, given: Any, source: str) -> Axis:
    said = f"{source}: vary.{name if len(name) < 100 else shown(name)}"
    if not _AXIS.fullmatch(name) or name in COLUMNS:
        raise UserError(
            f"{said} can't be the name of an axis: use letters, digits, '.', '_' and '-'"
            + (f"; {', '.join(COLUMNS)} are columns of the results" if name in COLUMNS else "")
        )
    if isinstance(given, dict) and _is_range(given):
        levels = [Level(v, {name: v}) for v in _range(given, said)]
    elif isinstance(given, dict):
        levels = []
        for word, changes in given.items():
            if not isinstance(changes, dict):
                raise UserError(
                    f"{said}.{word[:60]} must be a section of keys and values, as in "
                    f"{{model.norm: none}}, not {shown(_plain(changes))}"
                )
            levels.append(Level(Scalar(word).value, changes))
    elif isinstance(given, list):
        levels = [Level(_plain(item), {name: item}) for item in given]
    else:
        levels = [Level(_plain(given), {name: given})]
    if not levels:
        raise UserError(f"{said} has no levels")
    if len(levels) > MAX_LEVELS:
        raise UserError(f"{said} has more than {MAX_LEVELS:,} levels")
    for i, level in enumerate(levels):
        text = text_of(level.value)  # results and claims know experiments by it
        if any(same(level.value, v.value) or text == text_of(v.value) for v in levels[:i]):
            raise UserError(f"{said} has {text} twice")
        for key in level.changes:
            if within(key, _NOT_VARIED):
                hint = "say seeds" if key == "seed" else "it changes no result"
                raise UserError(f"{said}: {key} can't be varied: {hint}")
            if key in Config.model_fields and key != "device":
                raise UserError(f"{said}: {key} is a whole section: vary a key in it")
            if "." not in key and key != "device":
                raise UserError(
                    f"{said}: {shown(key)} is no key of a config, such as training.batch_size; "
                    "an axis of another name has named levels: {with: {model.norm: batch}, ...}"
                )
    return Axis(name, tuple(levels))


def _is_range(given: Mapping[str, Any]) -> bool:
    return {"from", "to"} <= given.keys()


def _range(given: Mapping[str, Any], said: str) -> list[int | float]:
    try:
        found = RangeConfig.model_validate({key: _plain(value) for key, value in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{said}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if (found.factor is None) == (found.step is None):
        raise UserError(f"{said}: a range needs a factor or a step, one of them")
    low, high = found.start, found.to
    if found.factor is not None:
        if low <= 0 or high <= 0 or found.factor == 1 or (found.factor > 1) != (high >= low):
            raise UserError(f"{said}: by factor {found.factor:g} it doesn't go to {high:g}")
        count = math.floor(math.log(high / low) / math.log(found.factor) + 1e-9)
        values = [low * found.factor**i for i in range(min(count, MAX_LEVELS) + 1)]
    else:
        step = found.step or 0.0
        if step == 0 or (step > 0) != (high >= low):
            raise UserError(f"{said}: by step {step:g} it doesn't go to {high:g}")
        count = math.floor((high - low) / step + 1e-9)
        values = [low + step * i for i in range(min(count, MAX_LEVELS) + 1)]
    return [int(v) if v == round(v) and abs(v) < 2**53 else float(f"{v:.12g}") for v in values]


def _refuse_conflicts(axes: Sequence[Axis], source: str) -> None:
    """UserError where two axes give values to one key."""
    keys = [(axis.name, {key for level in axis.levels for key in level.changes}) for axis in axes]
    for (one, mine), (other, theirs) in itertools.combinations(keys, 2):
        for key in mine:
            if any(within(key, [k]) or within(k, [key]) for k in theirs):
                raise UserError(f"{source}: vary.{one} and vary.{other} both change {key}")
    points = math.prod(len(axis.levels) for axis in axes)
    if points > MAX_POINTS:
        raise UserError(f"{source}: {points:,} combinations; {MAX_POINTS:,} are the most")


def _condition(study: Study, given: Mapping[str, Any], said: str) -> dict[str, list[Any]]:
    return {name: levels_of(study, name, values, said) for name, values in given.items()}


def levels_of(study: Study, name: str, values: Any, said: str) -> list[Any]:
    """The values of the levels that a user named of the axis `name`: one, or a list."""
    axis = study.axis(name, said)
    one_level = not isinstance(values, list) or any(same(v.value, values) for v in axis.levels)
    return [axis.level(v, said).value for v in ([values] if one_level else values)]


def same(one: Any, other: Any) -> bool:
    """Whether two plain values are the same level: 0.90 is 0.9, 1 is not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return one == other


def text_of(value: Any) -> str:
    """A level as results and tables show it."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip()
    return str(value)


def _plain(node: Any) -> Any:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list) else node


def _node(tree: Any) -> yaml.Node:
    """The tree as PyYAML writes it, each scalar as it was typed."""
    if isinstance(tree, dict):
        pairs = [(_node(Scalar(key, key == "<<")), _node(value)) for key, value in tree.items()]
        return yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=False)
    if isinstance(tree, list):
        flat = not any(isinstance(item, dict | list) for item in tree)
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [_node(v) for v in tree], flow_style=flat)
    if not isinstance(tree, Scalar):
        return yaml.SafeDumper("").represent_data(tree)
    if tree.quoted:
        return yaml.ScalarNode("tag:yaml.org,2002:str", tree.text, style='"')
    tag = yaml.SafeDumper("").resolve(yaml.ScalarNode, tree.text, (True, False))
    return yaml.ScalarNode(tag, tree.text)
