"""The names of kinds of statistics, and what they are called in sentences.

`running` and the further estimators, `recomputed` (or `recomputed/<method>`), `batch`; `none` for
a network without BN; with `ema/` or `swa/` before it, of averaged weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

NO_BATCHNORM = "none"


def is_recomputed(kind: str) -> bool:
    """Whether `kind` names recomputed statistics of the trained weights: `recomputed`, or
    `recomputed/<method>` where several methods were asked for."""
    return kind.partition("/")[0] == "recomputed"


def compared_kind(others: Iterable[str]) -> str | None:
    """Of all kinds but the baseline, the one it is judged by: recomputed statistics where there
    are any, else the first; None where there is none."""
    others = list(others)
    return next(filter(is_recomputed, others), others[0] if others else None)


def default_label(kind: str) -> str:
    """The name of a kind of statistics in a sentence, in the plural."""
    known = {
        "running": "running averages",
        "recomputed": "recomputed statistics",
        "batch": "batch statistics",
        "none": "no batch normalization",
    }
    if kind in known:
        return known[kind]
    if is_recomputed(kind):
        return f"recomputed statistics ({kind.partition('/')[2]})"
    return f"the {kind} statistics"


def config_labels(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of a run's kinds of statistics that say how each was made, from the resolved config."""
    statistics, test = config["statistics"], config["test"]
    labels = {
        "running": f"running averages (decay {statistics['decay']:g})",
        "recomputed": f"recomputed statistics ({statistics['recompute']['method']})",
        "batch": f"batch statistics (mini-batches of {test['batch_size']})",
    }
    for name, rule in statistics["estimators"].items():
        if rule["rule"] == "ema":
            made = f"decay {rule['decay']:g}{', debiased' if rule['debias'] else ''}"
        elif rule["rule"] == "cumulative":
            made = "cumulative average"
        else:
            made = f"pooled over {rule['window'] or 'all'} steps"
        labels[name] = f"the {name} statistics ({made})"
    for weights in ("ema", "swa"):
        name = f"{weights.upper()} weights"
        labels[f"{weights}/recomputed"] = f"{name} with recomputed statistics"
        labels[f"{weights}/running"] = f"{name} with the trained model's running averages"
    return labels
