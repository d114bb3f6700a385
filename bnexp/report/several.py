"""What several runs have in common and what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnexp.dotted import dotted, within
from bnexp.report.run_data import RunData

if TYPE_CHECKING:
    from bnexp.analysis.seeds import SeedSummary

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


@dataclass(frozen=True)
class SeedGroup:
    """Finished runs that differ in their seed alone. `repeated` are runs of a seed that is there
    already: they say nothing new and are left out of the summary."""

    runs: list[str]
    seeds: list[int]
    repeated: list[str]
    summary: list[SeedSummary]


def config_differences(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """Dotted config keys whose values differ, each with every run's value; None where absent."""
    flats = [dotted(run.config) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    rows = [(key, [flat.get(key) for flat in flats]) for key in keys if key != "name"]
    return [(key, values) for key, values in rows if any(v != values[0] for v in values)]


def seed_groups(runs: Sequence[RunData]) -> list[SeedGroup]:
    """Groups of two or more seeds of one config among the runs that have a final comparison."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        if run.comparison:
            groups.setdefault(repr(_experiment(run.config)), []).append(run)
    found = []
    for members in groups.values():
        by_seed: dict[int, RunData] = {}
        repeated = []
        for run in members:
            if run.config["seed"] in by_seed:
                repeated.append(run.name)
            else:
                by_seed[run.config["seed"]] = run
        if len(by_seed) > 1:
            chosen = [by_seed[seed] for seed in sorted(by_seed)]
            names = [run.name for run in chosen]
            found.append(SeedGroup(names, sorted(by_seed), repeated, _summarize(chosen)))
    return found


def _summarize(runs: list[RunData]) -> list[SeedSummary]:
    from bnexp.analysis.seeds import summarize_seeds
    from bnexp.condition import Condition

    accuracies = [
        {kind["name"]: kind["accuracy"] for kind in run.comparison["kinds"]} for run in runs
    ]
    baseline = runs[0].comparison["baseline"]
    kinds = [k for k in accuracies[0] if all(k in found for found in accuracies)]
    if baseline not in kinds:
        return []
    return summarize_seeds(
        {Condition.parse(k): [found[k] for found in accuracies] for k in kinds},
        Condition.parse(baseline),
    )


def _experiment(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(
        (key, value) for key, value in dotted(config).items() if not within(key, NOT_THE_EXPERIMENT)
    )
