"""What several runs have in common and what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnexp.analysis.seeds import SeedSummary, summarize_seeds
from bnexp.analysis.words import count
from bnexp.dotted import dotted, within
from bnexp.report.run_data import RunData

# Keys that decide nothing about what is learned or measured, beside the seed itself.
NOT_THE_EXPERIMENT = (
    "name",
    "seed",
    "device",
    "data.root",
    "data.workers",
    "checkpoints",
    "logging",
    "expect",
)
# Keys of the data that are about training alone: the test images are the same.
NOT_THE_TEST_SET = (
    "data.augment",
    "data.batches",
    "data.val_fraction",
    "data.workers",
    "data.limit.train",
)


@dataclass(frozen=True)
class SeedGroup:
    """Finished runs that differ in their seed alone, in the order of their seeds.

    `config` says which config it is: model, data, steps, and what tells it from the configs of the
    other groups. `repeated` are runs of a seed that is there already: they say nothing new and are
    left out of the summary.
    """

    config: str
    runs: list[RunData]
    repeated: list[str]
    summary: list[SeedSummary]

    @property
    def seeds(self) -> list[int]:
        return [run.setup.seed for run in self.runs]


def config_differences(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """Dotted config keys whose values differ, each with every run's value; None where absent."""
    flats = [dotted(run.config) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    rows = [(key, [flat.get(key) for flat in flats]) for key in keys if key != "name"]
    return [(key, values) for key, values in rows if any(v != values[0] for v in values)]


def by_test_set(runs: Sequence[RunData]) -> list[tuple[str, list[RunData]]]:
    """The runs in groups that were tested on the same images, as far as their records say, with
    what tells these images from those of the other groups."""
    groups: dict[str, list[RunData]] = {}
    known = all(run.test_images for run in runs)
    for run in runs:
        key = run.test_images if known and run.test_images else repr(_test_set(run))
        groups.setdefault(key, []).append(run)
    sets = [_test_set(members[0]) for members in groups.values()]
    named = []
    for chosen, members in zip(sets, groups.values(), strict=True):
        alike = [other for other in sets if other["data.name"] == chosen["data.name"]]
        apart = [key for key in chosen if any(other.get(key) != chosen[key] for other in alike)]
        if not apart and len(alike) > 1:
            more = f"the images of {members[0].name}"
        else:
            more = ", ".join(f"{k} {'all' if chosen[k] is None else chosen[k]}" for k in apart)
        named.append((members[0].setup.data + (f" ({more})" if more else ""), members))
    return named


def _test_set(run: RunData) -> dict[str, Any]:
    data = dotted({"data": run.config["data"]})
    return {key: data[key] for key in sorted(data) if not within(key, NOT_THE_TEST_SET)}


def seed_groups(runs: Sequence[RunData]) -> list[SeedGroup]:
    """Groups of two or more seeds of one config among the runs that have a final comparison."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        if run.comparison:
            groups.setdefault(repr(_experiment(run.config)), []).append(run)
    chosen: list[tuple[list[RunData], list[str]]] = []
    for members in groups.values():
        by_seed: dict[int, RunData] = {}
        for run in members:
            by_seed.setdefault(run.setup.seed, run)
        if len(by_seed) > 1:
            first = [by_seed[seed] for seed in sorted(by_seed)]
            chosen.append((first, [run.name for run in members if run not in first]))
    names = _names([members[0] for members, _ in chosen])
    return [
        SeedGroup(name, members, repeated, _summarize(members))
        for name, (members, repeated) in zip(names, chosen, strict=True)
    ]


def _names(runs: Sequence[RunData]) -> list[str]:
    """What each run's config is called so that no two are called the same."""
    differences = [
        (key, values)
        for key, values in config_differences(runs)
        if not within(key, (*NOT_THE_EXPERIMENT, "model.name", "data.name", "training.steps"))
    ]
    return [
        f"{run.setup.model} on {run.setup.data}, {count(run.step)} steps"
        + "".join(f", {key}: {values[i]}" for key, values in differences)
        for i, run in enumerate(runs)
    ]


def _summarize(runs: Sequence[RunData]) -> list[SeedSummary]:
    found = [
        {result.condition: result.accuracy for result in run.comparison.results}
        for run in runs
        if run.comparison
    ]
    shared = [condition for condition in found[0] if all(condition in other for other in found)]
    baseline = next(iter(found[0]))
    if baseline not in shared:
        return []
    return summarize_seeds({c: [one[c] for one in found] for c in shared}, baseline)


def _experiment(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(
        (key, value) for key, value in dotted(config).items() if not within(key, NOT_THE_EXPERIMENT)
    )
